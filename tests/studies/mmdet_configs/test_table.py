"""The table of mmdet's configs: what becomes of one model, what is counted, what is kept."""

import json
import sys
from pathlib import Path

import pytest
from mmdet.utils import register_all_modules

from studies.mmdet_configs import __main__ as table
from tests.helpers.paths import ROOT


def retinanet(**norm_cfg):
    return {
        "type": "RetinaNet",
        "data_preprocessor": {"type": "DetDataPreprocessor"},
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 8,
            "num_stages": 2,
            "strides": (1, 2),
            "dilations": (1, 1),
            "out_indices": (0, 1),
            "norm_cfg": norm_cfg,
        },
        "neck": {"type": "FPN", "in_channels": [8, 16], "out_channels": 8, "num_outs": 2},
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": 2,
            "in_channels": 8,
            "feat_channels": 8,
            "stacked_convs": 1,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [4],
                "ratios": [1.0],
                "strides": [4, 8],
            },
        },
    }


@pytest.fixture(autouse=True)
def _registered():
    register_all_modules(init_default_scope=True)


def test_a_detector_is_converted_computes_the_same_and_is_measured():
    row = table.in_a_process(retinanet(type="BN"))
    # the stem; two blocks of two layers in each of two stages; the projection of the second
    assert row["layers"] == row["converted"] == 1 + 2 * 2 * 2 + 1
    assert row["filters"] == 8 + 4 * 8 + 4 * 16 + 16
    assert (row["dtype"], row["size"]) == ("float32", 128)
    assert row["difference"] < 1e-5
    assert row["flops"] > 0
    assert "failed" not in row


def test_what_rounding_could_have_done_is_compared_in_float64(monkeypatch):
    monkeypatch.setattr(table, "ROUNDING", -1.0)  # below any difference, also none
    row = table.in_a_process(retinanet(type="BN"))
    assert row["dtype"] == "float64"
    assert row["difference"] < 1e-13


def test_second_stages_get_few_proposals():
    model = {
        "test_cfg": {"rpn": {"nms_pre": 1000, "max_per_img": 1000}, "rcnn": {"max_per_img": 9}}
    }
    few = table.few_proposals({"heads": [model]})["heads"][0]["test_cfg"]
    assert few == {"rpn": {"nms_pre": 1000, "max_per_img": 20}, "rcnn": {"max_per_img": 9}}
    assert model["test_cfg"]["rpn"]["max_per_img"] == 1000


def test_where_no_head_can_be_called_features_are_compared(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not on this device")

    monkeypatch.setattr("mmdet.models.dense_heads.RetinaHead.forward", broken)
    row = table.in_a_process(retinanet(type="BN"))
    assert (row["of"], row["size"]) == ("features", 512)
    assert row["difference"] < 1e-5
    assert row["failed"] == "measure"
    assert "not on this device" in row["why"]


def test_what_would_not_be_the_same_is_seen(monkeypatch):
    def kept(beta, *shifts):
        return beta  # so that the network is lifted by alpha

    for module in ("convert", "layers"):  # in converting and in loading
        monkeypatch.setattr(f"psbn_mmdet.norm.{module}.rebase", kept)
    assert table.in_a_process(retinanet(type="BN"))["difference"] > 1e-3


def test_a_network_without_batch_norm_has_nothing_to_convert():
    assert table.in_a_process(retinanet(type="GN", num_groups=4)) == {"layers": 0}


def test_what_fails_is_told_and_harms_no_other():
    broken = table.in_a_process({**retinanet(type="BN"), "type": "NoSuchDetector"})
    assert broken["failed"] == "build"
    assert "NoSuchDetector" in broken["why"]
    assert table.in_a_process(retinanet(type="BN"), limit=0)["failed"] == "time"


def test_a_process_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(table, "check", lambda model: sys.exit(3))
    assert table.in_a_process({})["why"] == "ended with exit code 3"


def test_weights_are_not_downloaded():
    model = {
        "backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}},
        "neck": [{"pretrained": "open-mmlab://x", "init_cfg": {"type": "Xavier"}}],
    }
    wanted = {"backbone": {}, "neck": [{"init_cfg": {"type": "Xavier"}}]}
    assert table._without_weights(model) == wanted


ROWS = {
    "a/1.py": {"layers": 3, "converted": 3, "difference": 1e-15, "filters": 9, "flops": 5},
    "a/2.py": {"same_as": "a/1.py"},
    "a/3.py": {"no_model": True},
    "b/1.py": {"layers": 3, "converted": 3, "difference": 0.5, "of": "features", "flops": 5},
    "b/2.py": {"layers": 0},
    "b/3.py": {"layers": 3, "failed": "convert", "why": "ValueError: | no"},
    "b/4.py": {"failed": "build", "why": "KeyError: x"},
}


def test_counts():
    assert table.summarize(ROWS) == {
        "configs": 7,
        "models": 5,
        "built": 4,
        "with_batch_norm": 3,
        "converted": 2,
        "compared": 2,
        "features_alone": 1,
        "same": 1,
        "largest_difference": 0.5,
        "measured": 2,
    }


def test_markdown_names_each_family_and_what_is_not_as_it_should_be():
    result = {"summary": table.summarize(ROWS), "rows": ROWS, "mmdet": "3", "torch": "2"}
    text = table.markdown({**result, "machine": "m"})
    assert "| a | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in text
    assert "| b | 4 | 3 | 2 | 1 | 1 | 0 | 1 |" in text
    assert "| b/1.py | compare | differs by 5.0e-01 |" in text
    assert "| b/3.py | convert | ValueError: \\| no |" in text
    assert "| a/1.py |" not in text


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mmdet_configs", *args, "--out", str(tmp_path)])
        try:
            table.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, json.loads((tmp_path / "results.json").read_text())

    return run


def test_the_command_continues_where_it_was(command, monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(table, "in_a_process", lambda model: checked.append(model) or {"layers": 0})
    first = command("--configs", "retinanet/retinanet_r18*")
    assert first[1]["summary"]["models"] == len(checked) == 2
    assert command("--configs", "retinanet/retinanet_r18*") == first
    assert len(checked) == 2
    assert (tmp_path / "results.md").exists()


def test_bad_input_is_one_line(command):
    assert command("--configs", "no/such*") == (
        2,
        "mmdet_configs: no config of mmdet matches no/such*\n",
    )


def test_the_published_table_is_that_of_the_published_rows():
    folder = Path(table.__file__).parent
    result = json.loads((folder / "results.json").read_text())
    s = result["summary"]
    assert s == table.summarize(result["rows"])
    assert (folder / "results.md").read_text() == table.markdown(result)
    assert s["converted"] == s["with_batch_norm"]
    assert s["same"] == s["compared"] > 0.99 * s["with_batch_norm"]
    said = " ".join((ROOT / "docs" / "train.md").read_text().split())
    for words in (
        f"[{s['models']} distinct models](../studies/mmdet_configs/results.md); {s['built']} build",
        f"All {s['with_batch_norm']} with a BatchNorm convert. {s['compared']} could be",
        f"({s['features_alone']} of them by the features",
        f"Filters and FLOPs of {s['measured']} could be measured",
    ):
        assert words in said
