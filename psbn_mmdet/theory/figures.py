"""Pictures of the theory: each function draws one figure from `theory`'s formulas."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from .. import theory

ALPHA = 0.1
SILENT = -3.0  # C below which a filter fires on less than 0.14 % of its inputs
_BLUE, _RED, _GREY = "#1f6fb4", "#c8372d", "#666666"


def _figure(panels: int, title: str) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    figure.suptitle(title)
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def draw_K() -> Figure:
    """K with its even part, and how far the second order of Eq. 3 reaches."""
    figure, (left, right) = _figure(2, "One noisy step (Theorem 1)")
    z = np.linspace(-4, 4, 801)
    left.axhline(0, color=_GREY, lw=0.8)
    left.plot(z, theory.K(z), color=_BLUE, label="K(z)")
    even = (theory.K(z) + theory.K(-z)) / 2
    left.plot(z, even, "--", color=_RED, label="its even part, all that an even P(β) leaves")
    left.plot(0, -1 / np.pi, "o", color=_BLUE)
    left.annotate("K(0) = −1/π", (0, -1 / np.pi), (10, 0), textcoords="offset points", va="center")
    left.set(xlabel="z = β / |γ|", ylabel="K(z)", title="Eq. 5: below 0 the filter fires less")
    left.set_ylim(top=0.16)
    left.legend(loc="upper right", fontsize=8)

    steps = np.geomspace(0.02, 3, 18)
    for value, color in ((-1.0, _RED), (0.0, _BLUE), (1.0, "#3a8f3a")):
        shares = []
        for step in steps:
            estimate = theory.simulate_drift(1.0, value, 1.0, step, samples=100_000)
            shares.append(np.array(estimate) / theory.drift(1.0, value, 1.0, step))
        mean, stderr = np.transpose(shares)
        right.errorbar(
            steps, mean, 2 * np.abs(stderr), fmt="o-", ms=3, color=color, label=f"β/γ = {value:g}"
        )
    right.axhline(1, color=_GREY, lw=0.8)
    right.set(
        xscale="log",
        xlabel="step η c / |γ|",
        ylabel="simulated change / Eq. 3  (± 2 standard errors)",
        title="Eq. 1 simulated: Eq. 3 holds for small steps",
    )
    right.legend(fontsize=8)
    return figure


def _silent_region(axis: Any, gamma: np.ndarray, shift: float = 0.0) -> None:
    """Shade where C < SILENT; `shift` is what the layer adds beside the vertical axis."""
    edge = SILENT * gamma - shift
    low = axis.get_ylim()[0]
    axis.fill_between(
        gamma, low, edge, where=edge > low, facecolor="none", edgecolor=_GREY, hatch="///", lw=0
    )
    axis.plot(gamma, edge, color="black", lw=1)
    axis.set_ylim(low)


def draw_drift() -> Figure:
    """The drift over (gamma, beta) for BN and psBN, with the region without a gradient."""
    figure, axes = _figure(2, "Where noise drives the probability of firing (Eq. 3, for η c = 1)")
    gamma, beta = np.meshgrid(np.linspace(0.02, 1, 400), np.linspace(-1.5, 1.5, 601))
    norm = SymLogNorm(linthresh=0.01, vmin=-100, vmax=100)
    for axis, name, shift in zip(axes, ("BN", "psBN, α = 0.1"), (0.0, ALPHA), strict=True):
        field = theory.drift(gamma, beta + shift, 1.0, 1.0)
        image = axis.pcolormesh(gamma, beta, field, norm=norm, cmap="RdBu", rasterized=True)
        axis.set(xlabel="γ", ylabel="β", title=name, xlim=(0, 1), ylim=(-1.5, 1.5))
        _silent_region(axis, np.linspace(0, 1, 101), shift)
        axis.plot(0, 0, "o", color="black", clip_on=False, zorder=5)
    axes[0].annotate("decay ends here: silent or not,\nas the filter was", (0, 0), (0.12, 1.1),
                     arrowprops={"arrowstyle": "->"}, fontsize=8)  # fmt: skip
    axes[1].annotate("decay ends here: firing", (0, 0), (0.12, 1.15),
                     arrowprops={"arrowstyle": "->"}, fontsize=8)  # fmt: skip
    for axis in axes:
        axis.text(0.12, -1.38, "silent: C < −3", fontsize=8, bbox={"fc": "white", "ec": "none"})
    bar = figure.colorbar(image, ax=axes, label="change of the probability / (η c)²  per step")
    bar.set_ticks([-100, -1, -0.01, 0, 0.01, 1, 100])
    return figure


def draw_decay() -> Figure:
    """The ways of silent filters under decay alone: gamma and what the layer adds."""
    figure, axes = _figure(2, "Silent filters under weight decay alone (section 5)")
    lr, weight_decay, momentum = 0.1, 5e-4, 0.9
    schedule = np.full(40_000, lr)
    starts = [(0.32, -1.05), (0.24, -0.9), (0.16, -0.65), (0.1, -0.6), (0.06, -1.2)]
    colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.8, len(starts)))
    for axis, name, shift in zip(axes, ("BN", "psBN, α = 0.1"), (0.0, ALPHA), strict=True):
        axis.set(xlabel="γ", ylabel="what is added: β + α" if shift else "what is added: β")
        axis.set(xlim=(0, 0.36), ylim=(-1.45, 0.3), title=name)
        _silent_region(axis, np.linspace(0, 0.36, 101))
        for (gamma0, added), color in zip(starts, colors, strict=True):
            gamma, beta = theory.decay_path(gamma0, added - shift, schedule, weight_decay, momentum)
            axis.plot(gamma, beta + shift, color=color, lw=2)
            axis.plot(gamma0, added, "o", color=color, mec="black", ms=6)
            if shift:
                steps = theory.steps_until_active(
                    gamma0, added - shift, ALPHA, lr, weight_decay, momentum, active_C=SILENT
                )
                at = int(steps)
                axis.plot(gamma[at], beta[at] + shift, "*", color=color, mec="black", ms=12,
                          zorder=5, label=f"after {at:,} steps")  # fmt: skip
        axis.plot(0, shift, "s", color="black", clip_on=False, zorder=6)
        axis.text(0.19, -0.2, "fires", fontsize=9)
        axis.text(0.16, -1.36, "silent: C < −3", fontsize=8, bbox={"fc": "white", "ec": "none"})
    axes[1].legend(title="fires again", fontsize=8, title_fontsize=8, loc="upper right")
    axes[0].annotate("all end at (0, 0), silent to the last", (0, 0), (0.07, 0.15),
                     arrowprops={"arrowstyle": "->"}, fontsize=8)  # fmt: skip
    axes[1].annotate("all end at (0, α), firing", (0, ALPHA), (0.07, 0.22),
                     arrowprops={"arrowstyle": "->"}, fontsize=8)  # fmt: skip
    figure.supxlabel(
        f"SGD, learning rate {lr:g}, momentum {momentum:g}, weight decay {weight_decay:g}",
        fontsize=8,
    )
    return figure


def train_filters(
    gamma: np.ndarray,
    beta: np.ndarray,
    pull: np.ndarray,
    lr: np.ndarray,
    weight_decay: float,
    momentum: float,
    fresh: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Train a real psBN layer with torch's SGD on normal noise under ReLU.

    Args:
        gamma, beta: where its filters start.
        pull: the loss is `-pull` times the mean output of each filter: positive wants it to fire.
        lr: for each step.
        fresh: a new batch of 512 at each step, instead of the same.

    Returns:
        C before each step and at the end, shape (T + 1, filters); the largest |x_hat| on the side
        of gamma's sign in the first batch, which decides when a filter fires on that batch.
    """
    import torch

    from ..norm import psBN1d

    generator = torch.Generator().manual_seed(0)
    layer = psBN1d(len(gamma), alpha=ALPHA, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(gamma))
        layer.beta.copy_(torch.tensor(beta))
    wanted = torch.tensor(pull)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0, momentum, weight_decay=weight_decay)
    x = torch.randn(512, len(gamma), dtype=torch.float64, generator=generator)
    normalized = (x - x.mean(0)) / x.var(0, correction=0).add(layer.eps).sqrt()
    largest = (normalized * torch.tensor(np.sign(gamma))).amax(0).numpy()
    values = []

    def record() -> None:
        C = layer.bias.detach() / layer.weight.detach().abs()
        values.append(C.numpy().copy())

    for eta in lr:
        record()
        if fresh:
            x.normal_(generator=generator)
        optimizer.param_groups[0]["lr"] = float(eta)
        optimizer.zero_grad()
        (-wanted * torch.relu(layer(x)).mean(0)).sum().backward()
        optimizer.step()
    record()
    return np.stack(values), largest


def draw_forecast() -> Figure:
    """Forecasts and real training: where they agree to the step, and where a gradient decides."""
    figure, (left, right) = _figure(2, "The forecast and a real psBN layer under torch's SGD")
    steps, weight_decay, momentum = 8_000, 5e-4, 0.9
    lr = 0.05 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    options: dict[str, Any] = dict(weight_decay=weight_decay, momentum=momentum)

    gamma, beta = np.array([0.05, 0.1, 0.15, 0.2]), np.array([-0.35, -0.6, -0.75, -0.9])
    trained, largest = train_filters(gamma, beta, np.zeros(4), lr, fresh=False, **options)
    forecast = theory.C(*theory.decay_path(gamma, beta, lr, **options), ALPHA)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, 4))
    every = slice(None, None, 250)
    for i, color in enumerate(colors):
        at = theory.steps_until_active(
            gamma[i], beta[i], ALPHA, lr, active_C=-largest[i], **options
        )
        left.plot(forecast[:, i], color=color, label=f"γ = {gamma[i]:g}, β = {beta[i]:g}")
        left.plot(np.arange(steps + 1)[every], trained[every, i], "o", color=color, ms=3.5)
        if np.isfinite(at):
            left.plot(at, -largest[i], "*", color=color, ms=12, mec="black", mew=0.5)
    apart = np.abs(trained - forecast).max()
    left.set(title=f"no gradient: apart by at most {apart:.0e}", ylim=(-6, 1.6))

    # Up to where gamma, which the loss pushes down too, comes near 0.
    shown = 3_500
    gamma, beta = np.full(4, 0.15), np.full(4, -0.45)
    pull = np.array([0.0, 3e-4, -3e-4, -1e-3])
    trained, _ = train_filters(gamma, beta, pull, lr[:shown], fresh=True, **options)
    forecast = theory.C(*theory.decay_path(gamma[0], beta[0], lr[:shown], **options), ALPHA)
    right.plot(forecast, color="black", label="forecast: decay alone")
    names = ("no gradient", "wanted by the loss", "unwanted", "unwanted, 3 times as much")
    for i, name in enumerate(names):
        color = (_GREY, _BLUE, "#e08a3c", _RED)[i]
        dots = np.arange(0, shown + 1, 125)
        right.plot(dots, trained[dots, i], "o-", ms=3, color=color, label=name)
    right.set(title="fires on 1 % of its inputs at first: a gradient decides", ylim=(-3.5, 1.6))
    for axis in (left, right):
        axis.axhline(SILENT, color=_GREY, lw=0.8, ls=":")
        axis.set(xlabel="step", ylabel="C = (β + α) / |γ|")
    left.legend(
        title="lines: forecast; dots: training;\nstar: fires again, to the step",
        fontsize=8,
        title_fontsize=8,
        loc="lower right",
    )
    right.legend(fontsize=8, loc="upper left")
    figure.supxlabel("cosine lr from 0.1, momentum 0.9, decay 5e-4, α = 0.1", fontsize=8)
    return figure


FIGURES = {
    "theory_K": draw_K,
    "theory_drift": draw_drift,
    "theory_decay": draw_decay,
    "theory_forecast": draw_forecast,
}
