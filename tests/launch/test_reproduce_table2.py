"""tools/reproduce_table2.sh: its plan, its refusals, and all of it for real at toy size."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.paths import ROOT


def toy_coco(folder, shared_data, images=4):
    """A COCO of the first images of coco128, in COCO's own layout."""
    for split in ("train", "val"):
        data = json.loads(
            (shared_data / f"coco128/annotations/instances_{split}2017.json").read_text()
        )
        kept = [
            i for i in data["images"] if any(o["image_id"] == i["id"] for o in data["annotations"])
        ]
        data["images"] = kept[:images]
        ids = {i["id"] for i in data["images"]}
        data["annotations"] = [o for o in data["annotations"] if o["image_id"] in ids]
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(data))
        (folder / f"{split}2017").symlink_to(shared_data / f"coco128/{split}2017")


TOY = [
    "model.backbone.depth=18",
    "model.backbone.init_cfg=None",
    "model.neck.in_channels=[64,128,256,512]",
    "model.neck.out_channels=32",
    "model.bbox_head.in_channels=32",
    "model.bbox_head.feat_channels=32",
    "model.bbox_head.stacked_convs=1",
    "model.test_cfg.score_thr=0.0",
    "train_dataloader.batch_size=1",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.pipeline.2.scale=(128,96)",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.pipeline.1.scale=(128,96)",
    "train_cfg.max_epochs=2",
    "train_cfg.val_interval=5",
    "custom_hooks=[]",
]


class Reproduce:
    """A started tools/reproduce_table2.sh; its output goes to a file, so that it never waits."""

    def __init__(self, log, *arguments):
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", "tools/reproduce_table2.sh", *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def kill_when(self, path, seconds=400):
        """Kill everything that it started, as soon as the path exists."""
        deadline = time.time() + seconds
        try:
            while not path.exists():
                assert self.process.poll() is None, self.log.read_text()
                assert time.time() < deadline, self.log.read_text()
                time.sleep(0.02)
        finally:
            # torchrun puts its workers into sessions of their own
            started = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
        return self.log.read_text()

    def end(self, status=0):
        assert self.process.wait(600) == status, self.log.read_text()
        return self.log.read_text()


@pytest.mark.slow
def test_at_toy_size_two_processes_one_run_killed_half_way(tmp_path, shared_data):
    """dist_train.sh, dist_test.sh and compare_ap.py for both norms."""
    toy_coco(tmp_path / "coco", shared_data)
    work = tmp_path / "table2"
    arguments = (
        "--gpus", 2, "--seeds", 1, "--arms", "bn_500 psbn_500", "--work-dir", work,
        "--data-root", tmp_path / "coco", "--cfg-options", *TOY,
    )  # fmt: skip
    # the first run ends; the second has saved its first epoch when the kill comes
    killed = Reproduce(tmp_path / "1.log", *arguments).kill_when(
        work / "psbn_500_s0/last_checkpoint"
    )
    assert not (work / "psbn_500_s0/trained.txt").exists(), "the kill came too late"
    assert "nothing to resume; starting from scratch" in killed
    finished = (work / "bn_500_s0/results.bbox.json").stat().st_mtime_ns

    plan = Reproduce(tmp_path / "2.log", "--dry-run", *arguments).end()
    assert "# 1 of 2 runs to do" in plan and f"# {work}/bn_500_s0: finished" in plan

    said = Reproduce(tmp_path / "3.log", *arguments).end()
    assert f"# {work}/bn_500_s0: finished" in said
    assert f"resuming from {work}/psbn_500_s0/epoch_1.pth" in said
    assert (work / "bn_500_s0/results.bbox.json").stat().st_mtime_ns == finished
    assert "| 500 |" in said and "## psbn_500 against bn_500:" in said
    data = json.loads((work / "table2.json").read_text())
    assert [(r["arm"], r["seed"]) for r in data["runs"]] == [("bn_500", 0), ("psbn_500", 0)]
    for r in data["runs"]:
        assert r["checkpoint"].endswith("epoch_2.pth")
        assert len({x["image_id"] for x in json.loads(Path(r["results"]).read_text())}) == 4
    assert (work / "table2.html").stat().st_size > 1e6


def pretend_finished(folder):
    folder.mkdir(parents=True)
    (folder / "results.bbox.json").write_text("[]")
    (folder / "metrics.json").write_text("{}")


def test_plan_names_every_command_and_the_gpu_hours(tmp_path):
    pretend_finished(tmp_path / "bn_500_s0")
    plan = Reproduce(
        tmp_path / "log", "--dry-run", "--gpus", 4, "--seeds", 2, "--work-dir", tmp_path,
        "--ms-per-image", 100, "--cfg-options", "a.b=x y",
    ).end()  # fmt: skip
    lines = plan.splitlines()
    trained = [line for line in lines if "dist_train.sh" in line]
    tested = [line for line in lines if "dist_test.sh" in line]
    assert len(trained) == len(tested) == 7 and len([x for x in lines if "compare_ap" in x]) == 1
    arms = ["bn_500", "psbn_500", "bn_800", "psbn_800"]  # every arm has a seed before one has two
    runs = [(arm, f"{tmp_path}/{arm}_s{seed}") for seed in (0, 1) for arm in arms]
    for line, (_, folder) in zip(trained, runs[1:], strict=True):
        assert f"{folder} --resume" in line
    (compared,) = (line for line in lines if "compare_ap" in line)
    assert compared.split()[-8:] == [f"{arm}={folder}" for arm, folder in runs]
    assert "retinanet_psbn_800.py 4" in trained[-1]
    for override in ("randomness.seed=1", "train_dataloader.batch_size=4", "a.b=x\\ y"):
        assert override in trained[-1]  # 16 images per step on 4 GPUs
    # 12 epochs of 118287 images at 100 ms and 5000 at a third: 39.98 h; times 0.3906 at 500
    assert "about 40.0 GPU hours" in plan and "about 15.6 GPU hours" in plan
    assert "# 7 of 8 runs to do, about 206.8 GPU hours" in plan  # 4 * 40.0 + 3 * 15.6
    assert not (tmp_path / "psbn_800_s1").exists()


def test_as_slurm_array(tmp_path):
    """A stub in place of sbatch: the array has the unfinished runs, the report waits for it."""
    stub = tmp_path / "sbatch"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$0.log"; echo "--" >> "$0.log"; echo 77\n')
    stub.chmod(0o755)
    python = tmp_path / "python"  # checks pass
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    pretend_finished(tmp_path / "w/bn_500_s0")
    done = subprocess.run(
        ["bash", "tools/reproduce_table2.sh", "--slurm", "gpu", "--seeds", "1", "--work-dir",
         tmp_path / "w"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    array, report, _ = (tmp_path / "sbatch.log").read_text().split("--\n")
    array, report = array.splitlines(), report.splitlines()
    assert array[array.index("--array") + 1] == "1,2,3"
    assert array[array.index("--gres") + 1] == "gpu:8"
    assert "--run $SLURM_ARRAY_TASK_ID" in array[-1] and "--slurm gpu" in array[-1]
    assert report[report.index("--dependency") + 1] == "afterok:77"
    assert "--report" in report[-1]


def test_refuses_before_anything_is_run(tmp_path):
    for args, message in [
        ((), "no GPU on this machine"),
        (("--gpus", 3), "--gpus 3: wanted 1, 2, 4, 8 or 16"),
        (("--seeds", 0), "--seeds 0"),
        (("--arms", "gn_500"), "no arm gn_500"),
        (("--what", 1), "--what: no such option"),
    ]:
        if not args and shutil.which("nvidia-smi"):
            continue  # this machine has GPUs and would begin
        said = Reproduce(tmp_path / "log", *args, "--work-dir", tmp_path / "w")
        text = said.log.read_text() if said.process.wait(120) else "it ended well"
        assert message in text and text.count("\n") == 1
    assert [p.name for p in tmp_path.glob("w/*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("where", [(), ("--slurm", "gpu")])
def test_looks_for_the_data_first(tmp_path, where):
    said = Reproduce(
        tmp_path / "log", "--gpus", 2, *where, "--data-root", tmp_path / "no", "--work-dir",
        tmp_path / "w", "--cfg-options", "model.backbone.init_cfg=None",
    )  # fmt: skip
    assert said.process.wait(120) > 0
    text = said.log.read_text()
    assert "no such annotation file" in text and text.count("\n") == 1
    assert [p.name for p in tmp_path.glob("w/*")] == []


@pytest.mark.slow
def test_does_not_mix_settings_in_a_work_dir(tmp_path, shared_data):
    toy_coco(tmp_path / "coco", shared_data)
    (tmp_path / "w/bn_500_s0").mkdir(parents=True)
    (tmp_path / "w/bn_500_s0/settings.txt").write_text("arm bn_500, seed 0, 8 processes,\n")
    said = Reproduce(
        tmp_path / "log", "--gpus", 2, "--work-dir", tmp_path / "w", "--data-root",
        tmp_path / "coco", "--cfg-options", "model.backbone.init_cfg=None",
    ).end(status=2)  # fmt: skip
    assert "was begun with other settings (arm bn_500, seed 0, 8 processes,)" in said
