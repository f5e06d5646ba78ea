"""A run that gets SIGTERM saves, says so by its status, and goes on exactly."""

import os
import signal
import time

import psutil
import pytest
import torch

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch.preempt import PREEMPTED, Preemption
from tests.helpers.forked import Process, free_port, slurm, train
from tests.helpers.noisy_training import equal, last, make_config
from tests.helpers.slurm import until

POINTS = [
    ("before_run", 1),
    ("before_train", 1),
    ("before_train_epoch", 1),
    ("before_train_iter", 1),
    ("before_train_iter", 3),
    ("after_train_iter", 3),
    ("before_save_checkpoint", 1),
    ("after_train_epoch", 1),
    ("before_val", 1),
    ("after_val_iter", 1),
    ("metrics", 1),
    ("after_val_epoch", 1),
    ("after_val", 1),
    ("before_train_epoch", 2),
    ("metrics", 3),
]
TOGETHER = [
    ("after_train_iter", 3),
    ("after_val_iter", 1),
    ("metrics", 1),
    ("before_train_epoch", 2),
]
OPTIONS = {"validate": True, "workers": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Config and end of a training in so many processes that nothing disturbs."""
    folder, ends = tmp_path_factory.mktemp("whole"), {}

    def end(processes):
        if processes not in ends:
            config = make_config(folder / "a.py", hooks=[EMA], **OPTIONS)
            ended = train(config, folder / str(processes), processes=processes)
            assert [e.status for e in ended] == [0] * processes, ended[0].text
            ends[processes] = config, last(folder / str(processes))
        return ends[processes]

    return end


@pytest.mark.parametrize(
    ("point", "call", "processes"),
    [
        *((*point, 1) for point in POINTS),
        # Two processes take half a minute each: where ranks could part, in a step and in metrics.
        *(pytest.param(*point, 2, marks=pytest.mark.slow) for point in TOGETHER),
    ],
)
def test_wherever_a_sigterm_comes_the_run_can_go_on(point, call, processes, whole, tmp_path):
    """It ends with the status that has it requeued, and resumed it is as if it had not ended."""
    config, uninterrupted = whole(processes)
    hook = {"type": "TerminateIn", "point": point, "call": call}
    stopped = make_config(tmp_path / "a.py", hooks=[EMA, hook], **OPTIONS)
    ended = train(stopped, tmp_path / "w", processes=processes)
    assert [e.status for e in ended] == [PREEMPTED] * processes, [e.text[-900:] for e in ended]
    assert all("Traceback" not in e.text for e in ended), [e.text[-900:] for e in ended]
    started = (tmp_path / "w" / "run.json").exists()
    assert started or (call == 1 and point.startswith("before_"))
    ended = train(config, tmp_path / "w", "--resume", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text[-900:]
    assert equal(last(tmp_path / "w"), uninterrupted)


def test_a_process_that_waits_for_others_ends_at_once(tmp_path):
    """Python's own handler would run when the wait is over, in half an hour."""
    config = make_config(tmp_path / "a.py")
    line = [config, "--work-dir", tmp_path / "w", "--launcher", "slurm"]
    process = Process("train", line, slurm(2, MASTER_PORT=free_port())[0], tmp_path / "log")
    until(lambda: psutil.Process(process.process.pid).num_threads() > 2)  # of the store
    time.sleep(0.5)
    process.process.terminate()
    ended = process.end(seconds=20)
    assert ended.status == PREEMPTED, ended.text
    assert "there is nothing to save" in ended.text


EMA = {"type": "EMAHook", "ema_type": "ExponentialMovingAverage", "momentum": 0.3}


def interrupted_and_whole(folder, processes, terminate, **options):
    """Train once through and once with a SIGTERM; what the latter saved, and its messages.

    Asserts that resuming that one gives the same as the former.
    """
    hooks = options.pop("hooks", [])
    whole = make_config(folder / "whole.py", hooks=hooks, **options)
    ended = train(whole, folder / "whole", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text

    stopped = make_config(
        folder / "stopped.py", hooks=[*hooks, {"type": "Terminate", **terminate}], **options
    )
    ended = train(stopped, folder / "w", processes=processes)
    assert [e.status for e in ended] == [PREEMPTED] * processes, ended[0].text
    saved = load(folder / "w" / "preempted.pth")
    text = ended[0].text
    assert f"saved {folder}/w/preempted.pth at iteration {saved['meta']['iter']} " in text
    assert all("Traceback" not in e.text for e in ended)

    ended = train(whole, folder / "w", "--resume", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text
    assert f"resuming from {folder}/w/preempted.pth" in ended[0].text
    assert equal(last(folder / "w"), last(folder / "whole"))
    assert not (folder / "w" / "preempted.pth").exists()  # it has done its work
    return saved, text, ended[0].text


def test_sigterm_to_a_step_and_its_workers(tmp_path):
    saved, *_ = interrupted_and_whole(tmp_path, 1, {"iteration": 6}, workers=2)
    assert saved["meta"]["iter"] == 6  # within the second epoch of four iterations


def test_sigterm_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path):
    saved, *_ = interrupted_and_whole(tmp_path, 2, {"iteration": 3, "ranks": [1]})
    assert saved["meta"]["iter"] == 3


def test_accumulated_gradients_are_used_before_the_run_ends(tmp_path):
    """No checkpoint holds them."""
    options = {"optim_wrapper__accumulative_counts": 2}
    saved, *_ = interrupted_and_whole(tmp_path, 1, {"iteration": 5}, **options)
    assert saved["meta"]["iter"] == 6


def test_sigterm_in_a_validation_saves_the_raw_weights_and_not_the_averaged(tmp_path):
    at = {"iteration": 4, "validation": True}
    saved, text, resumed = interrupted_and_whole(tmp_path, 1, at, hooks=[EMA], validate=True)
    assert "the validation was interrupted" in text
    assert resumed.count("Epoch(val) [1]") == 1 and "Epoch(train) [1]" not in resumed
    epoch = load(tmp_path / "w" / "epoch_1.pth")
    weights, averaged = saved["state_dict"], epoch["ema_state_dict"]
    assert equal(weights, epoch["state_dict"])
    assert not torch.equal(weights["fc.weight"], averaged["module.fc.weight"])


@pytest.mark.parametrize("newer", ["preempted.pth", "epoch_1.pth"])
def test_resume_takes_whichever_has_seen_more(newer, tmp_path):
    stop = [{"type": "Terminate", "iteration": 6 if newer == "preempted.pth" else 2}]
    train(make_config(tmp_path / "a.py", hooks=stop), tmp_path / "w")
    if newer == "epoch_1.pth":  # and it was written first: times say nothing
        train(make_config(tmp_path / "b.py", epochs=1), tmp_path / "b")
        epoch = load(tmp_path / "b" / "epoch_1.pth")
        epoch["meta"]["run"] = load(tmp_path / "w" / "preempted.pth")["meta"]["run"]
        torch.save(epoch, tmp_path / "w" / "epoch_1.pth")
    ended = train(make_config(tmp_path / "c.py"), tmp_path / "w", "--resume")
    assert f"resuming from {tmp_path}/w/{newer}\n" in ended[0].text


def test_a_second_sigterm_does_not_change_the_status_of_what_has_saved(tmp_path):
    """A launcher sends it to the other ranks as soon as one has ended."""

    def ended(signal_, frame):
        raise AssertionError("SIGTERM ended what had saved")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        preemption = Preemption(tmp_path)
        preemption.asked = True
        with pytest.raises(SystemExit), preemption:
            raise SystemExit(PREEMPTED)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, ended)
        with Preemption(tmp_path):
            pass
        assert signal.getsignal(signal.SIGTERM) is ended
        with pytest.raises(ValueError, match="another"), Preemption(tmp_path):
            raise ValueError("another")
        assert signal.getsignal(signal.SIGTERM) is ended
    finally:
        signal.signal(signal.SIGTERM, before)
