"""Collapsed filters: found in a model, a checkpoint or a training run, and shown.

- :mod:`.criteria`: what a filter does: the one place that decides
- :mod:`.backward`: what one backward pass tells of each
- :mod:`.layers`: the normalization layers of a model or a state dict
- :mod:`.convolutions`: the convolution in front of each
- :mod:`.report`: ``measure`` and what it returns
- :mod:`.flops`: how many FLOPs the collapsed filters cost
- :mod:`.calls`: how a model is called with images, and whether two answer alike
- :mod:`.wiring`: how a network is wired, channel by channel, found by running it
- :mod:`.stripping`: ``strip``, which takes the collapsed filters out
- :mod:`.reviving`: ``revive``, which gives them a new life; :mod:`.revive_hook` in a training
- :mod:`.lifting`: ``lift_gamma``, which makes their gamma large again
- :mod:`.narrow`: a network narrowed to the shapes of stripped weights
- :mod:`.hook`: ``SparsityLoggerHook``, which measures while a model trains
- :mod:`.trace`: the file it writes
- :mod:`.over_training`: the states of filters over a trace
- :mod:`.figures`, :mod:`.page`: a trace as PNG files and as an HTML page
"""

from .calls import CallError
from .criteria import (
    INACTIVE_BELOW,
    NEARLY_LINEAR_ABOVE,
    THRESHOLD,
    MeasureError,
    activation_probability,
    check_thresholds,
    collapsed,
    constant,
    count,
    dead,
    does,
    filter_l1,
    inactive,
    nearly_linear,
    not_finite,
)
from .flops import Flops, probe
from .layers import Layer, gather, norm_modules
from .lifting import lift_gamma
from .narrow import StripError, narrow
from .report import Report, measure
from .reviving import ReviveError, revive
from .stripping import Stripped, strip

__all__ = [
    "INACTIVE_BELOW",
    "NEARLY_LINEAR_ABOVE",
    "THRESHOLD",
    "CallError",
    "Flops",
    "Layer",
    "MeasureError",
    "Report",
    "ReviveError",
    "StripError",
    "Stripped",
    "activation_probability",
    "check_thresholds",
    "collapsed",
    "constant",
    "count",
    "dead",
    "does",
    "filter_l1",
    "gather",
    "inactive",
    "lift_gamma",
    "measure",
    "narrow",
    "nearly_linear",
    "norm_modules",
    "not_finite",
    "probe",
    "revive",
    "strip",
]
