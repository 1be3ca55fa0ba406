"""What a flight recorder's files say: which value was the first that is not finite or passes a limit, and where.

The order within a step is: parameters, forward pass, loss, backward pass, gradients of parameters. The layers of the
forward pass are in the order of their calls, and those of the backward pass in the reverse order.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import Recording, load

FLIGHT = "flight.json"
LIMITS = ("loss", "abs_max", "gradient", "update", "active")
SHOWN = 4  # layers, and steps, that a report lists before the fault


class Event(NamedTuple):
    """A faulty value. ``what`` says it in words."""

    row: int  # of the recording
    step: int
    phase: str  # "parameters", "forward", "loss", "backward" or "gradients"
    name: str  # of the layer or parameter; "" for the loss
    channel: int | None
    what: str


class Diagnosis(NamedTuple):
    """The first fault of a recording, in one sentence, and the numbers around it.

    ``events`` are the faults of its step, in the order in which they occurred. It is empty if there is no fault.
    ``flight`` has all steps.
    """

    reason: str  # "fault", "asked", or the exception that ended the training
    rank: int | None
    sentence: str
    events: list[Event]
    table: list[str]
    flight: "Flight"

    def text(self) -> str:
        """The sentence, the numbers around the fault, and what followed in the same step."""
        lines = [self.sentence, ""]
        if self.events and self.reason not in ("fault", "asked"):
            lines += [f"The training ended with {self.reason.rstrip('.')}.", ""]
        lines += self.table
        places = groupby(self.events, lambda event: (event.phase, event.name))
        further = [list(events) for _, events in places][1:]
        if further:
            lines += ["", "Further faults of this step, in order:"]
            for events in further[: 2 * SHOWN]:
                others = f"; {len(events) - 1} other channels too" if len(events) > 1 else ""
                lines.append(f"  {describe(events[0])}{others}")
            if len(further) > 2 * SHOWN:
                lines.append(f"  ... and in {len(further) - 2 * SHOWN} more layers or parameters")
        return "\n".join(lines) + "\n"


def diagnose(folder: str | PathLike) -> Diagnosis:
    """Reads a flight recorder's folder. With ``rank0``, ``rank1``, ... in it, the earliest fault of all ranks counts.

    Raises a FileNotFoundError if there is no report.
    """
    folder = Path(folder)
    ranks = sorted(folder.glob("rank*/"), key=lambda path: int(path.name.removeprefix("rank")))
    if ranks and not (folder / FLIGHT).exists():
        every = [diagnose(rank) for rank in ranks]
        return min(every, key=_when)
    if not (folder / FLIGHT).exists():
        raise FileNotFoundError(f"no report of a flight recorder in {folder}: there is no {FLIGHT}")
    flight = json.loads((folder / FLIGHT).read_text())
    flown = Flight(load(folder), flight["order"], flight["limits"])
    first = next((events for step in np.unique(flown.steps) if (events := list(flown.events(int(step))))), [])
    rank = "" if flight["rank"] is None else f" on rank {flight['rank']}"
    if not first:
        count = len(np.unique(flown.steps))
        sentence = f"No value in the last {count} steps{rank} is infinite, NaN or beyond a limit."
        if flight["reason"] not in ("fault", "asked"):
            sentence = f"The training ended with {flight['reason'].rstrip('.')}. {sentence}"
        return Diagnosis(flight["reason"], flight["rank"], sentence, [], [], flown)
    event = first[0]
    sentence = f"First seen at step {event.step}{rank}, {describe(event)}{flown.before(event)}."
    return Diagnosis(flight["reason"], flight["rank"], sentence, first, flown.table(event), flown)


def describe(event: Event) -> str:
    """The event in words, without its step."""
    where = {
        "parameters": f"in the parameters: {event.name}",
        "forward": f"in the forward pass: the input of layer {event.name}",
        "loss": "in the loss:",
        "backward": f"in the backward pass: the gradient at the input of layer {event.name}",
        "gradients": f"in the gradients of parameters: that of {event.name}",
    }[event.phase]
    channel = "" if event.channel is None else f", channel {event.channel}"
    return f"{where}{channel} {event.what}" if event.phase == "loss" else f"{where}{channel}, {event.what}"


class Flight:
    """The recorded steps, with the layers in the order of their calls."""

    def __init__(self, recording: Recording, order: list[str], limits: dict[str, float]) -> None:
        self.steps, self.limits = recording.steps, limits
        activations, gradients = (
            recording[name] if name in recording.quantities else {}
            for name in ("activation_moments", "gradient_channel_signs")
        )
        self.layers = [layer for layer in order if layer in activations]
        self.activations, self.gradients = activations, gradients
        self.parameters: dict[str, np.ndarray] = recording["parameter_norms"].get("", {})
        self.names: list[str] = recording.index["quantities"]["parameter_norms"]["options"]["names"]
        self.losses: dict[str, np.ndarray] = recording["loss"].get("", {})

    def events(self, step: int) -> Iterator[Event]:
        """The faults of a step, in their order. A layer may be called several times in it, each a row."""
        rows = [int(row) for row in np.flatnonzero(self.steps == step)]
        first, last = rows[0], rows[-1]  # the first one has the parameters and the loss
        for name, what in self._parameters(first):
            yield Event(first, step, "parameters", name, None, what)
        for row in rows:
            for layer in self.layers:
                yield from (Event(row, step, "forward", layer, *found) for found in self._forward(row, layer))
            if row == last:
                yield from (Event(first, step, "loss", "", None, what) for what in self._loss(first))
            for layer in reversed(self.layers):
                if layer in self.gradients:
                    yield from (Event(row, step, "backward", layer, *found) for found in self._backward(row, layer))
        for name, what in self._gradients(first):
            yield Event(first, step, "gradients", name, None, what)

    def before(self, event: Event) -> str:
        """What the layers before a fault look like, as the end of a sentence."""
        earlier = self._earlier(event)
        if not earlier:
            return ""
        arrays, key = (self.activations, "abs_max") if event.phase != "backward" else (self.gradients, "rms")
        largest = {layer: float(np.nanmax(magnitude(arrays[layer], key, event.row))) for layer in earlier}
        layer = max(largest, key=lambda name: largest[name])
        what, unit = ("inputs", "|x|") if key == "abs_max" else ("gradients", "root mean square")
        return (
            f"; the {what} of the {len(earlier)} layers before it in the pass are finite"
            f" (largest {unit} of a channel: {largest[layer]:.3g}, in {layer})"
        )

    def table(self, event: Event) -> list[str]:
        """Numbers of the last layers before the fault in its step, and of the layer itself in the last steps."""
        if event.phase not in ("forward", "backward"):
            return []
        layers = [*self._earlier(event)[-SHOWN:], event.name]
        rows = [(event.row, layer) for layer in layers]
        rows += [(row, event.name) for row in range(max(event.row - SHOWN, 0), event.row)]
        titles = ("step", "layer", "largest |x|", "variance", "above zero", "x not finite", "gradient", "not finite")
        cells = [titles, *(self._cells(row, layer) for row, layer in rows)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(titles))]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
        return ["  ".join(line).rstrip() for line in padded]

    def _cells(self, row: int, layer: str) -> tuple[str, ...]:
        x, gradient = self.activations[layer], self.gradients.get(layer)
        of_gradient = ("", "")
        if gradient is not None:
            rms = _largest(magnitude(gradient, "rms", row))
            of_gradient = f"{rms:.3g}", f"{np.nansum(gradient['nonfinite'][row]):.0f}"
        return (
            str(self.steps[row]),
            layer,
            f"{_largest(x['abs_max'][row]):.3g}",
            f"{x['var'][row].mean():.3g}",
            f"{100 * x['active_fraction'][row].mean():.1f} %",
            f"{np.nansum(x['nonfinite'][row]):.0f}",
            *of_gradient,
        )

    def _earlier(self, event: Event) -> list[str]:
        """The layers before an event in its pass."""
        if event.phase == "forward":
            return self.layers[: self.layers.index(event.name)]
        if event.phase == "backward":
            order = [layer for layer in reversed(self.layers) if layer in self.gradients]
            return order[: order.index(event.name)]
        return []

    def _parameters(self, row: int) -> Iterator[tuple[str, str]]:
        if not self.parameters:  # no forward was recorded
            return
        weights, relative = (self.parameters[key][row] for key in ("weight", "relative_update"))
        limit = self.limits.get("update", np.inf)
        for k, name in enumerate(self.names):
            if np.isinf(weights[k]):
                yield name, "is not finite"
            elif relative[k] > limit:
                yield name, f"has an update of {relative[k]:.3g} times its norm, above {limit:g}"

    def _forward(self, row: int, layer: str) -> Iterator[tuple[int | None, str]]:
        x = {name: values[row] for name, values in self.activations[layer].items()}
        for channel in np.flatnonzero(x["nonfinite"] > 0):
            low, high, count = x["min"][channel], x["max"][channel], x["nonfinite"][channel]
            value = "inf" if np.isposinf(high) else "-inf" if np.isneginf(low) else "NaN"
            yield int(channel), f"has {count:.0f} of {x['count'][channel]:.0f} values that are not finite ({value})"
        finite = x["nonfinite"] == 0
        limit = self.limits.get("abs_max", np.inf)
        for channel in np.flatnonzero(finite & (x["abs_max"] > limit)):
            yield int(channel), f"has a value of magnitude {x['abs_max'][channel]:.4g}, above {limit:g}"
        share, least = x["active_fraction"].mean(), self.limits.get("active", 0.0)
        if share < least:
            yield None, f"gives an output of which {100 * share:.2f} % is above zero, less than {100 * least:g} %"

    def _backward(self, row: int, layer: str) -> Iterator[tuple[int, str]]:
        dx = {name: values[row] for name, values in self.gradients[layer].items()}
        for channel in np.flatnonzero(dx["nonfinite"] > 0):
            value = _value(dx["sum"][channel]) if np.isinf(dx["abs_sum"][channel]) else "NaN"
            count = dx["nonfinite"][channel]
            yield int(channel), f"has {count:.0f} of {dx['count'][channel]:.0f} values that are not finite ({value})"

    def _loss(self, row: int) -> Iterator[str]:
        if not self.losses:  # none was passed
            return
        loss, limit = self.losses["loss"][row], self.limits.get("loss", np.inf)
        if self.losses["finite"][row] == 0:
            yield f"it is {_value(loss)}"
        elif loss > limit:
            yield f"it is {loss:.4g}, above {limit:g}"

    def _gradients(self, row: int) -> Iterator[tuple[str, str]]:
        if not self.parameters:
            return
        norms, limit = self.parameters["gradient"][row], self.limits.get("gradient", np.inf)
        for name, norm in reversed(list(zip(self.names, norms, strict=True))):
            if np.isinf(norm):
                yield name, "is not finite"
            elif norm > limit:
                yield name, f"has the norm {norm:.4g}, above {limit:g}"


def _when(diagnosis: Diagnosis) -> tuple[float, int, int]:
    """The place of the first fault in the order of steps, phases and layers, infinite without a fault."""
    if not diagnosis.events:
        return float("inf"), 0, 0
    event, layers = diagnosis.events[0], diagnosis.flight.layers
    place = layers.index(event.name) if event.name in layers else 0
    phases = ("parameters", "forward", "loss", "backward", "gradients")
    return event.step, phases.index(event.phase), -place if event.phase == "backward" else place


def _value(value: float) -> str:
    return "NaN" if np.isnan(value) else "inf" if value > 0 else "-inf"


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if not np.isnan(values).all() else float("nan")


def magnitude(arrays: dict[str, np.ndarray], key: str, row: int) -> np.ndarray:
    """The magnitudes [C] of a layer in a row: ``abs_max``, or ``rms``, the root mean square."""
    if key == "abs_max":
        return arrays["abs_max"][row]
    return np.sqrt(arrays["square_sum"][row] / np.maximum(arrays["count"][row], 1))
