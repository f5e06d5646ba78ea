"""A resumed training equals an uninterrupted one to the bit, or is refused."""

import random
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch.seeding import Draw, SeededBatchSampler, SeededDataset, seed_all
from tests.helpers.forked import train
from tests.helpers.noisy_training import equal, last, make_config


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("loop", "every", "killed_at"),
    [("epoch", None, 5), ("epoch", 3, 3), ("epoch", 1, 5), ("iter", 3, 3)],
    ids=["after an epoch", "within the first epoch", "within an epoch", "loop of iterations"],
)
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(
    processes, loop, every, killed_at, tmp_path
):
    """Flips, noise, dropout and order; the interrupted run has workers, the other none."""
    whole = make_config(tmp_path / "whole.py", loop, every=every)
    assert [e.status for e in train(whole, tmp_path / "whole", processes=processes)] == (
        [0] * processes
    )
    kill = [{"type": "Kill", "iteration": killed_at}]
    killed = make_config(tmp_path / "killed.py", loop, kill, every, workers=2)
    ended = train(killed, tmp_path / "killed", processes=processes)
    assert [e.status for e in ended] == [-9] * processes, ended[0].text
    assert not equal(last(tmp_path / "killed"), last(tmp_path / "whole"))

    resumed = make_config(tmp_path / "resumed.py", loop, every=every, workers=1)
    ended = train(resumed, tmp_path / "killed", "--resume", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text
    assert "resuming from" in ended[0].text
    assert equal(last(tmp_path / "killed"), last(tmp_path / "whole"))


@pytest.fixture(scope="module")
def within_an_epoch(tmp_path_factory):
    """The work dir of a run in one process that was killed after 2 of 4 iterations."""
    folder = tmp_path_factory.mktemp("within")
    kill = [{"type": "Kill", "iteration": 2}]
    train(make_config(folder / "a.py", hooks=kill, every=2), folder / "w")
    assert (folder / "w" / "iter_2.pth").exists()
    return folder / "w"


@pytest.mark.parametrize("change", ["processes", "batch size", "mmengine's own"])
def test_within_an_epoch_that_is_divided_otherwise_it_is_refused(change, within_an_epoch, tmp_path):
    work_dir = shutil.copytree(within_an_epoch, tmp_path / "w")
    options, processes = {"every": 2}, 1
    message = "after 2 batches of 4 images on 1 processes and 4 batches in an epoch, now there are"
    if change == "processes":
        processes, message = 2, f"{message} batches of 4 images on 2 processes and 2"
    elif change == "batch size":
        options["train_dataloader__batch_size"] = 8
    else:
        checkpoint = load(work_dir / "iter_2.pth")
        del checkpoint["meta"]["position"]
        torch.save(checkpoint, work_dir / "iter_2.pth")
        message = "was saved in the middle of epoch 1 and does not say where"
    before = (work_dir / "iter_2.pth").read_bytes()
    config = make_config(tmp_path / "a.py", **options)
    ended = train(config, work_dir, "--resume", processes=processes)
    assert ended[0].status == 2
    assert message in ended[0].text and "Traceback" not in ended[0].text
    assert (work_dir / "iter_2.pth").read_bytes() == before
    assert not (work_dir / "epoch_1.pth").exists()


def test_what_holds_weights_alone_is_no_checkpoint_to_resume(tmp_path):
    """The best checkpoint is one; so is every one of ``CheckpointHook(save_optimizer=False)``."""
    best = {
        "default_hooks__checkpoint__save_best": "mean",
        "default_hooks__checkpoint__rule": "less",
    }
    config = make_config(tmp_path / "a.py", epochs=1, validate=True, **best)
    assert train(config, tmp_path / "w")[0].status == 0
    (path,) = (tmp_path / "w").glob("best_*.pth")
    assert load(path)["meta"]["position"]["batches"] == 0
    config = make_config(tmp_path / "a.py", epochs=2)
    ended = train(config, tmp_path / "w", "--resume", path)
    assert ended[0].status == 2 and "Traceback" not in ended[0].text
    assert f"{path}: has no state of the optimizer or learning-rate schedule" in ended[0].text

    for loop in ("epoch", "iter"):
        leave_out = {"default_hooks__checkpoint__save_optimizer": False}
        config = make_config(tmp_path / "a.py", loop, epochs=1, **leave_out)
        assert train(config, tmp_path / loop)[0].status == 0
        ended = train(config, tmp_path / loop, "--resume")
        assert ended[0].status == 2 and "Traceback" not in ended[0].text
        assert "has no state of the optimizer" in ended[0].text


def test_after_an_epoch_the_next_may_be_divided_otherwise(tmp_path):
    config = make_config(tmp_path / "a.py", epochs=1)
    train(config, tmp_path / "w")
    config = make_config(tmp_path / "a.py", epochs=2)
    ended = train(config, tmp_path / "w", "--resume", processes=2)
    assert [e.status for e in ended] == [0, 0], ended[0].text
    assert load(tmp_path / "w" / "epoch_2.pth")["meta"]["iter"] == 4 + 2


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_seed_all_sets_every_generator_and_no_two_keys_draw_the_same():
    keys = [(5,), (6,), (0, 5), (5, 0, 1), (5, 1, 0), (2**31, 3)]
    draws = []
    for key in keys:
        seed_all(*key)
        draws.append(drawn())
        drawn()
        seed_all(*key)
        assert drawn() == draws[-1]
    for of_one_generator in zip(*draws, strict=True):
        assert len(set(of_one_generator)) == len(keys)


class Drawing:
    """A data set that returns what its transforms would draw."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, drawn()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_image_of_every_epoch_has_draws_of_its_own_that_nothing_before_changes(
    rank, monkeypatch
):
    monkeypatch.setattr("psbn_mmdet.launch.seeding.get_rank", lambda: rank)
    data = SeededDataset(Drawing())
    batches = SeededBatchSampler(SequentialSampler(range(6)), 2, seed=3)
    seen = {}
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        for number, batch in enumerate(batches):
            for place, draw in enumerate(batch):
                seen[epoch, number, place] = data[draw]
                assert draw == Draw(2 * number + place, (3, epoch, number, place, rank))
    assert len({numbers for _, numbers in seen.values()}) == 12
    batches.set_epoch(1)
    batches.skip = 2  # the third batch of the second epoch, and nothing before it
    (last_batch,) = list(batches)
    assert [data[draw] for draw in last_batch] == [seen[1, 2, 0], seen[1, 2, 1]]
    assert len(list(batches)) == 3  # the epoch after is whole


def test_a_seeded_data_set_is_the_one_it_holds_to_whoever_asks():
    data = SeededDataset(Drawing())
    data.pipeline = "switched"  # as hooks do that end an augmentation
    assert data._dataset.pipeline == data.pipeline == "switched"
    assert len(data) == 6 and data[4][0] == 4
