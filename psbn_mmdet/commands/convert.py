"""Turn a BN checkpoint into a psBN checkpoint, or back; the network computes the same.

    psbn convert bn.pth psbn.pth --to psbn
    psbn convert psbn.pth plain.pth --to bn

Every state dict in the file is converted (bias = beta + alpha): the weights and what stands beside
them, such as state_dict_ema or model_ema. All else of the weights stays; optimizer, schedules and
the weights that mmengine's EMAHook goes on with are dropped unless asked for. With --to bn the
config that the file carries names BN too. Both kinds also load into each other as they are;
converting is for leaving this package, and for tools that want the keys to fit. OUT is written as
safetensors if it is so named. A FrozenBatchNorm stays as it is, and so does an InstanceNorm without
running statistics, which cannot be recognised in a checkpoint: convert the model with to_psbn.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import (
    CheckpointError,
    bn_config,
    bn_state_dict,
    convert_all,
    load,
    locate,
    psbn_state_dict,
    state_dict_of,
)
from ..errors import (
    PsbnError,
    errors_in_one_line,
    refuse_to_overwrite,
    written_whole,
)
from ..norm.layers import check_alpha
from ..norm.recognize import Kind, norm_kinds


def convert(
    checkpoint: Any, to: str, alpha: float = 0.1, keep_training_state: bool = False
) -> tuple[Any, list[str]]:
    """A converted copy of what :func:`psbn_mmdet.checkpoint.load` returned.

    Momentum of an optimizer fits both sides, since beta stands where bias stood and its gradient is
    the same.

    Returns:
        The new checkpoint, and lines that say what was changed.

    Raises:
        CheckpointError: There is no layer to convert, or a part of one.
    """

    def change(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return psbn_state_dict(state_dict, alpha) if to == "psbn" else bn_state_dict(state_dict)

    tensors = state_dict_of(checkpoint)
    kinds: set[Kind] = {"bn", "psbn"} if to == "psbn" else {"psbn"}
    lines = _describe(tensors, change(tensors), to, alpha)
    converted, places = convert_all(checkpoint, change, kinds)
    place = locate(checkpoint)
    lines += [f"converted too: {where}" for where in places if where != ".".join(place)]
    if not place:  # the checkpoint is the state dict
        return converted, lines
    new: dict[str, Any] = {}
    dropped = []
    for key, value in converted.items():
        holds_layers = any(where == key or where.startswith(f"{key}.") for where in places)
        if keep_training_state or key == "meta" or (holds_layers and key != "ema_state_dict"):
            new[key] = value
        else:
            dropped.append(key)
            lines = [line for line in lines if line != f"converted too: {key}"]
    if dropped:
        lines.append(f"dropped (training state): {', '.join(dropped)}")
    meta = new.get("meta")
    for key in ("cfg", "config"):  # the latter in MMDetection 2
        if not isinstance(meta, Mapping) or not isinstance(meta.get(key), str):
            continue
        if to == "bn":
            meta = new["meta"] = {**meta, key: bn_config(meta[key])}
            lines.append(f"meta.{key}, the config, names BN now")
        else:
            lines.append(f"meta.{key} still holds the config of the run that wrote the checkpoint")
    return new, lines


def _describe(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], to: str, alpha: float
) -> list[str]:
    """How many layers have changed, by how much what they add has, and which could not be told."""
    old, new = norm_kinds(before), norm_kinds(after)
    layers = [name for name in old if name in new and (old[name], new[name]) != ("bn", "bn")]
    layers = [name for name in layers if "psbn" in (old[name], new[name])]
    difference = max(float((_added(before, n) - _added(after, n)).abs().max()) for n in layers)
    name = f"psBN with alpha {alpha:g}" if to == "psbn" else "BN"
    lines = [
        f"{len(layers)} layers are now {name}; what they add changed by at most {difference:.1g}"
    ]
    unknown = [name for name, kind in old.items() if kind == "unknown"]
    if to == "psbn" and unknown:
        lines.append(
            f"{len(unknown)} layers without running statistics stay, as {unknown[0] or 'itself'}: "
            "InstanceNorm, GroupNorm and LayerNorm look alike in a checkpoint"
        )
    return lines


def _added(state_dict: Mapping[str, Tensor], layer: str) -> Tensor:
    """The bias of a layer, in float64."""
    prefix = f"{layer}." if layer else ""
    if f"{prefix}bias" in state_dict:
        return state_dict[f"{prefix}bias"].double()
    return state_dict[f"{prefix}beta"].double() + state_dict[f"{prefix}alpha"].double()


def save(content: dict[str, Any], path: Path) -> list[str]:
    """Write a file, as safetensors or as torch.save does; returns what to tell the user."""
    if path.suffix != ".safetensors":
        with written_whole(path) as part:
            torch.save(content, part)
        return []
    from safetensors.torch import save as to_bytes  # save_file has an error of its own

    tensors = state_dict_of(content)
    with written_whole(path) as part:
        part.write_bytes(to_bytes({k: v.clone().contiguous() for k, v in tensors.items()}))
    if tensors.keys() == content.keys():
        return []
    return ["safetensors holds the model's tensors alone: all else was left out"]


def run(args: argparse.Namespace) -> None:
    refuse_to_overwrite(args.out, overwrite=args.overwrite)
    if args.out.suffix == ".safetensors" and args.keep_training_state:
        raise PsbnError(f"{args.out}: safetensors cannot hold training state; name it .pth")
    try:
        check_alpha(args.alpha)
    except ValueError as error:
        raise PsbnError(f"--alpha: {error}") from None
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
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help=".pth, .pt, .safetensors, or a URL",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the new file")
    parser.add_argument("--to", choices=["psbn", "bn"], required=True)
    parser.add_argument("--alpha", type=float, default=0.1, help="of psBN (default %(default)s)")
    parser.add_argument(
        "--keep-training-state",
        action="store_true",
        help="keep optimizer, schedules, message hub and averaged weights",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    with errors_in_one_line():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
