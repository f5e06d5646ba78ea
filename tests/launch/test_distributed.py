"""The process group of one job: its port, its members, and what they must agree on."""

import re
import shutil
import socket

import pytest
import torch
from mmengine.config import Config

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch import UsageError
from psbn_mmdet.launch.distributed import slurm_port, timeout
from tests.helpers.forked import Process, free_port, slurm, torchrun, train
from tests.helpers.noisy_training import equal, last, make_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("config") / "a.py", epochs=2)


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The end of an undisturbed training in two processes."""
    folder = tmp_path_factory.mktemp("reference")
    assert [e.status for e in train(config, folder, processes=2)] == [0, 0]
    return last(folder)


def one_line(ended):
    """The one line with which a process refused."""
    assert ended.status == 2, ended.text
    lines = ended.text.strip().splitlines()
    if torch.__version__ < "2.2":  # it tells of each socket that it could not have
        lines = [line for line in lines if not line.startswith(("[W socket", "[E socket"))]
    (line,) = lines
    assert line.startswith("train.py: ")
    return line


# -- the launcher ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "variable"),
    [("slurm", "SLURM_JOB_ID"), ("pytorch", "RANK"), ("mpi", "OMPI_COMM_WORLD_RANK")],
)
def test_outside_of_its_launcher_a_run_ends_in_a_line(launcher, variable, config, tmp_path):
    (ended,) = train(config, tmp_path, "--launcher", launcher)
    said = one_line(ended)
    assert f"--launcher {launcher}: {variable} is not set; " in said
    assert "start it with" in said


@pytest.mark.parametrize(
    ("scontrol", "message"),
    [
        (
            None,
            r"scontrol is not in the PATH of \S+, so the first of the hosts node\[01-02\] is unk",
        ),
        ("#!/bin/sh\necho no such nodes >&2\nexit 1\n", r"knows no hosts node\[01-02\]: no such"),
    ],
)
def test_the_first_host_is_needed(scontrol, message, config, tmp_path):
    environment = slurm(2, PATH=str(tmp_path))[0]
    del environment["MASTER_ADDR"]
    if scontrol:
        (tmp_path / "scontrol").write_text(scontrol)
        (tmp_path / "scontrol").chmod(0o755)
    (ended,) = train(config, tmp_path / "w", environments=[environment])
    assert re.search(message, one_line(ended))


def test_one_process_of_a_launcher_trains_as_without(config, tmp_path):
    """SyncBN would refuse a CPU in a group of one."""
    assert train(config, tmp_path / "a")[0].status == 0
    (ended,) = train(config, tmp_path / "b", environments=slurm(1))
    assert ended.status == 0, ended.text
    assert equal(last(tmp_path / "a"), last(tmp_path / "b"))


def test_steps_that_can_run_at_once_have_ports_of_their_own():
    ports = {slurm_port(job, step) for job in range(5000, 7125) for step in range(8)}
    assert len(ports) == 2125 * 8
    assert min(ports) > 1024 and max(ports) < 32768  # from there Linux gives them out itself


# -- another job at the same port --------------------------------------------------------------


def test_a_process_of_another_job_cannot_join_and_the_job_goes_on_without_it(
    config, reference, tmp_path
):
    """Its first rank waits for its second, and a second rank comes that is another job's."""
    port = free_port()
    ours, others = slurm(2, job=7, MASTER_PORT=port), slurm(2, job=8, MASTER_PORT=port)
    line = [config, "--work-dir", tmp_path / "w", "--launcher", "slurm"]
    first = Process("train", line, ours[0], tmp_path / "first.log")
    stranger = Process("train", line, others[1], tmp_path / "stranger.log")
    assert f"127.0.0.1:{port} is in use by slurm job 7.0" in one_line(stranger.end())
    second = Process("train", line, ours[1], tmp_path / "second.log")
    assert [first.end().status, second.end().status] == [0, 0]
    assert equal(last(tmp_path / "w"), reference)


def test_a_requeued_job_does_not_meet_what_is_left_of_itself(config, tmp_path):
    port = free_port()
    line = [config, "--work-dir", tmp_path / "w", "--launcher", "slurm"]
    again = slurm(2, MASTER_PORT=port, SLURM_RESTART_COUNT=1)
    first = Process("train", line, again[0], tmp_path / "first.log")
    left = Process("train", line, slurm(2, MASTER_PORT=port)[1], tmp_path / "left.log")
    assert "is in use by slurm job 7.0 start 1" in one_line(left.end())
    second = Process("train", line, again[1], tmp_path / "second.log")
    assert [first.end().status, second.end().status] == [0, 0]


def test_a_port_that_another_program_has_is_named(config, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (ended,) = train(config, tmp_path, environments=slurm(2, MASTER_PORT=port)[:1])
    assert f"no store at 127.0.0.1:{port}: " in one_line(ended)
    assert "Set MASTER_PORT to another" in ended.text


# -- what the ranks must agree on -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work dir with the checkpoint of a first epoch in two processes."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_config(folder / "a.py", epochs=1), folder / "w", processes=2)
    return folder / "w"


def unshared(trained, tmp_path, *has_checkpoint):
    folders = [tmp_path / f"node{rank}" for rank in range(len(has_checkpoint))]
    for folder, has in zip(folders, has_checkpoint, strict=True):
        (folder / "w").mkdir(parents=True)
        if has:
            shutil.copy(trained / "epoch_1.pth", folder / "w")
    return folders


def test_unshared_work_dirs_with_the_same_checkpoint_resume(config, trained, reference, tmp_path):
    folders = unshared(trained, tmp_path, True, True)
    ended = train(config, folders, "--resume", processes=2)
    assert [e.status for e in ended] == [0, 0], ended[0].text
    assert equal(last(folders[0] / "w"), reference)


def test_a_checkpoint_that_only_rank_0_has_is_not_resumed_by_some(config, trained, tmp_path):
    first, second = train(config, unshared(trained, tmp_path, True, False), "--resume", processes=2)
    assert "rank 1: " in first.text and "copy rank 0's there" in first.text
    assert (first.status, second.status) == (2, 2)
    assert not (tmp_path / "node0" / "w" / "epoch_2.pth").exists()


def test_a_checkpoint_that_rank_0_has_not_is_resumed_by_none(config, trained, reference, tmp_path):
    folders = unshared(trained, tmp_path, False, True)
    ended = train(config, folders, "--resume", processes=2)
    assert [e.status for e in ended] == [0, 0], ended[0].text
    assert "nothing to resume; starting from scratch" in ended[0].text
    assert equal(last(folders[0] / "w"), reference)


def test_checkpoints_of_one_name_and_other_content_are_refused(config, trained, tmp_path):
    folders = unshared(trained, tmp_path, True, True)
    checkpoint = load(folders[1] / "w" / "epoch_1.pth")
    checkpoint["state_dict"]["fc.bias"] += 1e-7
    torch.save(checkpoint, folders[1] / "w" / "epoch_1.pth")
    first, second = train(config, folders, "--resume", processes=2)
    assert "the ranks differ in their weights (of load_from, init_cfg or the" in first.text
    assert (first.status, second.status) == (2, 2)


def on_two_nodes(folder, configs):
    """How two ranks with configs of their own end, each in a folder of its own."""
    started = []
    for rank, environment in enumerate(torchrun(2)):
        (folder / str(rank)).mkdir(exist_ok=True)
        line = [configs[rank], "--work-dir", folder / str(rank), "--launcher", "pytorch"]
        started.append(Process("train", line, environment, folder / f"{rank}.log"))
    return [process.end() for process in started]


DIFFERENT = {
    "learning rate": ({"optim_wrapper__optimizer__lr": 0.1}, "config"),
    "seed": ({"randomness__seed": 6}, "config"),
    "hooks": ({"hooks": [{"type": "EMAHook"}]}, "config"),
    "interval of validations": ({"validate": True}, "config"),
    "pipeline": ({"train_dataloader__dataset__pipeline": [{"type": "Noise"}]}, "config"),
    "name of the annotations": ({"train_dataloader__dataset__ann_file": "a/mini.json"}, "config"),
    "content of load_from": ({"load_from": "B"}, "weights"),
    "content of the annotations": ({"train_dataloader__dataset__data_root": "B"}, "data set"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_ranks_that_would_train_differently_are_refused(kind, trained, tmp_path):
    """Whatever it is in; nodes without a shared disk have files of their own."""
    change, what = DIFFERENT[kind]
    common = {"load_from": "A", "train_dataloader__dataset__data_root": "A"}
    common["train_dataloader__dataset__type"] = "ListedStripes"
    common["train_dataloader__dataset__ann_file"] = "a/all.json"
    configs = []
    for rank, options in enumerate([common, {**common, **change}]):
        for name in "AB":
            folder = tmp_path / f"node{rank}" / name
            folder.mkdir(parents=True)
            checkpoint = load(trained / "epoch_1.pth")
            checkpoint["state_dict"]["fc.bias"] += (name == "B") * 1e-7
            torch.save(checkpoint, folder / "start.pth")
            (folder / "a").mkdir()
            for file in ("all", "mini"):
                (folder / "a" / f"{file}.json").write_text(
                    "[0, 1, 2]" if name == "A" else "[0, 2, 1]"
                )
        options = dict(options)
        for key in ("load_from", "train_dataloader__dataset__data_root"):
            name = "start.pth" if key == "load_from" else ""
            options[key] = str(tmp_path / f"node{rank}" / options[key] / name)
        configs.append(make_config(tmp_path / f"{rank}.py", epochs=1, **options))
    first, second = on_two_nodes(tmp_path, configs)
    assert (first.status, second.status) == (2, 2), first.text[-900:] + second.text[-900:]
    assert f"the ranks differ in their {what}" in first.text.splitlines()[-1]
    assert "Traceback" not in first.text + second.text
    assert not list(tmp_path.glob("*/epoch_1.pth"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MASTER_PORT", "junk"),
        ("MASTER_PORT", "0"),
        ("RANK", "a"),
        ("WORLD_SIZE", "-1"),
        ("SLURM_NTASKS", "4(x2)"),
        ("SLURM_JOB_ID", "1_2"),
        ("SLURM_PROCID", "1.0"),
    ],
)
def test_a_variable_of_a_launcher_that_is_no_number(variable, value, config, tmp_path):
    kind = slurm if variable.startswith("SLURM") else torchrun
    (ended,) = train(config, tmp_path, environments=[{**kind(2)[0], variable: value}])
    assert f"{variable}={value}: wanted a number" in one_line(ended)


def test_what_is_wrong_on_one_rank_ends_all_in_its_line(config, tmp_path):
    (tmp_path / "file").touch()
    environments = torchrun(2)
    lines = [
        [config, "--work-dir", folder, "--launcher", "pytorch"]
        for folder in (tmp_path / "w", tmp_path / "file" / "w")
    ]
    started = [
        Process("train", line, environments[rank], tmp_path / f"{rank}.log")
        for rank, line in enumerate(lines)
    ]
    first, second = [process.end() for process in started]
    assert "rank 1: " in one_line(first) and "cannot be written" in first.text
    assert (second.status, second.text) == (2, "")


# -- every wait ends -----------------------------------------------------------------------


def test_timeout(monkeypatch):
    monkeypatch.delenv("PSBN_DIST_TIMEOUT", raising=False)
    cfg = Config({"env_cfg": {"dist_cfg": {"timeout": 60}}})
    assert timeout(Config({})).total_seconds() == 1800
    assert timeout(cfg).total_seconds() == 60
    monkeypatch.setenv("PSBN_DIST_TIMEOUT", "2.5")
    assert timeout(cfg).total_seconds() == 2.5
    for bad in ("0", "-1", "soon", "nan", "inf", "1e9"):
        monkeypatch.setenv("PSBN_DIST_TIMEOUT", bad)
        with pytest.raises(UsageError, match=f"timeout '{bad}': wanted a positive number"):
            timeout(cfg)


def test_a_rank_that_hangs_does_not_hold_the_others_for_ever(tmp_path):
    wait = [{"type": "WaitFor", "iteration": 2, "ranks": [1], "path": str(tmp_path / "never")}]
    config = make_config(tmp_path / "a.py", hooks=wait)
    line = [config, "--work-dir", tmp_path / "w", "--launcher", "pytorch"]
    started = [
        Process("train", line, {**env, "PSBN_DIST_TIMEOUT": 3}, tmp_path / f"{rank}.log")
        for rank, env in enumerate(torchrun(2))
    ]
    first = started[0].end(seconds=100)  # WaitFor itself gives up after 120
    assert first.status == 1
    assert "imed out" in first.text or "imeout" in first.text
    assert started[1].process.exitcode is None  # it was the wait that ended, not its partner


@pytest.mark.parametrize("launcher", [slurm, torchrun])
def test_a_rank_that_never_comes_does_not_hold_the_others_for_ever(launcher, config, tmp_path):
    environments = [{**e, "PSBN_DIST_TIMEOUT": 2, "MASTER_PORT": free_port()} for e in launcher(2)]
    (ended,) = train(config, tmp_path, environments=environments[:1])
    assert ended.status == 2 and "Traceback" not in ended.text
    assert "train.py: rank 0 of 2 did not find the others within 2 s: " in ended.text
