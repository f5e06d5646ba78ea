"""The newest checkpoint of a work dir is that of the highest number that is whole."""

import os

import pytest
import torch
from torch import nn

from psbn_mmdet.checkpoint import CheckpointError, is_whole, latest_whole


def test_the_number_decides_and_not_the_time(tmp_path):
    assert latest_whole(tmp_path) is None
    for number in (10, 2, 9):
        torch.save(nn.Linear(9, 9).state_dict(), tmp_path / f"epoch_{number}.pth")
        os.utime(tmp_path / f"epoch_{number}.pth", (100 - number, 100 - number))
    torch.save({}, tmp_path / "best_coco_epoch_11.pth")
    assert latest_whole(tmp_path) == tmp_path / "epoch_10.pth"
    data = (tmp_path / "epoch_10.pth").read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):  # killed while writing
        (tmp_path / "epoch_10.pth").write_bytes(data[:length])
        assert not is_whole(tmp_path / "epoch_10.pth")
        assert latest_whole(tmp_path) == tmp_path / "epoch_9.pth"


@pytest.mark.parametrize(("iterations", "newest"), [(200, "epoch_3"), (400, "iter_400")])
def test_between_epochs_and_iterations_what_they_say_decides(iterations, newest, tmp_path):
    torch.save({"meta": {"epoch": 3, "iter": 300}}, tmp_path / "epoch_3.pth")
    torch.save({"meta": {"epoch": 1, "iter": 100}}, tmp_path / "epoch_1.pth")
    torch.save({"meta": {"epoch": 0, "iter": iterations}}, tmp_path / f"iter_{iterations}.pth")
    assert latest_whole(tmp_path) == tmp_path / f"{newest}.pth"
    torch.save({"a": torch.ones(1)}, tmp_path / "epoch_9.pth")
    with pytest.raises(CheckpointError, match=r"epoch_9.pth: does not say at which iteration"):
        latest_whole(tmp_path)
