"""Every config that mmdet ships, with psBN: does it build, compute the same, can it be measured?

    python -m studies.mmdet_configs [--configs PATTERN ...] [--out FOLDER]

Each distinct model of the configs that came with the installed mmdet is built twice, as it is and
by the two overrides `model.type=psbn_mmdet.ToPsBN model.of=TYPE`, with random weights and without
any download. Both get the same state dict with normalization layers drawn at random; what they
compute is compared, and `measure` counts the second one's filters and FLOPs. Writes results.json
and results.md. A run that was interrupted continues with the models that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psbn_mmdet.errors import PsbnError, errors_in_one_line

SIZES = (128, 256, 512)
"""Sides of the square images, tried in this order: some heads need more than 128 pixels."""
LIMIT = 300
"""Seconds for one model, of which the largest takes a minute on a free core."""
PROPOSALS = 20
"""Of an image: the 1,000 of the configs would keep a second stage with masks busy for minutes."""
ROUNDING = 1e-5
"""A `difference` in float32 above which float64 is to tell whether it is more than rounding."""
SAME = 1e-4
"""Largest `difference` that counts as rounding."""


DOWNLOADS = ("pretrained", "teacher_ckpt")
"""Keys of a model that name weights."""


def config_folder() -> Path:
    """Of the mmdet that is installed."""
    import mmdet

    return Path(mmdet.__file__).parent / ".mim" / "configs"


def configs() -> dict[str, Path]:
    """The configs that mmdet was installed with, by their name relative to its folder."""
    root = config_folder()
    if not root.is_dir():
        raise PsbnError(f"{root}: mmdet was installed without its configs; install it with mim")
    paths = (p for p in sorted(root.rglob("*.py")) if "_base_" not in p.parts)
    return {str(p.relative_to(root)): p for p in paths}


def model_of(path: Path) -> dict[str, Any] | None:
    """The model of a config without the weights it would download; None where there is none."""
    from mmengine.config import Config

    model = Config.fromfile(path).to_dict().get("model")
    return _without_weights(model) if model else None


def _without_weights(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: _without_weights(v) for k, v in value.items() if k not in DOWNLOADS}
        init = kept.get("init_cfg")
        if isinstance(init, dict) and str(init.get("type")).endswith("Pretrained"):
            del kept["init_cfg"]
        return kept
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_weights, value))
    return value


def few_proposals(value: Any) -> Any:
    """The same, with :data:`PROPOSALS` an image for a second stage, if there is one."""
    if isinstance(value, dict):
        few = {key: few_proposals(item) for key, item in value.items()}
        if "rpn" in few and "max_per_img" in (few["rpn"] or ()):
            few["rpn"]["max_per_img"] = PROPOSALS
        return few
    return type(value)(map(few_proposals, value)) if isinstance(value, (list, tuple)) else value


def check(model: dict[str, Any]) -> dict[str, Any]:
    """What becomes of one model.

    In float32; where outputs differ by more than :data:`ROUNDING`, once more in float64, in which
    rounding does not change which proposals are the best, but which takes many times as long.

    Returns:
        `layers`: normalization layers with a trained bias (0: nothing to convert), `converted`: how
        many are post-shifted then; `difference`: the largest within an output, relative to its
        largest value, `of` the model's outputs or the features that its head gets; `filters` and
        `flops` as measured; `failed`: at which step, with `why`. Keys after the step that failed
        are missing.
    """
    torch.set_num_threads(1)  # a forked process does not have the threads of the pool
    _let_nms_take_float64()
    result = _check(model, torch.float32)
    if result.get("difference", 0) > ROUNDING:
        torch.set_default_dtype(torch.float64)  # anchors are made in it, too
        exact = _check(model, torch.float64)
        if "difference" in exact:  # some operators want float32
            return exact
    return result


def _check(model: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, init_default_scope

    from psbn_mmdet.collapse import measure
    from psbn_mmdet.norm import PostShift

    init_default_scope("mmdet")
    result: dict[str, Any] = {}
    step = "build"
    try:
        torch.manual_seed(0)
        model = few_proposals(model)
        # Building changes the config of some models, and others want its attributes.
        plain = MODELS.build(ConfigDict(copy.deepcopy(model)))
        plain.eval()  # the distilled ones return nothing
        layers = [m for m in plain.modules() if _is_batch_norm(m)]
        result["layers"] = len(layers)
        if not layers:
            return result
        step = "convert"
        overridden = {**copy.deepcopy(model), "type": "psbn_mmdet.ToPsBN", "of": model["type"]}
        shifted = MODELS.build(ConfigDict(overridden))
        shifted.eval()
        result["converted"] = sum(isinstance(m, PostShift) for m in shifted.modules())
        step = "load"
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of every parameter
            plain.init_weights()  # untouched, the boxes of cascades overflow
        for name, module in plain.named_modules():
            if name.endswith("conv_offset"):
                # As mmcv begins: with random offsets a rounding of 1e-14 is 0.8 at the stage's end.
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        for layer in layers:
            for parameter in (layer.weight, layer.running_var):
                nn.init.uniform_(parameter, 0.5, 1.5)
            for parameter in (layer.bias, layer.running_mean):
                nn.init.normal_(parameter, 0, 0.2)
        shifted.load_state_dict(plain.state_dict())
        # Trackers take videos and track; what is in them of BatchNorm is the detector's.
        plain, shifted = (getattr(model, "detector", model) for model in (plain, shifted))
        step = "compare"
        for network in (plain, shifted):
            nn.Module.to(network, dtype)  # the distilled ones have a `to` for devices alone
        result.update(_compare(plain, shifted, dtype))
        step = "measure"
        report = measure(shifted, inputs=(3, result["size"], result["size"]))
        result["filters"] = int(report.totals["filters"])
        if report.flops is None:
            raise ValueError("no FLOPs")
        result["flops"] = report.flops.total
    except Exception as error:  # whatever mmdet raises is the answer for this model
        result.update(failed=step, why=_why(error))
    return result


def _why(error: Exception) -> str:
    """Its last line, without the folder that mmdet is installed in."""
    last = (str(error).strip().splitlines() or [""])[-1]
    last = last.replace(str(config_folder()) + "/", "")
    return f"{type(error).__name__}: {' '.join(last.split())}"[:200]


def _let_nms_take_float64() -> None:
    """The CPU operator of mmcv takes float32 alone, and gives indices."""
    operators = importlib.import_module("mmcv.ops.nms").ext_module  # a function has the same name
    nms = operators.nms
    operators.nms = lambda boxes, scores, **kwargs: nms(boxes.float(), scores.float(), **kwargs)


def _is_batch_norm(module: nn.Module) -> bool:
    kind = nn.modules.batchnorm._BatchNorm
    return isinstance(module, kind) and isinstance(module.bias, nn.Parameter)


def _compare(plain: nn.Module, shifted: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    from psbn_mmdet.collapse.calls import compare, ways_to_call

    refusal: Exception | None = None
    for size in SIZES:
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        features = methodcaller("extract_feat", images)  # where no head can be called
        ways: list[Callable[[nn.Module], Any]] = ways_to_call(plain, images)
        ways += [features] if size == SIZES[-1] else []
        for way in ways:
            try:
                outputs = []
                for model in (plain, shifted):
                    torch.manual_seed(0)  # some heads draw noise
                    with torch.no_grad():
                        outputs.append(list(_tensors(way(model))))
            except Exception as error:  # too small an image, or no such mode: the next
                refusal = error
                continue
            if outputs[0]:
                shapes, others = ([x.shape for x in output] for output in outputs)
                difference = compare(*outputs).relative if shapes == others else math.inf
                if math.isnan(difference):
                    refusal = ValueError("outputs that are not finite")
                    continue
                return {
                    "size": size,
                    "dtype": str(dtype)[6:],
                    "of": "features" if way is features else "outputs",
                    "difference": difference,
                }
    raise refusal or ValueError("no output is a tensor")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "pred_instances"):  # a data sample of mmdet
        yield from _tensors(list(value.pred_instances.all_items()))
    elif hasattr(value, "pred_panoptic_seg"):
        yield from _tensors(list(value.pred_panoptic_seg.all_items()))


def in_a_process(model: dict[str, Any], limit: float = LIMIT) -> dict[str, Any]:
    """`check` in a process of its own: what one model leaves behind or breaks harms no other."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        os.chdir(config_folder().parent)  # a teacher is named by its path in mmdet's repository
        sender.send(check(model))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return {"failed": "time", "why": f"took more than {limit:.0f} s"}
    except EOFError:
        process.join()
        return {"failed": "process", "why": f"ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def summarize(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts over configs and over distinct models; a model's first config stands for it.

    Args:
        rows: By the config's name; a config whose model came before has only `same_as`.
    """
    models = [row for row in rows.values() if "same_as" not in row and "no_model" not in row]
    built = [row for row in models if "layers" in row]
    with_bn = [row for row in built if row["layers"]]
    compared = [row for row in with_bn if "difference" in row]
    return {
        "configs": len(rows),
        "models": len(models),
        "built": len(built),
        "with_batch_norm": len(with_bn),
        "converted": sum(row.get("converted") == row["layers"] for row in with_bn),
        "compared": len(compared),
        "features_alone": sum(row.get("of") == "features" for row in compared),
        "same": sum(row["difference"] <= SAME for row in compared),
        "largest_difference": max((row["difference"] for row in compared), default=None),
        "measured": sum("flops" in row for row in with_bn),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table for readers: the counts, each family of configs, each model with a remark."""
    s, rows = result["summary"], result["rows"]
    lines = [
        "# psBN in every config of mmdet",
        "",
        f"mmdet {result['mmdet']}, torch {result['torch']}, {result['machine']}. Made by "
        "`python -m studies.mmdet_configs`, which says in its source what each column means.",
        "",
        "| | |",
        "|---|---|",
        f"| configs | {s['configs']} |",
        f"| distinct models | {s['models']} |",
        f"| of these build with stock mmdet | {s['built']} |",
        f"| of these have a BatchNorm | {s['with_batch_norm']} |",
        f"| all their BatchNorms become psBN | {s['converted']} |",
        f"| outputs could be compared | {s['compared']} |",
        f"| of these, features alone, as their head could not be called | {s['features_alone']} |",
        f"| outputs equal to {SAME:g} of the largest | {s['same']} |",
        f"| largest difference | {s['largest_difference'] or 0:.1e} |",
        f"| filters and FLOPs measured | {s['measured']} |",
        "",
        "## By family",
        "",
        "| family | models | build | with BatchNorm | converted | compared | same | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    families: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, row in rows.items():
        families[name.split("/")[0]][name] = row
    columns = ["models", "built", "with_batch_norm", "converted", "compared", "same", "measured"]
    for family, members in families.items():
        counts = summarize(members)
        if counts["models"]:
            cells = " | ".join(str(counts[key]) for key in columns)
            lines.append(f"| {family} | {cells} |")
    lines += ["", "## Not as it should be, and why", "", "| config | step | why |", "|---|---|---|"]
    for name, row in rows.items():
        if "failed" in row:
            why = row["why"].replace("|", "\\|")
            lines.append(f"| {name} | {row['failed']} | {why} |")
        elif row.get("difference", 0) > SAME:
            lines.append(f"| {name} | compare | differs by {row['difference']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check all configs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", nargs="+", default=["*"], help="patterns, as 'yolox/*'")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    args = parser.parse_args()
    with errors_in_one_line("mmdet_configs"):
        run(args.configs, args.out)


def run(patterns: list[str], out: Path) -> None:
    """Check the configs that match and write results.json after each, results.md at the end."""
    import mmdet
    from mmdet.utils import register_all_modules

    import psbn_mmdet  # noqa: F401  (registers ToPsBN)

    chosen = {
        name: path for name, path in configs().items() if any(fnmatch(name, p) for p in patterns)
    }
    if not chosen:
        raise PsbnError(f"no config of mmdet matches {' '.join(patterns)}")
    if not out.is_dir():
        raise PsbnError(f"{out}: no such folder")
    register_all_modules(init_default_scope=True)
    file = out / "results.json"
    versions = {"mmdet": mmdet.__version__, "torch": torch.__version__}
    known = json.loads(file.read_text()) if file.exists() else {}
    done = known.get("rows", {}) if {k: known.get(k) for k in versions} == versions else {}
    rows: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for name, path in chosen.items():
        start = time.perf_counter()
        try:
            model = model_of(path)
        except Exception as error:  # of a config that needs what is not installed
            rows[name] = {"failed": "config", "why": _why(error)}
            continue
        if model is None:
            rows[name] = {"no_model": True}
            continue
        key = json.dumps(model, sort_keys=True, default=str)
        if key in first:
            rows[name] = {"same_as": first[key]}
            continue
        first[key] = name
        rows[name] = done[name] if name in done else in_a_process(model)
        result = {
            **versions,
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "summary": summarize(rows),
            "rows": rows,
        }
        if name not in done:
            file.write_text(json.dumps({**result, "rows": {**done, **rows}}, indent=1) + "\n")
            print(f"{name}: {rows[name]} ({time.perf_counter() - start:.0f} s)", flush=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    (out / "results.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
