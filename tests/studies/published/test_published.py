"""Published networks: counts against bare torch, absent and wrong files, table and figure."""

import hashlib
import json
import shutil

import pytest
import torch

from studies.published import __main__ as published
from tests.helpers.paths import ROOT

RESULTS = ROOT / "studies" / "published" / "results"
LISTED = json.loads(published.LISTED.read_text())


def test_every_entry_says_where_it_is_from_and_whose_it_is():
    assert len({entry["file"] for entry in LISTED}) == len(LISTED)
    for entry in LISTED:
        assert {"sha256", "licence", "network", "activation", "optimizer"} <= set(entry)
        assert len(entry["sha256"]) in (8, 64)  # the zoos name eight digits
        assert published.url_of(entry).startswith("https://")
        if "commit" in entry:
            assert len(entry["commit"]) == 40


def test_counts_are_those_of_bare_torch(shared_data):
    folder = shared_data / "checkpoints"
    published_rows = json.loads((RESULTS / "published.json").read_text())["checkpoints"]
    rows = [published.inspect(entry, folder) for entry in LISTED]
    assert rows == published_rows
    for row in rows:
        if row["filters"] is None:
            continue
        state = torch.load(folder / row["file"], map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        gammas = [
            state[key.replace("running_mean", "weight")]
            for key in state
            if key.endswith("running_mean")
        ]
        assert row["filters"] == sum(gamma.numel() for gamma in gammas)
        assert row["collapsed"] == sum(int((gamma.abs() < 1e-3).sum()) for gamma in gammas)


@pytest.fixture
def entry(tmp_path):
    """A network of four filters, two of them collapsed, and its place in a list."""
    norm = torch.nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([1.0, 9e-4, -9e-4, 2e-3])
    torch.save({"bn." + key: value for key, value in norm.state_dict().items()}, tmp_path / "a.pth")
    found = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    return dict(
        file="a.pth", url=(tmp_path / "a.pth").as_uri(), sha256=found[:8], licence="MIT",
        network="four filters", activation="ReLU", optimizer="SGD, momentum 0.9", weight_decay=1e-4,
    )  # fmt: skip


def test_command_writes_table_figure_and_json(entry, tmp_path, monkeypatch, capsys):
    listed = [entry, {**entry, "file": "absent.pth", "network": "absent"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    monkeypatch.setattr(published, "LISTED", tmp_path / "list.json")
    published.main(["--files", str(tmp_path), "--results", str(tmp_path / "results")])
    table = (tmp_path / "results" / "published.md").read_text()
    assert "1 of 2 checkpoints of the list were at hand" in table
    assert "| four filters | ReLU | SGD, momentum 0.9 | 0.0001 | 2 (50.0%) | 4 |" in table
    assert "| absent | ReLU | SGD, momentum 0.9 | 0.0001 | not inspected | - |" in table
    assert "| SGD | 1 | 50.0% | 50.0% | 50.0% |" in table
    png = tmp_path / "results" / "published.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(png) in capsys.readouterr().out


def test_fetched_file_is_kept_with_the_checksum_of_the_list_alone(entry, tmp_path):
    published.fetch(entry, tmp_path / "new")
    assert published.inspect(entry, tmp_path / "new")["collapsed"] == 2
    with pytest.raises(published.PsbnError, match="cannot be fetched"):
        published.fetch({**entry, "sha256": "0" * 8}, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_another_file_of_that_name_is_refused(entry, tmp_path):
    shutil.copy(__file__, tmp_path / "a.pth")
    with pytest.raises(published.PsbnError, match="is not the file of the list"):
        published.inspect(entry, tmp_path)


def test_folder_without_any_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        published.main(["--files", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds no checkpoint of the list; --fetch" in capsys.readouterr().err


def test_published_table_is_of_the_published_json():
    content = json.loads((RESULTS / "published.json").read_text())
    assert published.markdown(content) == (RESULTS / "published.md").read_text()
