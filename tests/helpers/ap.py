"""Made-up runs, and small COCO files and work dirs, for the tests of comparing AP."""

import json
import os
import shutil

import numpy as np

from psbn_mmdet.ap import compare
from psbn_mmdet.ap.compare import Measured


def measured(observed, resampled, images=10**9):
    """Made-up runs: AP alone, no class; observed (M,), resampled (B, M), by default many images."""
    observed, resampled = np.array(observed, float), np.array(resampled, float)
    b, m = resampled.shape
    return Measured(
        names=["AP"],
        overall=1,
        images=np.array([images]),
        observed=observed[:, None],
        draws=resampled[..., None],
        curve=np.zeros((m, 3, 101)),
        curve_resampled=np.zeros((b, m, 3, 101)),
    )


def crossed(rng, mean, seed_sd, own_sd, shared_sd, runs, resamples=2000):
    """Runs of an arm as the model behind ``compare`` has them.

    Of a resample, a run's deviation is one part shared by the runs of its arm and one of its own;
    the run on the observed images deviates by one draw of each, and by its seed.
    """
    own = rng.normal(0, own_sd, runs)
    observed = mean + rng.normal(0, shared_sd) + own + rng.normal(0, seed_sd, runs)
    noise = rng.normal(0, shared_sd, (resamples, 1)) + rng.normal(0, own_sd, (resamples, runs))
    return observed, observed + noise


def two_arms(rng, runs, difference, seed_sd, own_sd, shared_sd, resamples=2000, whole=False):
    a = crossed(rng, 36.0, seed_sd, own_sd, shared_sd, runs, resamples)
    b = crossed(rng, 36.0 + difference, seed_sd, own_sd, shared_sd, runs, resamples)
    m = measured(np.append(a[0], b[0]), np.hstack([a[1], b[1]]))
    arms = {"bn": list(range(runs)), "psbn": list(range(runs, 2 * runs))}
    c = compare.compare(m, arms)
    return c if whole else c.differences[0]


def dataset(folder, images=40, seed=0, quality=(0.03, 0.12), seeds=1):
    """An annotation file and, per arm and seed, a result file; less noise is a better arm."""
    rng = np.random.default_rng(seed)
    objects = [
        dict(
            id=n + 1,
            image_id=n // 3 + 1,
            category_id=int(rng.integers(1, 4)),
            bbox=[*rng.uniform(0, 100, 2).round(1).tolist(), *rng.uniform(20, 90, 2).tolist()],
            area=2000.0,
            iscrowd=0,
        )
        for n in range(3 * images)
    ]
    annotations = dict(
        images=[dict(id=i + 1, file_name=f"{i + 1:012d}.jpg") for i in range(images)],
        categories=[dict(id=c, name=f"class {c}") for c in (1, 2, 3)],
        annotations=objects,
    )
    (folder / "ann.json").write_text(json.dumps(annotations))
    files = []
    for arm, noise in zip(("bn", "psbn"), quality, strict=True):
        for s in range(seeds):
            boxes = [
                dict(
                    image_id=o["image_id"],
                    category_id=o["category_id"],
                    bbox=(np.array(o["bbox"]) + rng.normal(0, noise, 4) * 50).clip(0).tolist(),
                    score=float(rng.random()),
                )
                for o in objects
            ]
            files.append((arm, folder / f"{arm}_{s}.bbox.json"))
            files[-1][1].write_text(json.dumps(boxes))
    return annotations, [f"{arm}={path}" for arm, path in files]


def work_dirs(folder, seeds=2, **kwargs):
    """Work dirs as tools/train.py and tools/test.py leave them."""
    _, named = dataset(folder, seeds=seeds, **kwargs)
    made = []
    for n, (arm, _, path) in enumerate(name.partition("=") for name in named):
        d = folder / f"{arm}_s{n % seeds}"
        d.mkdir()
        (d / "retinanet.py").write_text(
            f"test_evaluator = dict(type='CocoMetric', ann_file={str(folder / 'ann.json')!r})\n"
            f"randomness = dict(seed={n % seeds})\n"
        )
        (d / "epoch_12.pth").write_bytes(b"")
        (d / "last_checkpoint").write_text(str(d / "epoch_12.pth"))
        shutil.move(path, d / "results.bbox.json")
        os.utime(d / "results.bbox.json")
        made.append(f"{arm}={d}")
    return made


def change_json(path, change):
    """Change a JSON file in place: ``change`` gets its data."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
