"""Collapsed filters taken out: a smaller network of the same function.

- :mod:`.strip`: ``strip``, which does it, proves it and keeps the record
- :mod:`.wiring`: which channels carry nothing but a constant
- :mod:`.coupling`: which channels go or stay together
- :mod:`.plan`: which go, which stay, and why
- :mod:`.surgery`: the weights
- :mod:`.record`: what was done, counted and explained
- :mod:`.proof`: two networks run beside each other
- :mod:`.model`: the model type ``Stripped`` for configs
"""

from .coupling import StripError
from .proof import compare, difference, runner, time_in_pairs
from .record import summary
from .strip import TOLERANCE, Stripped, strip
from .surgery import take_out

__all__ = [
    "TOLERANCE",
    "StripError",
    "Stripped",
    "compare",
    "difference",
    "runner",
    "strip",
    "summary",
    "take_out",
    "time_in_pairs",
]
