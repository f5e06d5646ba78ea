"""Turn a BN checkpoint into a psBN checkpoint, or back; the network computes the same.

    tools/convert_checkpoint.py bn.pth psbn.pth --to psbn
    tools/convert_checkpoint.py psbn.pth plain.pth --to bn

The layers are changed (bias = beta + alpha), all else stays; optimizer, schedules
and the like are dropped unless asked for. BN checkpoints also load into psBN
models as they are; converting is for leaving this package, and for tools that
want the keys to fit. OUT is written as safetensors if it is so named, and never
overwritten. An InstanceNorm without running statistics cannot be recognised in a
checkpoint and stays as it is: convert the model with to_psbn.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from psbn_mmdet.checkpoint import (
    CheckpointError,
    bn_state_dict,
    load,
    psbn_state_dict,
    state_dict_of,
)
from psbn_mmdet.collapse import measure


def convert(
    checkpoint: Any, to: str, alpha: float = 0.1, keep_training_state: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A converted copy of what :func:`psbn_mmdet.checkpoint.load` returned.

    An average of the weights (``ema_state_dict``) and the optimizer are training
    state; momentum fits both sides, since beta stands where bias stood and its
    gradient is the same.

    Returns:
        The new checkpoint, and lines that say what was changed.

    Raises:
        CheckpointError: There is no layer to convert.
    """

    def change(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return psbn_state_dict(state_dict, alpha) if to == "psbn" else bn_state_dict(state_dict)

    tensors = state_dict_of(checkpoint)
    changed = change(tensors)
    before, after = measure(tensors), measure(changed)
    difference = max(
        float((a.bias - b.bias).abs().max())
        for a, b in zip(before.layers, after.layers, strict=True)
    )
    psbn = changed if to == "psbn" else tensors
    layers = sum(f"{layer.name}.beta".lstrip(".") in psbn for layer in before.layers)
    name = f"psBN with alpha {alpha:g}" if to == "psbn" else "BN"
    lines = [f"{layers} layers are now {name}; what they add changed by at most {difference:.1g}"]
    where = [
        key
        for key, value in checkpoint.items()
        if isinstance(value, Mapping) and any(value.get(k) is v for k, v in tensors.items())
    ]
    if not where:  # the checkpoint is the state dict
        return changed, lines
    new: dict[str, Any] = {}
    dropped = []
    for key, value in checkpoint.items():
        if key == where[0]:
            new[key] = change(value)
        elif key == "meta" or (keep_training_state and not key.startswith("ema")):
            new[key] = value
        elif keep_training_state and isinstance(value, Mapping):
            new[key] = change(value)
            lines.append(f"{key}: converted too")
        else:
            dropped.append(key)
    if dropped:
        lines.append(f"dropped (training state): {', '.join(dropped)}")
    if "cfg" in (checkpoint.get("meta") or {}):
        lines.append("meta.cfg still holds the config of the run that wrote the checkpoint")
    return new, lines


def save(content: dict[str, Any], path: Path) -> list[str]:
    """Write to a new file, as safetensors or as torch.save does; returns what to tell the user."""
    notes = []
    try:
        file = open(path, "xb")  # noqa: SIM115 (closed below)
    except FileExistsError:
        raise CheckpointError(f"{path}: exists already; remove it or name another file") from None
    try:
        with file:
            if path.suffix == ".safetensors":
                from safetensors.torch import save as to_safetensors

                tensors = state_dict_of(content)
                file.write(to_safetensors({k: v.clone() for k, v in tensors.items()}))
                if tensors.keys() != content.keys():
                    notes.append("safetensors holds tensors alone: all else was left out")
            else:
                torch.save(content, file)
    except BaseException:
        os.unlink(path)
        raise
    return notes


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise CheckpointError(f"{args.out}: exists already; remove it or name another file")
    if args.out.suffix == ".safetensors" and args.keep_training_state:
        raise CheckpointError(f"{args.out}: safetensors cannot hold training state; name it .pth")
    checkpoint = load(args.checkpoint)
    state_dict_of(checkpoint, args.checkpoint)
    try:
        new, lines = convert(checkpoint, args.to, args.alpha, args.keep_training_state)
    except CheckpointError as error:
        raise CheckpointError(f"{args.checkpoint}: {error}") from None
    lines += save(new, args.out)
    print("\n".join([*lines, f"written to {args.out}"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", help=".pth, .pt, .safetensors, or a URL")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new file")
    parser.add_argument("--to", choices=["psbn", "bn"], required=True)
    parser.add_argument("--alpha", type=float, default=0.1, help="of psBN (default %(default)s)")
    parser.add_argument(
        "--keep-training-state",
        action="store_true",
        help="keep optimizer, schedules, message hub and averaged weights",
    )
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, beside its error
    try:
        run(parser.parse_args())
    except (ValueError, TypeError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
