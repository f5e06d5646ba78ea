"""tools/inspect_checkpoint.py and tools/convert_checkpoint.py, mostly as a user runs them."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from psbn_mmdet import norm
from psbn_mmdet.collapse import measure
from tests.helpers.collapsed_net import CONSTANT, DEAD, VARIANTS, Net, collapse_by_hand
from tests.helpers.disk import files_no_larger_than
from tests.helpers.tools import TOOLS, Main

FIRST_LINE = "8 of 28 filters collapsed (28.57%)"


def tool(name, *args):
    command = [sys.executable, str(TOOLS / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def inspect(capsys):
    return Main("inspect_checkpoint", capsys)


@pytest.fixture
def convert(capsys):
    return Main("convert_checkpoint", capsys)


@pytest.fixture
def net():
    return collapse_by_hand(Net())


class TestInspect:
    def test_as_a_program_it_prints_ranked_layers_and_the_totals(self, net, tmp_path):
        torch.save({"state_dict": net.state_dict(), "meta": {}}, tmp_path / "a.pth")
        done = tool("inspect_checkpoint.py", tmp_path / "a.pth", "--fail-above", 20)
        lines = done.stdout.splitlines()
        assert lines[0] == FIRST_LINE
        head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
        ranked = [line.split()[0] for line in lines[head + 1 : head + 5]]
        assert ranked == ["bn1", "block.down.1", "block.bn1", "block.bn2"]
        assert lines[-2].split(maxsplit=3)[3] == (
            f"psbn inspect {tmp_path / 'a.pth'} --config CONFIG --data IMAGES"
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "28.57% of the filters collapsed, more than 20%" in done.stderr

    @pytest.mark.parametrize(("collapsed", "last"), [(0, "do."), (1, "below 5%"), (2, "Python")])
    def test_what_to_do_depends_on_how_many_have_collapsed(
        self, collapsed, last, tmp_path, inspect
    ):
        norm = torch.nn.BatchNorm2d(40)
        with torch.no_grad():
            norm.weight[:collapsed] = 0  # 0%, 2.5%, 5%
        torch.save(norm.state_dict(), tmp_path / "a.pth")
        assert last in inspect(tmp_path / "a.pth").stdout.splitlines()[-1]

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_kind_of_layer_gives_the_filters_collapsed_by_hand(
        self, net, variant, tmp_path, inspect
    ):
        torch.save(VARIANTS[variant](net).state_dict(), tmp_path / "a.pth")
        done = inspect(tmp_path / "a.pth", "--json", tmp_path / "a.json")
        assert done.returncode == 0
        assert FIRST_LINE in done.stdout.splitlines()
        found = json.loads((tmp_path / "a.json").read_text())["checkpoints"][0]
        sets = {row["name"]: row["collapsed_filters"] for row in found["layers"]}
        assert sets == {name: sorted(DEAD[name] + CONSTANT[name]) for name in DEAD}

    @pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict", None])
    def test_state_dicts_are_found_where_projects_put_them(self, net, place, tmp_path, inspect):
        sd = net.state_dict()
        torch.save({place: sd, "epoch": 3} if place else sd, tmp_path / "a.pt")
        assert FIRST_LINE in inspect(tmp_path / "a.pt").stdout.splitlines()

    def test_safetensors(self, net, tmp_path, inspect):
        save_file(net.state_dict(), tmp_path / "a.safetensors")
        assert FIRST_LINE in inspect(tmp_path / "a.safetensors").stdout.splitlines()

    def test_an_url(self, net, tmp_path, inspect, monkeypatch):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        fetched = []

        def fetch(url, path, *_):
            fetched.append(url)
            Path(path).write_bytes((tmp_path / "a.pth").read_bytes())

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        done = inspect("https://example.org/weights/a.pth")
        assert fetched == ["https://example.org/weights/a.pth"]
        assert FIRST_LINE in done.stdout.splitlines()

    def test_several_give_the_course(self, net, tmp_path, inspect):
        torch.save(Net().state_dict(), tmp_path / "1.pth")
        torch.save(net.state_dict(), tmp_path / "2.pth")
        lines = inspect(tmp_path / "1.pth", tmp_path / "2.pth", "--layers", 2).stdout.splitlines()
        assert ["bn1", "0.0", "37.5"] in [line.split() for line in lines]
        assert "... and 2 more layers (--layers 0 shows all)" in lines
        assert "0 of 28 filters collapsed (0.00%)" in lines
        assert FIRST_LINE in lines

    def test_the_threshold(self, net, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        done = inspect(tmp_path / "a.pth", "--threshold", "2.5e-5")
        # By hand |gamma| = 1e-5 (i + 1): below 2.5e-5 it is filter 0 alone.
        assert "1 of 28 filters collapsed (3.57%)" in done.stdout

    @pytest.mark.parametrize(("percent", "status"), [(28.5, 1), (28.6, 0), (100, 0)])
    def test_fail_above_is_the_exit_status(self, net, percent, status, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        assert inspect(tmp_path / "a.pth", "--fail-above", percent).returncode == status


@pytest.mark.parametrize("percent", [0, 100])
def test_values_that_are_not_finite_fail_whatever_is_allowed(net, percent, tmp_path, inspect):
    with torch.no_grad():
        for name in DEAD:
            net.get_submodule(name).weight.fill_(torch.nan)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    done = inspect(tmp_path / "a.pth", "--fail-above", percent)
    assert done.returncode == 1
    message = "28 of 28 filters have a NaN or infinite gamma or bias"
    assert done.stderr == f"inspect_checkpoint.py: {tmp_path / 'a.pth'}: {message}\n"
    assert message in done.stdout
    torch.save(Net().state_dict(), tmp_path / "b.pth")
    done = inspect(tmp_path / "b.pth", tmp_path / "a.pth")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["bn1", "0.0", "nan"] in rows


def test_a_gamma_that_cannot_be_read_fails_whatever_is_allowed(net, tmp_path, inspect):
    tensors = net.state_dict()
    tensors["bn1.weight"] = tensors["bn1.weight"].to(torch.int8)
    torch.save(tensors, tmp_path / "a.pth")
    done = inspect(tmp_path / "a.pth", "--fail-above", 100)
    assert done.returncode == 1
    assert "1 layers cannot be read (e.g. bn1: its gamma is stored as torch.int8" in done.stderr


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(96, 96), keep_ratio=False),
        dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
    ]
    cfg = Config(
        dict(
            model=dict(
                type="RetinaNet",
                data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
                backbone=dict(type="ResNet", depth=18, base_channels=8, norm_eval=False),
                neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
                bbox_head=dict(
                    type="RetinaHead", num_classes=3, in_channels=8, feat_channels=8,
                    stacked_convs=1,
                    anchor_generator=dict(
                        type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3,
                        ratios=[1.0], strides=[8, 16, 32, 64, 128]),
                    bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
                    loss_cls=dict(type="FocalLoss", use_sigmoid=True),
                    loss_bbox=dict(type="L1Loss")),
                test_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=10),
            ),
            test_dataloader=dict(dataset=dict(pipeline=pipeline)),
            default_scope="mmdet",
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    model = MODELS.build(cfg.model)
    with torch.no_grad():
        model.backbone.layer1[0].bn1.bias[:3] = -99  # never fires
        model.backbone.layer1[0].bn2.weight.normal_()
        model.backbone.layer1[0].bn2.weight[5] = 0
    cfg.dump(folder / "config.py")
    content = {"state_dict": model.state_dict(), "meta": {"cfg": cfg.pretty_text}}
    torch.save(content, folder / "a.pth")
    return folder


class TestImages:
    """A small detector of mmdet, measured on real images with its own or a given config."""

    @pytest.mark.parametrize("given", [True, False])
    def test_what_the_filters_do_is_measured(self, given, detector, shared_data, tmp_path, inspect):
        config = ["--config", detector / "config.py"] if given else []
        done = inspect(
            detector / "a.pth", *config, "--data", shared_data / "coco128" / "val2017",
            "--images", 2, "--json", tmp_path / "a.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert " filters stuck (" in done.stdout
        (entry,) = json.loads((tmp_path / "a.json").read_text())["checkpoints"]
        rows = {row["name"]: row for row in entry["layers"]}
        assert rows["backbone.layer1.0.bn1"]["stuck_filters"][:3] == [0, 1, 2]
        assert rows["backbone.layer1.0.bn2"]["idle_filters"] == [5]
        assert rows["backbone.layer1.0.bn2"]["conv"] == "backbone.layer1.0.conv2"
        assert entry["macs"]["total"] > 0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model = dict(type='os.system', command='touch ran')", "builds 'os.system'"),
            ("model = dict(type='RetinaNet', nms=dict(type='print(1)'))", "builds 'print"),
            ("model = dict(type='RetinaNet', _scope_='evil')", "builds 'evil'"),
            ("import os\nmodel = 1", "more than plain values"),
            ("model = open('x')", "more than plain values (a call in line 1)"),
            ("model = dict(", "more than plain values"),
            (None, "contains no config; add --config"),
        ],
    )
    def test_nothing_that_a_config_carried_says_is_run(
        self, text, message, net, tmp_path, inspect, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        torch.save({"state_dict": net.state_dict(), "meta": {"cfg": text}}, tmp_path / "a.pth")
        assert message in inspect.refuses(tmp_path / "a.pth", "--data", tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_a_config_alone_says_what_is_missing(self, net, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        assert "--data FOLDER" in inspect.refuses(tmp_path / "a.pth", "--config", "c.py")


def test_layers_that_only_one_checkpoint_has_are_marked(net, tmp_path, inspect):
    torch.save(net.state_dict(), tmp_path / "1.pth")
    torch.save({k: v for k, v in net.state_dict().items() if "block" not in k}, tmp_path / "2.pth")
    lines = inspect(tmp_path / "1.pth", tmp_path / "2.pth").stdout.splitlines()
    rows = [line.split() for line in lines]
    assert ["bn1", "37.5", "37.5"] in rows
    assert ["block.bn1", "25.0", "-"] in rows
    message = inspect.refuses(*(tmp_path / f"{i}.pth" for i in "12"), "--html", tmp_path / "a.html")
    assert "has other layers than 1.pth" in message
    assert not (tmp_path / "a.html").exists()


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestInspectBadInput:
    def test_a_file_that_is_missing_or_no_checkpoint(self, tmp_path, inspect):
        assert "no such file" in inspect.refuses(tmp_path / "none.pth")
        for content in (b"", b"hello, this is text\n", os.urandom(4096), b"PK\x03\x04" + bytes(60)):
            (tmp_path / "a.pth").write_bytes(content)
            assert str(tmp_path / "a.pth") in inspect.refuses(tmp_path / "a.pth")

    def test_a_checkpoint_that_was_cut_off(self, net, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        content = (tmp_path / "a.pth").read_bytes()
        (tmp_path / "a.pth").write_bytes(content[: len(content) // 2])
        assert str(tmp_path / "a.pth") in inspect.refuses(tmp_path / "a.pth")

    @pytest.mark.parametrize("writer", ["torch", "pickle"])
    def test_a_pickle_that_carries_code_is_refused_and_nothing_runs(self, net, writer, tmp_path):
        content = {"state_dict": net.state_dict(), "evil": Evil(tmp_path / "ran")}
        if writer == "torch":
            torch.save(content, tmp_path / "a.pth")
        else:
            (tmp_path / "a.pth").write_bytes(pickle.dumps(content))
        done = tool("inspect_checkpoint.py", tmp_path / "a.pth")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert not (tmp_path / "ran").exists()

    def test_no_norm_layer(self, tmp_path, inspect):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
        message = inspect.refuses(tmp_path / "a.pth")
        assert "a.pth: no normalization layer found" in message

    def test_wrong_numbers(self, net, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        message = inspect.refuses(tmp_path / "a.pth", "--threshold", "-1")
        assert "must not be negative" in message
        message = inspect.refuses(tmp_path / "a.pth", "--fail-above", "101")
        assert "percentage from 0 to 100" in message
        assert "wanted 0 or more" in inspect.refuses(tmp_path / "a.pth", "--layers", "-3")

    @pytest.mark.parametrize("option", ["--json", "--html"])
    def test_nothing_is_overwritten(self, net, option, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        content = (tmp_path / "a.pth").read_bytes()
        message = inspect.refuses(tmp_path / "a.pth", option, tmp_path / "a.pth")
        assert "exists already" in message
        assert (tmp_path / "a.pth").read_bytes() == content

    @pytest.mark.parametrize("option", ["--json", "--html"])
    def test_unless_it_is_asked_for(self, net, option, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        out = tmp_path / "out"
        out.write_text("old")
        assert inspect(tmp_path / "a.pth", option, out, "--overwrite").returncode == 0
        assert "collapsed" in out.read_text()
        assert "there is no folder" in inspect.refuses(tmp_path / "a.pth", option, out / "a" / "b")

    def test_two_outputs_of_one_name(self, net, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        (tmp_path / "link").symlink_to(tmp_path)
        out = [tmp_path / "out", tmp_path / "link" / "out"]
        message = inspect.refuses(tmp_path / "a.pth", "--json", out[0], "--html", out[1])
        assert "name two files" in message

    @pytest.mark.parametrize("option", ["--json", "--html"])
    def test_a_full_disk_loses_nothing(self, net, option, tmp_path, inspect):
        torch.save(net.state_dict(), tmp_path / "a.pth")
        out = tmp_path / "out"
        out.write_text("old")
        with files_no_larger_than(100):
            message = inspect.refuses(tmp_path / "a.pth", option, out, "--overwrite")
        assert f"{out}: cannot be written (File too large)" in message
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "out"]
        assert out.read_text() == "old"


@pytest.mark.slow
def test_every_layer_of_resnet152_is_found_with_its_convolution():
    from mmdet.models.backbones import ResNet

    report = measure(ResNet(depth=152).state_dict())
    # 64 + per stage blocks * (2 planes + 4 planes) + shortcut 4 planes
    want = 64 + sum(
        blocks * 6 * planes + 4 * planes
        for blocks, planes in [(3, 64), (8, 128), (36, 256), (3, 512)]
    )
    assert report.totals["filters"] == want
    assert len(report.layers) == 155
    assert all(layer.conv is not None for layer in report.layers)


class TestConvert:
    def written(self, path):
        return torch.load(path, weights_only=True)

    def test_there_and_back_the_network_computes_the_same(self, net, tmp_path, convert):
        with torch.no_grad():
            net.train()(torch.randn(8, 3, 6, 6))  # running statistics of their own
        bn, ps, back = (tmp_path / f"{n}.pth" for n in ("bn", "ps", "back"))
        torch.save({"state_dict": net.state_dict(), "meta": {"epoch": 2}}, bn)
        done = tool("convert_checkpoint.py", bn, ps, "--to", "psbn")
        assert (done.returncode, done.stderr) == (0, "")
        assert "4 layers are now psBN with alpha 0.1" in done.stdout
        assert self.written(ps)["meta"] == {"epoch": 2}
        psnet = norm.to_psbn(Net())
        psnet.load_state_dict(self.written(ps)["state_dict"])
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(psnet.eval()(x), net.eval()(x))

        done = convert(ps, back, "--to", "bn")
        assert "4 layers are now BN" in done.stdout
        plain = Net()
        plain.load_state_dict(self.written(back)["state_dict"])
        assert torch.equal(plain.eval()(x), psnet(x))

    def test_training_state_is_dropped_or_kept_as_asked(self, net, tmp_path, convert):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        net(torch.randn(2, 3, 6, 6)).sum().backward()
        optimizer.step()
        content = {
            "meta": {},
            "state_dict": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema_state_dict": {
                "steps": torch.tensor(3),
                **{"module." + k: v for k, v in net.state_dict().items()},
            },
        }
        torch.save(content, tmp_path / "bn.pth")
        done = convert(tmp_path / "bn.pth", tmp_path / "a.pth", "--to=psbn")
        assert set(self.written(tmp_path / "a.pth")) == {"meta", "state_dict"}
        assert "dropped (training state): optimizer, ema_state_dict" in done.stdout

        args = ["--to=psbn", "--keep-training-state", "--alpha=0.25"]
        convert(tmp_path / "bn.pth", tmp_path / "b.pth", *args)
        kept = self.written(tmp_path / "b.pth")
        psnet = norm.to_psbn(Net(), alpha=0.25)
        psnet.load_state_dict(kept["state_dict"])
        psoptimizer = torch.optim.SGD(psnet.parameters(), 0.1, momentum=0.9)
        psoptimizer.load_state_dict(kept["optimizer"])
        for ours, theirs in zip(psnet.parameters(), net.parameters(), strict=True):
            mine = psoptimizer.state[ours]["momentum_buffer"]
            assert torch.equal(mine, optimizer.state[theirs]["momentum_buffer"])
        assert kept["ema_state_dict"]["module.bn1.alpha"] == 0.25
        assert "module.bn1.beta" in kept["ema_state_dict"]

    def test_safetensors_both_ways(self, net, tmp_path, convert):
        save_file(net.state_dict(), tmp_path / "bn.safetensors")
        args = [tmp_path / "bn.safetensors", tmp_path / "ps.safetensors", "--to", "psbn"]
        assert convert(*args).returncode == 0
        norm.to_psbn(Net()).load_state_dict(load_file(tmp_path / "ps.safetensors"))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["bn.pth", "bn.pth", "--to=psbn"], "exists already"),
            (["bn.pth", "new.pth", "--to=bn"], "holds no psBN layer"),
            (["bn.pth", "new.pth", "--to=psbn", "--alpha=-1"], "not negative"),
            (["bn.pth", "none/new.pth", "--to=psbn"], "there is no folder"),
            (["bn.pth", "a.safetensors", "--to=psbn", "--keep-training-state"], "use .pth"),
            (["text.pth", "new.pth", "--to=psbn"], "text.pth"),
        ],
    )
    def test_bad_input_is_one_line_and_loses_nothing(
        self, net, args, message, tmp_path, monkeypatch, convert
    ):
        torch.save(net.state_dict(), tmp_path / "bn.pth")
        (tmp_path / "text.pth").write_text("hello")
        content = (tmp_path / "bn.pth").read_bytes()
        monkeypatch.chdir(tmp_path)
        assert message in convert.refuses(*args)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bn.pth", "text.pth"]
        assert (tmp_path / "bn.pth").read_bytes() == content
