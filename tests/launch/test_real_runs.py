"""tools/train.py and tools/test.py for real: killed, on real images, from a wheel, by mmdet."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch import load_config
from tests.helpers import forked
from tests.helpers.noisy_training import equal, last
from tests.helpers.paths import ROOT
from tests.helpers.real_runs import TINY, environment, run, weights


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(shapes, tmp_path):
    """The shipped demo in two processes; test_exact.py has the property in many more cases."""
    text = f"""
_base_ = {str(ROOT / "configs/demo/demo_psbn_finetune.py")!r}
custom_imports = dict(imports=["psbn_mmdet", "tests.helpers.noisy_training"])
"""
    (tmp_path / "whole.py").write_text(text)
    kill = 'custom_hooks = [dict(type="Kill", iteration=5)]\n'
    (tmp_path / "killed.py").write_text(text + kill)
    options = ["--data-root", shapes, "--cfg-options", *TINY]
    ended = forked.train(tmp_path / "whole.py", tmp_path / "whole", *options, processes=2)
    assert [e.status for e in ended] == [0, 0], ended[0].text
    killed = tmp_path / "killed"
    ended = forked.train(tmp_path / "killed.py", killed, *options, processes=2)
    assert [e.status for e in ended] == [-9, -9], ended[0].text
    newest = killed / "epoch_2.pth"  # as if it had been killed while it wrote that
    newest.write_bytes(newest.read_bytes()[:10000])

    ended = forked.train(tmp_path / "whole.py", killed, "--resume", *options, processes=2)
    assert f"resuming from {killed / 'epoch_1.pth'}\n" in ended[0].text
    assert equal(last(killed), last(tmp_path / "whole"))
    assert not equal(weights(killed), weights(killed, 1))


@pytest.mark.slow
def test_a_checkpoint_with_code_is_refused_in_one_line(shapes, tmp_path):
    from tests.helpers.malicious import Malicious

    torch.save({"state_dict": {}, "meta": Malicious(tmp_path / "ran")}, tmp_path / "a.pth")
    for processes in (1, 2):
        arguments = ["--data-root", shapes, "--resume", tmp_path / "a.pth"]
        result = run(processes, "configs/demo/demo_bn.py", tmp_path / "w", *arguments, check=False)
        assert result.returncode != 0
        assert "refused: it contains posix.mkdir" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_real_images_in_two_processes(shared_data, imagenet, tmp_path):
    """The unmodified config on COCO images: train from ImageNet's file, resume, test."""
    config = "configs/retinanet/retinanet_psbn_500.py"
    # A quarter of the scale and 8 images: what is shown is the path, not the AP.
    small = [o for o in TINY if "max_epochs" not in o and "val_interval" not in o]
    small += [f"{k}_dataloader.dataset.indices=8" for k in ("train", "val", "test")]
    steps = load_config(config).train_dataloader.dataset.pipeline
    resize = next(i for i, step in enumerate(steps) if step.type == "Resize")
    small.append(f"train_dataloader.dataset.pipeline.{resize}.scale=(208,125)")
    steps = load_config(config).test_dataloader.dataset.pipeline
    resize = next(i for i, step in enumerate(steps) if step.type == "Resize")
    small += [f"{k}_dataloader.dataset.pipeline.{resize}.scale=(208,125)" for k in ("val", "test")]
    small.append("model.test_cfg.score_thr=0.0")  # untrained: keep what is found
    options = ["--data-root", shared_data / "coco128", "--cfg-options", *small]
    env = environment(TORCH_HOME=str(imagenet))

    run(2, config, tmp_path, *options, "train_cfg.max_epochs=1", env=env)
    start = load(imagenet / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
    after = weights(tmp_path, 1)
    # The stem is frozen: beta + alpha is still ImageNet's bias.
    total = after["backbone.bn1.beta"] + after["backbone.bn1.alpha"]
    torch.testing.assert_close(total, start["bn1.bias"])
    assert not torch.equal(after["backbone.layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])

    result = run(2, config, tmp_path, "--resume", *options, "train_cfg.max_epochs=2", env=env)
    assert f"resuming from {tmp_path / 'epoch_1.pth'}" in result.stdout
    assert (tmp_path / "epoch_2.pth").exists()

    checkpoint = str(tmp_path / "epoch_2.pth")
    run(2, config, tmp_path / "test", *options, test=checkpoint, env=env)
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics["coco/bbox_mAP"] >= 0
    results = json.loads((tmp_path / "test" / "results.bbox.json").read_text())
    assert {r["image_id"] for r in results} <= {
        i["id"]
        for i in json.loads(
            (shared_data / "coco128" / "annotations" / "instances_val2017.json").read_text()
        )["images"]
    }
    assert len({r["image_id"] for r in results}) == 8


RUN_AND_LIST_THREADS = """
import os, runpy, sys
from pathlib import Path

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    threads = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in threads if "gloo" in name]
    os.write(1, f"left behind: {left}\\n".encode())  # in one piece, as both processes write
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_no_thread_of_gloo_is_left_that_could_abort_a_finished_job(shapes, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RUN_AND_LIST_THREADS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", program]
    options = ["--work-dir", tmp_path / "w", "--data-root", shapes, "--launcher", "pytorch"]
    options += ["--cfg-options", *TINY, "train_cfg.max_epochs=1", "model.test_cfg.score_thr=0.0"]
    config = ROOT / "configs/demo/demo_psbn_finetune.py"
    for tool in (["train.py", config], ["test.py", config, tmp_path / "w/epoch_1.pth"]):
        result = subprocess.run(
            [*torchrun, ROOT / "tools" / tool[0], *tool[1:], *options],
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("left behind: []") == 2, result.stdout[-3000:]


def test_slurm_scripts_start_the_tools_in_tasks(tmp_path):
    """A stub in place of srun; test_slurm.py has the real one."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", GPUS="16", SRUN_ARGS="-x a --exact")
    for tool, arguments, expected in [
        ("train", ["C", "W", "--resume"], ["C", "--work-dir", "W", "--resume"]),
        ("test", ["C", "F", "--work-dir", "W"], ["C", "F", "--work-dir", "W"]),
    ]:
        line = [f"tools/slurm_{tool}.sh", "part", "name", *arguments]
        printed = subprocess.run(line, env=env, capture_output=True, text=True).stdout.splitlines()
        program = ["-u", f"{ROOT}/tools/{tool}.py", *expected, "--launcher", "slurm"]
        at = printed.index(sys.executable)
        assert printed[at + 1 :] == program
        wanted = "--partition part --job-name name --ntasks 16 --cpus-per-task 5 --gres gpu:8"
        wanted += " --ntasks-per-node 8 --kill-on-bad-exit=1 -x a --exact"
        # BEFORE is not set: nothing is sourced before the tool.
        before = ["bash", "-c", '[ -z "$0" ] || source "$0"; exec "$@"', ""]
        assert printed[:at] == [*wanted.split(), *before]
        missing = subprocess.run(line[:4], env=env, capture_output=True, text=True)
        assert (missing.returncode, missing.stdout) == (2, "") and "PARTITION" in missing.stderr


@pytest.mark.slow
def test_mmdets_own_train_script_takes_psbn_by_one_option(shapes, tmp_path):
    import mmdet

    cfg = load_config("configs/demo/demo_bn.py", data_root=shapes)
    for key in ("custom_imports", "custom_hooks"):  # nothing of this package but the scope
        cfg.pop(key)
    cfg.dump(tmp_path / "plain.py")
    script = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    options = ["model.backbone.norm_cfg.type=psbn_mmdet.psBN", *TINY, "train_cfg.max_epochs=1"]
    args = ["--work-dir", str(tmp_path / "w"), "--cfg-options", *options]
    subprocess.run(
        [sys.executable, script, tmp_path / "plain.py", *args],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
    )
    assert "backbone.bn1.beta" in weights(tmp_path / "w", 1)


@pytest.mark.slow
def test_a_wheel_trains_from_its_installed_config(shapes, tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("psbn_mmdet-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    user = tmp_path / "mine.py"
    user.write_text(
        "_base_ = 'psbn_mmdet::demo/demo_psbn_finetune.py'\n"
        "custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)\n"
    )
    env = environment(PYTHONPATH=str(site))
    options = ["--data-root", shapes, "--cfg-options", *TINY, "train_cfg.max_epochs=1"]
    for config in (user, "psbn_mmdet::demo/demo_bn.py"):
        args = [str(config), "--work-dir", str(tmp_path / "w"), *map(str, options)]
        script = site / "psbn_mmdet" / ".mim" / "tools" / "train.py"
        result = subprocess.run(
            [sys.executable, script, *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert "backbone.bn1.bias" in weights(tmp_path / "w", 1)


@pytest.mark.slow
def test_a_busy_port_ends_in_a_line(shapes, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        env = environment(PORT=str(port))
        options = ["--data-root", shapes]
        done = run(2, "configs/demo/demo_bn.py", tmp_path / "w", *options, check=False, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith(f"train.py: PORT={port}: Address already in use; use another")
    assert done.stderr.count("\n") == 1
