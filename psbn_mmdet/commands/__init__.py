"""The command ``psbn``: one verb a module, each of which ``tools/`` has under its old name, too.

- :mod:`.inspect`: which filters of a checkpoint have collapsed; with images, what each one does
- :mod:`.revive`, :mod:`.strip`: bring them back, or take them out
- :mod:`.convert`: BN to psBN and back
- :mod:`.plot`: training runs side by side
- :mod:`psbn_mmdet.ap.command`: is a difference in AP real?
- :mod:`.detector`: the detector that a command works on: its config, weights and images

Only the module of the verb is imported, so ``psbn --help`` and ``psbn compare-ap`` need no torch;
that, and no dependency, is why this is argparse behind a table.
"""

from __future__ import annotations

import importlib
import sys

from .. import __version__
from ..errors import BAD_INPUT

VERBS = {
    "inspect": (".inspect", "find collapsed filters in a checkpoint; with images, stuck ones"),
    "revive": (".revive", "give collapsed filters of a detector a new start, outputs unchanged"),
    "strip": (".strip", "remove collapsed filters from a detector, outputs unchanged"),
    "convert": (".convert", "turn a BN checkpoint into a psBN one, or back"),
    "plot": (".plot", "draw training runs side by side, as figures or one HTML page"),
    "compare-ap": ("..ap.command", "is a difference in AP between detectors more than noise?"),
}

USAGE = "\n".join(
    [
        "usage: psbn VERB ...",
        "",
        *(f"  {verb:<12}{what}" for verb, (_, what) in VERBS.items()),
        "",
        "psbn VERB --help tells more. A start: psbn inspect CHECKPOINT",
    ]
)


def main() -> None:
    """Run ``psbn VERB ...``."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE)
    elif verb == "--version":
        print(f"psbn_mmdet {__version__}")
    elif verb in VERBS:
        sys.argv = [f"psbn {verb}", *rest]  # what argparse and our errors name
        importlib.import_module(VERBS[verb][0], __name__).main()
    else:
        print(f"psbn: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
