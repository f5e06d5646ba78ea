"""Training on a real Slurm cluster: two jobs on a node, preemption, scancel, unshared disks."""

import functools
import re
import subprocess
import sys

import pytest

from tests.helpers.forked import train
from tests.helpers.noisy_training import equal, last, make_config
from tests.helpers.paths import ROOT
from tests.helpers.slurm import Cluster, until, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The end of a training in two processes that nothing disturbs, by its seed."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def end(seed=5):
        config = make_config(folder / f"{seed}.py", randomness__seed=seed)
        assert [e.status for e in train(config, folder / str(seed), processes=2)] == [0, 0]
        return last(folder / str(seed))

    return end


def documented(number):
    """A script of docs/train.md."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / "docs/train.md").read_text(), re.DOTALL)[number]


def recipe(folder, config, **sbatch):
    """The batch script of docs/train.md for two processes and no GPU."""
    text = documented(0)
    directives = "".join(f"#SBATCH --{key}={value}\n" for key, value in sbatch.items())
    for old, new in [
        (" --gres=gpu:8 --cpus-per-task=5", ""),
        ("--ntasks=8", "--ntasks=2"),
        ("--partition=PARTITION", "--partition=low"),
        ("status=0\n", directives + "status=0\n"),
        ("GPUS=8 tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR",
         f"bash tools/slurm_train.sh low job {config} {folder / 'w'}"),
    ]:  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (folder / "job.sh").write_text(text)
    return folder / "job.sh"


def submit(cluster, folder, script):
    return cluster.run("sbatch", "--parsable", "--output", folder / "log", script)


def test_two_jobs_at_once_on_a_node_do_not_meet(cluster, uninterrupted, tmp_path):
    jobs = {}
    for name, other, seed in [("a", "b", 1), ("b", "a", 2)]:
        # neither goes on before the other has begun as well
        wait = {"type": "WaitFor", "iteration": 1, "path": str(tmp_path / other / "waiting")}
        config = make_config(tmp_path / f"{name}.py", hooks=[wait], randomness__seed=seed)
        line = ["bash", "tools/slurm_train.sh", "part", name, config, tmp_path / name]
        jobs[name] = cluster.start(*line, SRUN_ARGS="--nodelist=node01")
    texts = {name: job.communicate(timeout=100)[0] for name, job in jobs.items()}
    for name, seed in [("a", 1), ("b", 2)]:
        assert jobs[name].returncode == 0, texts[name]
        assert equal(last(tmp_path / name), uninterrupted(seed))
    assert not equal(uninterrupted(1), uninterrupted(2))


def test_a_preempted_job_is_requeued_and_goes_on_exactly(cluster, uninterrupted, tmp_path):
    config = make_config(tmp_path / "a.py", hooks=[{"type": "WaitForSigterm", "iteration": 3}])
    job = submit(cluster, tmp_path, recipe(tmp_path, config))
    until((tmp_path / "w" / "waiting").exists)
    everything = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    cluster.run("sbatch", "--parsable", *everything, "--wrap=true")
    end = cluster.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / "log").read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log
    assert f"SIGTERM: saved {tmp_path}/w/preempted.pth at iteration 3 " in log
    assert f"resuming from {tmp_path}/w/preempted.pth" in log
    assert equal(last(tmp_path / "w"), uninterrupted())


def test_a_cancelled_job_has_saved_and_the_next_one_resumes_it(cluster, uninterrupted, tmp_path):
    """On two nodes; a cancelled job does not put itself back into the queue."""
    config = make_config(tmp_path / "a.py", hooks=[{"type": "WaitForSigterm", "iteration": 3}])
    script = recipe(tmp_path, config, nodes=2)
    job = submit(cluster, tmp_path, script)
    until((tmp_path / "w" / "waiting").exists)
    assert cluster.job(job)["NumNodes"] == "2"
    cluster.run("scancel", job)
    until((tmp_path / "w" / "preempted.pth").exists)
    until(lambda: cluster.run("squeue", "--noheader") == "")
    assert cluster.job(job)["JobState"] == "CANCELLED"

    end = cluster.wait(submit(cluster, tmp_path, script), "COMPLETED", "FAILED")
    assert end["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert equal(last(tmp_path / "w"), uninterrupted())


def test_with_unshared_disks_rank_0_decides(cluster, uninterrupted, tmp_path):
    """Every node has a folder of its own that it calls ``w``."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncd {tmp_path}/$(hostname) && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = make_config(tmp_path / "a.py")
    line = ["bash", ROOT / "tools/slurm_train.sh", "part", "job", config, "w", "--resume"]
    settings = {"SRUN_ARGS": "--nodes=2", "PYTHON": str(python)}
    for node in ("node01", "node02"):
        (tmp_path / node / "w").mkdir(parents=True)
    # an old run's, on the node that does not decide
    train(make_config(tmp_path / "b.py", epochs=1), tmp_path / "old", processes=2)
    (tmp_path / "old" / "epoch_1.pth").rename(tmp_path / "node02/w/epoch_1.pth")

    text = cluster.run(*line, **settings)
    assert "nothing to resume; starting from scratch" in text
    assert equal(last(tmp_path / "node01" / "w"), uninterrupted())


def test_each_task_has_what_before_does_and_runs_in_the_container(cluster, uninterrupted, tmp_path):
    """The file of docs/train.md, with a module that is a function and a disk of the node's own."""
    text = documented(1).replace("/scratch", f"{tmp_path}/$(hostname)")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "coco").write_text("images")
    tar = ["tar", "-cf", tmp_path / "home" / "coco.tar", "-C", tmp_path / "home", "coco"]
    subprocess.run(tar, check=True)
    text = text.replace("~/coco.tar", f"{tmp_path}/home/coco.tar")
    seen = f'module() {{ echo "$SLURM_PROCID $*" >>{tmp_path}/modules; }}\n'
    (tmp_path / "before.sh").write_text(seen + text)
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\necho "$NCCL_SOCKET_IFNAME $*" >>{tmp_path}/contained\n'
                         'shift 2; exec "$@"\n')  # fmt: skip
    container.chmod(0o755)
    config = make_config(tmp_path / "a.py")
    line = ["bash", "tools/slurm_train.sh", "part", "job", config, tmp_path / "w"]
    settings = {"BEFORE": str(tmp_path / "before.sh"), "CONTAINER": f"{container} exec --nv"}
    cluster.run(*line, **settings, SRUN_ARGS="--nodes=2")
    assert sorted((tmp_path / "modules").read_text().splitlines()) == [
        "0 load cuda/12.6", "1 load cuda/12.6"
    ]  # fmt: skip
    contained = (tmp_path / "contained").read_text().splitlines()
    assert [c.startswith(f"ib0 exec --nv {sys.executable}") for c in contained] == [True, True]
    for node in ("node01", "node02"):
        assert [p.read_text() for p in (tmp_path / node).glob("*/coco")] == ["images"]
    assert equal(last(tmp_path / "w"), uninterrupted())


def test_torchrun_on_two_nodes_under_sbatch(cluster, uninterrupted, tmp_path):
    config = make_config(tmp_path / "a.py")
    text = documented(2)
    for old, new in [
        (" --gres=gpu:8 --cpus-per-task=40", ""),
        ("PARTITION", "part"),
        ("CONFIG 8", f"{config} 1"),
        ("WORK_DIR", str(tmp_path / "w")),
        ("tools/dist_train.sh", f"bash {ROOT}/tools/dist_train.sh"),
    ]:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "job.sh").write_text(text)
    job = submit(cluster, tmp_path, tmp_path / "job.sh")
    end = cluster.wait(job, "COMPLETED", "FAILED")
    assert end["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert equal(last(tmp_path / "w"), uninterrupted())
