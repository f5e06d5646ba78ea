"""State dicts as projects save them: under a key, beside other things, with prefixed names."""

import torch

from psbn_mmdet.checkpoint.unwrap import AVERAGES, WEIGHTS


def _other(state_dict):
    """A state dict of the same names and shapes with other values."""
    return {k: torch.zeros_like(v) for k, v in state_dict.items()}


def _training_state(state_dict):
    names = list(state_dict)
    return {
        "epoch": 3,
        "optimizer": {"state": {0: {"momentum": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        "args": {"names": names},
    }


WRAPPINGS = {
    "nothing": lambda sd: dict(sd),
    "flags": lambda sd: {**sd, "epoch": 3, "arch": "resnet"},
    **{
        key: lambda sd, key=key: {**_training_state(sd), key: dict(sd)}
        for key in (*WEIGHTS, *AVERAGES)
    },
    "nested": lambda sd: {"model": {"state_dict": dict(sd), "epoch": 3}},
    "beside an average": lambda sd: {"model": dict(sd), "model_ema": _other(sd)},
    "mmengine's average": lambda sd: {
        "state_dict": dict(sd),
        "ema_state_dict": {
            "steps": torch.tensor(3),
            **{f"module.{k}": v for k, v in _other(sd).items()},
        },
    },
    "state_dict first": lambda sd: {"model": _other(sd), "state_dict": dict(sd)},
    "numpy": lambda sd: {"model": {k: v.numpy() for k, v in sd.items()}},
}

PREFIXES = {
    "none": lambda sd: sd,
    **{
        prefix: lambda sd, prefix=prefix: {prefix + k: v for k, v in sd.items()}
        for prefix in (
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "module.module.",
        )
    },
    # torch.compile of one submodule
    "inside": lambda sd: {k.replace(".", "._orig_mod.", 1): v for k, v in sd.items()},
    # torch's and mmengine's averaged models count beside the module
    "n_averaged": lambda sd: (
        {"n_averaged": torch.tensor(2), **{f"module.{k}": v for k, v in sd.items()}}
    ),
    "steps": lambda sd: {"steps": torch.tensor(2), **{f"module.{k}": v for k, v in sd.items()}},
}
