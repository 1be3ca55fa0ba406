"""The figure of a flight recorder's report: layers by steps. It needs matplotlib, which is optional."""

import textwrap
from pathlib import Path

import numpy as np

from .diagnosis import Diagnosis, Flight, magnitude

RED = "#c1121f"


def draw(diagnosis: Diagnosis, out: Path) -> None:
    """Draws the largest input of each layer and the root mean square of its gradient, by step, and marks the fault.

    Raises an ImportError without matplotlib.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    flight = diagnosis.flight
    steps, layers = flight.steps, flight.layers
    figure = Figure(figsize=(max(7.0, 0.09 * len(steps) + 4), max(3.5, 0.16 * len(layers) + 1.6)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    first = diagnosis.events[0] if diagnosis.events else None
    for axes, (title, values, phases) in zip(panels, _panels(flight), strict=True):
        positive = values[np.isfinite(values) & (values > 0)]
        norm = LogNorm(positive.min(), positive.max()) if positive.size else None
        colours = axes.pcolormesh(
            np.ma.masked_where(~np.isfinite(values) | (values <= 0), values), norm=norm, cmap="viridis"
        )
        faulty = np.ma.masked_where(np.isfinite(values) | np.isnan(values), np.ones_like(values))
        axes.pcolormesh(faulty, cmap=_single(RED))
        if first is not None and first.phase in phases and first.name in layers:
            axes.plot(first.row + 0.5, layers.index(first.name) + 0.5, marker="x", color="white", mew=3, ms=9)
            axes.plot(first.row + 0.5, layers.index(first.name) + 0.5, marker="x", color=RED, mew=1.5, ms=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).astype(int))
        axes.set_xticks(ticks + 0.5, [str(steps[k]) for k in ticks])
        figure.colorbar(colours, ax=axes)
    shown = range(0, len(layers), max(1, len(layers) // 40))
    panels[0].set_yticks([k + 0.5 for k in shown], [layers[k] for k in shown], fontsize=7)
    panels[0].invert_yaxis()
    title = f"{diagnosis.sentence.split(';')[0].rstrip('.')}. Red: not finite."
    title = textwrap.fill(title, int(14 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(out, dpi=150)


def _panels(flight: Flight) -> list[tuple[str, np.ndarray, tuple[str, ...]]]:
    """Title, values [layer, step] (inf where a value is not finite, NaN without a record), and the phases shown."""
    activations = np.full((len(flight.layers), len(flight.steps)), np.nan)
    gradients = activations.copy()
    for k, layer in enumerate(flight.layers):
        for row in range(len(flight.steps)):
            activations[k, row] = _worst(flight.activations[layer], "abs_max", row)
            if layer in flight.gradients:
                gradients[k, row] = _worst(flight.gradients[layer], "rms", row)
    return [
        ("largest |x| of a layer's input", activations, ("forward",)),
        ("gradient at the input, root mean square", gradients, ("backward",)),
    ]


def _worst(arrays: dict[str, np.ndarray], key: str, row: int) -> float:
    if np.nansum(arrays["nonfinite"][row]) > 0:
        return np.inf
    values = magnitude(arrays, key, row)
    return float(np.nanmax(values)) if not np.isnan(values).all() else np.nan


def _single(colour: str):
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])
