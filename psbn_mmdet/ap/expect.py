"""Claims about a difference in AP that a CI job can fail on."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .coco_files import InputError
from .compare import METHODS, Comparison, fewest_images

_RELATIONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_OF_METHODS = f" of {METHODS}"


@dataclass(frozen=True)
class Expectation:
    """``ARM-BASELINE RELATION BOUND``, of the interval or of the observed difference.

    Attributes:
        text: As given.
        observed: Whether it speaks of the observed difference alone. Otherwise the whole interval
            must be as claimed: its lower end for ``>=``, its upper end for ``<=``.
        of_methods: Whether it fails where the comparison is of checkpoints.
    """

    text: str
    arm: str
    baseline: str
    relation: str
    bound: float
    observed: bool = False
    of_methods: bool = False

    @property
    def option(self) -> str:
        """As on the command line."""
        return f"--expect{'-observed' if self.observed else ''} {self.text}"

    def check(self, c: Comparison) -> tuple[bool, str]:
        """Whether it holds in a comparison that has the pair, and a sentence that says by what.

        Where images are too few for an interval it does not, nor for the observed difference.
        """
        pair = (self.arm, self.baseline)
        d = next(d for d in c.differences if (d.arm, d.baseline) == pair)
        if self.observed:
            what, number = "the observed difference", d.value[0]
        elif self.relation in (">=", ">"):
            what, number = f"the lower end of the {c.confidence:.0%} interval", d.low[0]
        else:
            what, number = f"the upper end of the {c.confidence:.0%} interval", d.high[0]
        holds = bool(_RELATIONS[self.relation](number, self.bound))
        reason = f"{what} is {number:+.2f} (of {d.scope})"
        if math.isnan(d.low[0]):
            holds = False
            reason = (
                f"{c.measured.images[0]} images with an object, too few for an interval, which "
                f"takes {fewest_images(c.confidence)}"
            )
        elif self.of_methods and d.scope != METHODS:
            holds, reason = False, f"{reason}; an arm has one run, so methods are not compared"
        return holds, f"expected {self.text}: {'holds' if holds else 'DOES NOT HOLD'}; {reason}"


def parse(text: str, arms: Sequence[str], observed: bool = False) -> Expectation:
    """Read ``'psbn-bn>=0.3'`` or ``'psbn-bn>=0.3 of methods'``.

    Raises:
        InputError: It is no such claim, or names an arm that is not there.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    parts = re.fullmatch(rf"\s*(.+?)\s*(>=|<=|>|<)\s*({number})({_OF_METHODS})?\s*", text)
    pairs = [(a, b) for a in arms for b in arms if a != b and parts and parts[1] == f"{a}-{b}"]
    if parts is None or len(pairs) != 1:
        raise InputError(
            f"--expect{'-observed' if observed else ''} {text!r}: wanted ARM-BASELINE>=AP, as "
            f"'psbn-bn>=0.3' or 'psbn-bn>=0.3 of methods', with arms of {', '.join(arms)}"
        )
    return Expectation(text, *pairs[0], parts[2], float(parts[3]), observed, bool(parts[4]))
