"""Which runs make up each experiment, and which differences in AP it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from studies.cifar.networks import MMDET_RESNET18
from studies.cifar.settings import Settings as CifarSettings
from studies.runs import RunError

from .peers import GAMMA_ALONE, GAMMA_LIFTED, PEERS, SHRINK
from .settings import ANCHORED, BN, METHODS, NO_NORM_DECAY, PRESERVE, SHIFT, Settings

PRETRAINING = CifarSettings(
    network=MMDET_RESNET18, width=0.25, batch_size=64, lr=0.2, weight_decay=2e-3, rounds=6, epochs=2
)
"""How a backbone is pretrained; with BN, the more rounds, the more of its filters collapse.

1,562 steps a round, in which decay takes a factor of exp(-3.1) from a filter without a gradient
(exp(-9.75) in the paper's rounds of 39,000 steps)."""

DEGREES = {"1 round": 1, "2 rounds": 2, "3 rounds": 3, "6 rounds": 6}
"""Degree of collapse of a backbone -> the round of its pretraining with BN that ends with it: about
1, 25, 45 and 60% of the filters."""

TWIN = "6 rounds of psBN"
"""As long a pretraining without the collapse: the other side of what collapse costs."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """``arm`` is what seeds are averaged over; ``line`` and ``x`` place it in a figure."""

    name: str
    arm: str
    settings: Settings
    line: str
    x: str | float | None = None


@dataclass(frozen=True)
class Experiment:
    """Runs and what is asked of them.

    Attributes:
        pairs: (arm, baseline) whose difference in AP is judged, after every round.
        choices: What a reader must know of the settings.
        backbones: Runs of the CIFAR-10 study by name, those that ``runs`` start from.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    pairs: tuple[Pair, ...]
    choices: tuple[str, ...]
    backbones: dict[str, CifarSettings]


Builder = Callable[[Settings, int], Experiment]
_BUILDERS: dict[str, tuple[Builder, Settings, int]] = {}


def _experiment(name: str, base: Settings, seeds: int) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder, base, seeds
        return builder

    return register


def names() -> list[str]:
    return list(_BUILDERS)


def build(name: str, changes: dict[str, Any] | None = None, seeds: int | None = None) -> Experiment:
    """An experiment as a list of runs, seed by seed.

    Args:
        name: One of :func:`names`.
        changes: Fields of the base settings; those of ``pretraining.`` are the backbones'. What
            an experiment varies, it still varies.
        seeds: Number of seeds; by default the published one.

    Raises:
        RunError: An unknown experiment or setting, or a value that cannot be.
    """
    if name not in _BUILDERS:
        raise RunError(f"no experiment {name!r}; there are {', '.join(_BUILDERS)}")
    builder, base, count = _BUILDERS[name]
    count = count if seeds is None else seeds
    if count < 1:
        raise RunError(f"at least one seed is needed, got {count}")
    changes = dict(changes or {})
    pretraining = changes.pop("pretraining", {})
    experiment = builder(_changed(base, changes), count)
    return replace(
        experiment,
        backbones={
            key: _changed(value, pretraining, "pretraining.")
            for key, value in experiment.backbones.items()
        },
    )


def _changed(base: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    unknown = sorted(set(changes) - set(asdict(base)))
    if unknown:
        raise RunError(f"no setting {prefix + unknown[0]!r}; there are {', '.join(asdict(base))}")
    try:
        return replace(base, **changes)
    except TypeError as error:
        raise RunError(f"settings {changes}: {error}") from None


def _slug(text: str) -> str:
    return "_".join(text.lower().replace("%", "").replace(",", " ").split())


def backbone(norm: str, seed: int) -> tuple[str, CifarSettings]:
    """The name of a backbone and how it is pretrained: 'BN', 'psBN' or :data:`NO_NORM_DECAY`."""
    decays = norm != NO_NORM_DECAY
    settings = replace(PRETRAINING, norm=norm if decays else BN, norm_decay=decays, seed=seed)
    return f"{_slug(norm)}-seed{seed}", settings


@_experiment("transfer", Settings(), seeds=6)
def _transfer(base: Settings, seeds: int) -> Experiment:
    starts = [
        (f"{method}, {degree}", degree, method, "BN", number)
        for degree, number in DEGREES.items()
        for method in METHODS
    ]
    last = max(DEGREES.values())
    starts += [(f"{method}, {TWIN}", TWIN, method, "psBN", last) for method in (BN, PRESERVE)]
    runs, backbones = [], {}
    for seed in range(seeds):
        for arm, degree, method, norm, number in starts:
            name, backbones[name] = backbone(norm, seed)
            settings = replace(base, method=method, seed=seed, backbone=name, backbone_round=number)
            runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, settings, method, degree))
    healthy, *collapsed = DEGREES
    pairs = [(f"{BN}, {degree}", f"{BN}, {healthy}") for degree in collapsed]
    pairs += [(f"{BN}, {collapsed[-1]}", f"{BN}, {TWIN}"), (f"{PRESERVE}, {TWIN}", f"{BN}, {TWIN}")]
    pairs += [(f"{m}, {degree}", f"{BN}, {degree}") for degree in DEGREES for m in METHODS[1:]]
    return Experiment(
        "transfer",
        "Finetuning from collapsed backbones: what collapse costs, what psBN gives back",
        tuple(runs),
        tuple(pairs),
        (
            "Each seed has backbones of its own, pretrained on CIFAR-10; the degrees of collapse "
            f"are the ends of rounds {', '.join(map(str, DEGREES.values()))} of one pretraining "
            "with BN, so a more collapsed backbone has also been trained for longer.",
            f"{TWIN}: a pretraining of the same length with psBN, in which fewer filters collapse. "
            "Its checkpoint is converted to plain BN.",
            "preserve: beta = bias - alpha, the pretrained function stays; shift: beta = bias.",
            "All parameters are trained, all norm layers use batch statistics.",
        ),
        backbones,
    )


WITHOUT_DECAY = "6 rounds without norm decay"
"""As long a pretraining with BN in which gamma and beta do not decay, so that nothing collapses."""

REVIVED = "revived"


@_experiment("revive", Settings(), seeds=6)
def _revive(base: Settings, seeds: int) -> Experiment:
    (healthy, _), *between, (collapsed, last) = DEGREES.items()
    cured = [method for method in METHODS if method != PRESERVE]
    few_cured = [NO_NORM_DECAY, SHIFT]
    starts = []
    for degree, number in DEGREES.items():
        few = [BN, *few_cured] if degree in dict(between) else None
        starts += [(degree, m, BN, number, False) for m in few or METHODS]
        starts += [(f"{degree}, {REVIVED}", m, BN, number, True) for m in few or cured]
    starts += [(WITHOUT_DECAY, m, NO_NORM_DECAY, last, False) for m in (BN, NO_NORM_DECAY)]
    controls = (SHRINK, GAMMA_ALONE)
    peers = [(collapsed, peer) for peer in PEERS] + [(healthy, peer) for peer in controls]
    runs, backbones = [], {}
    for seed in range(seeds):
        for degree, method, norm, number, revive in starts:
            arm = f"{method}, {degree}"
            name, backbones[name] = backbone(norm, seed)
            settings = replace(
                base,
                method=method,
                seed=seed,
                backbone=name,
                backbone_round=number,
                revive=revive,
            )
            runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, settings, method, degree))
        name, _ = backbone(BN, seed)
        for degree, peer in peers:
            number = DEGREES[degree]
            settings = replace(
                base, seed=seed, backbone=name, backbone_round=number, peer=peer, method=BN
            )
            arm = f"{BN}, {degree}, {peer}"
            runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, settings, BN, f"{degree}, {peer}"))
    again = f"{collapsed}, {REVIVED}"
    pairs = [(f"{m}, {again}", f"{m}, {collapsed}") for m in cured]
    pairs += [(f"{m}, {again}", f"{BN}, {healthy}") for m in cured]
    pairs += [(f"{m}, {again}", f"{BN}, {d}") for m in cured[1:] for d in (again, collapsed)]
    pairs += [(f"{m}, {d}", f"{BN}, {d}") for d in (collapsed, healthy) for m in METHODS[1:]]
    pairs += [(f"{BN}, {collapsed}", f"{BN}, {healthy}")]
    pairs += [(f"{m}, {healthy}, {REVIVED}", f"{m}, {healthy}") for m in cured]
    for degree, _ in between:
        pairs += [(f"{BN}, {degree}", f"{BN}, {healthy}")]
        pairs += [(f"{m}, {degree}, {REVIVED}", f"{BN}, {degree}") for m in (BN, *few_cured)]
        pairs += [(f"{m}, {degree}", f"{BN}, {degree}") for m in few_cured]
    pairs += [(f"{BN}, {collapsed}, {p}", f"{BN}, {collapsed}") for p in PEERS]
    pairs += [(f"{BN}, {again}", f"{BN}, {collapsed}, {p}") for p in PEERS]
    pairs += [(f"{BN}, {healthy}, {p}", f"{BN}, {healthy}") for p in controls]
    pairs += [(f"{BN}, {collapsed}, {p}", f"{BN}, {healthy}, {p}") for p in controls]
    pairs += [(f"{BN}, {collapsed}", f"{BN}, {WITHOUT_DECAY}")]
    pairs += [(f"{BN}, {WITHOUT_DECAY}", f"{BN}, {healthy}")]
    pairs += [(f"{NO_NORM_DECAY}, {WITHOUT_DECAY}", f"{BN}, {WITHOUT_DECAY}")]
    return Experiment(
        "revive",
        "Finetuning from a collapsed backbone, by what is done to it before",
        tuple(runs),
        tuple(pairs),
        (
            "Each seed has backbones of its own, pretrained on CIFAR-10 with BN: healthy after "
            f"{healthy}, collapsed after {collapsed}.",
            "revived: before the finetuning each collapsed filter got fresh weights in front of it "
            "and zeros in what reads it within the backbone; neck and head are fresh in all arms.",
            f"{NO_NORM_DECAY}: no weight decay of gamma and beta, in the finetuning.",
            f"{WITHOUT_DECAY}: none in the pretraining.",
            "ReDo, shrink and perturb, L2 Init: what others do; studies/detection/peers.py has the "
            "settings, which were fixed before the first run.",
            "Controls, added after two seeds of shrink and perturb: the same from the healthy "
            f"backbone, and {GAMMA_ALONE}, from both; after two seeds of that: {GAMMA_LIFTED}.",
            "preserve: beta = bias - alpha, the pretrained function stays; shift: beta = bias.",
            "All parameters are trained, all norm layers use batch statistics.",
        ),
        backbones,
    )


# Written down before any of its runs, and after revive had shown what helps at 60%.
@_experiment("degrees", Settings(), seeds=3)
def _degrees(base: Settings, seeds: int) -> Experiment:
    between = list(DEGREES.items())[1:-1]
    cures: dict[str, dict[str, Any]] = {
        "": {},
        REVIVED: dict(revive=True),
        GAMMA_LIFTED: dict(peer=GAMMA_LIFTED),
        GAMMA_ALONE: dict(peer=GAMMA_ALONE),
    }
    runs, pairs, backbones = [], [], {}
    for degree, _ in between:
        arms = {cure: f"{BN}, {degree}, {cure}" if cure else f"{BN}, {degree}" for cure in cures}
        pairs += [(arms[cure], arms[""]) for cure in cures if cure]
        pairs += [(arms[cure], arms[REVIVED]) for cure in (GAMMA_LIFTED, GAMMA_ALONE)]
    for seed in range(seeds):
        name, backbones[name] = backbone("BN", seed)
        for degree, number in between:
            for cure, changes in cures.items():
                start = f"{degree}, {cure}" if cure else degree
                arm = f"{BN}, {start}"
                settings = replace(base, seed=seed, backbone=name, backbone_round=number, **changes)
                runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, settings, BN, start))
    return Experiment(
        "degrees",
        "What helps backbones of which a quarter and nearly half have collapsed",
        tuple(runs),
        tuple(pairs),
        (
            "As revive, between its healthy and its collapsed backbone: after rounds "
            f"{' and '.join(str(number) for _, number in between)} of the same pretraining.",
            f"revived, {GAMMA_LIFTED}, {GAMMA_ALONE}: as there.",
            "Arms, seeds and pairs were fixed before the first run, and after revive's results.",
        ),
        backbones,
    )


def _psbn(alpha: float) -> str:
    return f"psBN, alpha {alpha:g}"


LIMITED = f"{ANCHORED}, max_ratio 1"


# Four times transfer's decay: in a round a filter without a gradient shrinks by a factor of 0.2;
# at transfer's by one of 0.67, with which few collapse in five rounds.
@_experiment("rounds", Settings(rounds=5, weight_decay=2e-2), seeds=5)
def _rounds(base: Settings, seeds: int) -> Experiment:
    arms: dict[str, dict[str, Any]] = {
        BN: dict(method=BN),
        NO_NORM_DECAY: dict(method=NO_NORM_DECAY),
        **{_psbn(alpha): dict(method=SHIFT, alpha=alpha) for alpha in (0.1, 0.01)},
        ANCHORED: dict(method=ANCHORED),
        LIMITED: dict(method=ANCHORED, max_ratio=1.0),
    }
    runs, backbones = [], {}
    for seed in range(seeds):
        name, backbones[name] = backbone("BN", seed)
        shared = replace(base, seed=seed, backbone=name, backbone_round=min(DEGREES.values()))
        for arm, changes in arms.items():
            runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, replace(shared, **changes), arm))
    return Experiment(
        "rounds",
        "Fig. 3 with AP: rounds of detection training from a healthy backbone",
        tuple(runs),
        (*((arm, BN) for arm in arms if arm != BN), (LIMITED, ANCHORED)),
        (
            "The paper's figure is of classification, from random weights, without alpha 0.01.",
            "The backbones are pretrained as those of transfer, 1 round. From scratch, with 8 "
            "channels, batch 2, lr 0.05 and 12 epochs a round, the seed decided when learning took "
            "off (tried): given up for this.",
            "shift: beta = bias, so that alpha lifts every unit at once. AnchoredBiasDecay keeps "
            "the pretrained biases and lets them decay toward 0.1; with max_ratio 1 toward 0.1 or "
            "the root mean square of the layer's gamma, whichever is less.",
        ),
        backbones,
    )


ALPHAS = (0.003, 0.01, 0.03, 0.1, 0.3)


@_experiment("alpha", Settings(), seeds=6)
def _alpha(base: Settings, seeds: int) -> Experiment:
    runs, pairs, backbones = [], [], {}
    degrees = [("1 round", DEGREES["1 round"]), ("3 rounds", DEGREES["3 rounds"])]
    for degree, _ in degrees:
        pairs += [(f"{_psbn(a)}, {degree}", f"{BN}, {degree}") for a in ALPHAS]
    for seed in range(seeds):
        name, backbones[name] = backbone("BN", seed)
        for degree, number in degrees:
            arms: list[tuple[str, float | None, dict[str, Any]]] = [(BN, None, dict(method=BN))]
            arms += [(_psbn(a), a, dict(method=SHIFT, alpha=a)) for a in ALPHAS]
            for label, alpha, changes in arms:
                arm = f"{label}, {degree}"
                settings = replace(base, seed=seed, backbone=name, backbone_round=number, **changes)
                runs.append(Run(f"{_slug(arm)}-seed{seed}", arm, settings, degree, alpha))
    return Experiment(
        "alpha",
        "alpha of psBN in finetuning, from a healthy and from a collapsed backbone",
        tuple(runs),
        tuple(pairs),
        (
            "The backbones, and the runs with BN and with alpha 0.1, are those of transfer.",
            "shift: beta = bias, so that alpha lifts every unit at once. Against the gamma of "
            "these backbones even 0.1 is large: the median of |gamma| is 0.05 and less.",
            "From scratch, with two decays, AP after two rounds was 0.2 to 37, by the seed more "
            "than by alpha (56 runs tried): given up for this.",
        ),
        backbones,
    )
