"""The newest checkpoint of a run in a folder is the one of the highest iteration that is whole."""

import os
import random

import pytest
import torch

from psbn_mmdet.checkpoint import CheckpointError, is_whole, latest_whole


def save(path, iteration=None, run=None, optimizer=True):
    meta = {"meta": {"iter": iteration, "run": run}} if iteration is not None else {}
    torch.save({"a": torch.ones(9), **meta, **({"optimizer": {}} if optimizer else {})}, path)


def found(*args, **kwargs):
    saved = latest_whole(*args, **kwargs)
    return saved and saved.path.name


@pytest.mark.parametrize("seed", range(20))
def test_what_checkpoints_say_decides_and_not_their_names_and_times(seed, tmp_path):
    """Of random files of two runs, some cut off, against a search through all of them."""
    rng = random.Random(seed)
    wanted = []
    for name in rng.sample(["epoch_{}.pth", "iter_{}.pth", "x{}y.pth", "w.pth", "best_{}.pth"], 4):
        for number in rng.sample(range(30), 3):
            path = tmp_path / name.format(number)
            iteration, run = 10 * number + rng.randrange(10), rng.choice("ab")
            save(path, iteration, run)
            if whole := rng.random() < 0.6:
                os.utime(path, (rng.randrange(100),) * 2)
            else:
                data = path.read_bytes()
                path.write_bytes(data[: rng.randrange(len(data))])
            wanted = [w for w in wanted if w[1] != path.name]  # w.pth is written thrice
            if whole and run == "a" and not path.name.startswith("best"):
                wanted.append((iteration, path.name))
    assert found(tmp_path, "a") == (max(wanted)[1] if wanted else None)


def test_a_checkpoint_cut_off_anywhere_is_passed_over(tmp_path):
    save(tmp_path.with_suffix(".pth"), 99)  # beside the folder
    assert latest_whole(tmp_path) is None
    for number in (10, 2, 9):
        save(tmp_path / f"epoch_{number}.pth", number)
    assert found(tmp_path) == "epoch_10.pth"
    data = (tmp_path / "epoch_10.pth").read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):  # killed while writing
        (tmp_path / "epoch_10.pth").write_bytes(data[:length])
        assert not is_whole(tmp_path / "epoch_10.pth")
        assert found(tmp_path) == "epoch_9.pth"


def test_one_without_the_optimizer_comes_after_all_others(tmp_path):
    save(tmp_path / "epoch_3-published.pth", 30, optimizer=False)
    assert found(tmp_path) == "epoch_3-published.pth"
    save(tmp_path / "epoch_2.pth", 20)
    assert found(tmp_path) == "epoch_2.pth"


def test_where_none_says_whose_it_is(tmp_path):
    save(tmp_path / "epoch_3.pth", 300)
    save(tmp_path / "iter_200.pth", 200)
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_200.pth\n")
    assert found(tmp_path) == "epoch_3.pth"
    assert found(tmp_path, last=tmp_path / "last_checkpoint") == "iter_200.pth"
    assert found(tmp_path, "a") is None
    save(tmp_path / "epoch_9.pth")
    with pytest.raises(CheckpointError, match=r"epoch_9.pth: does not say at which iteration"):
        latest_whole(tmp_path)
    save(tmp_path / "epoch_9.pth", 900, "a")
    with pytest.raises(CheckpointError, match="holds checkpoints of several runs"):
        latest_whole(tmp_path)
