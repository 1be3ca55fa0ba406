"""Figure 6: the gradient at the logits, image by image."""

import numpy as np
from matplotlib.figure import Figure

from . import NETS, Rows, column, nearest_to_median

CAPTION = (
    "Above: B dL/dlogits, a row for each image of the batch and a column for each class. Orange entries reduce a logit "
    "and purple ones raise it. A full orange column is a class to which the network assigns nearly all images with "
    "certainty. The seed is the one whose largest column mean with batch norm is nearest to the median. Below: the "
    "largest of the ten column means, as the number of seeds. The markers are the seed of the maps."
)
ORDER = ("none", "batch")  # as in the paper's figure
BINS = 25


def tables(spec, results) -> dict[str, Rows]:
    """The gradients of one seed times the batch, and the largest column mean, entropy and cosine of every seed."""
    classes, pictures, seeds = 10, [], []
    shown = _typical(results)
    for norm in NETS:
        for run in results.where(norm=norm):
            seed, gradient = run.config["seed"], run.at("gradient") * len(run.at("gradient"))
            row = {"norm": norm, "seed": seed, "shown": int(seed == shown)}
            largest = run.at("largest column mean").item()
            pictures.append(row | {"image": -1, "largest": largest} | {f"class {k}": None for k in range(classes)})
            seeds.append(
                {"norm": norm, "seed": seed, "largest column mean": largest}
                | {name: run.at(name).item() for name in ("entropy", "cosine")}
            )
            for image, values in enumerate(gradient) if seed == shown else ():
                values = {f"class {k}": value for k, value in enumerate(values)}
                pictures.append(row | {"image": image, "largest": None} | values)
    return {"output_gradients": pictures, "output_gradients_seeds": seeds}


def _typical(results) -> int | None:
    """The seed with the value nearest to the median with batch norm."""
    runs = results.where(norm="batch") or results.where(norm="none")
    if not runs:
        return None
    return nearest_to_median(runs, lambda run: run.at("largest column mean").item()).config["seed"]


def draw(rows: Rows) -> Figure:
    """Two heat maps with one colour scale from -1 to 1, and the seeds below."""
    figure = Figure(figsize=(5.4, 6.2))
    maps = [row for row in rows if row["image"] >= 0]
    nets = [norm for norm in ORDER if column(maps, "image", norm=norm)]
    classes = [key for key in rows[0] if key.startswith("class")]
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 1.4))[:, 0]
    panels = above.subplots(1, len(nets), sharey=True, squeeze=False)[0]
    for axes, norm in zip(panels, nets, strict=True):
        values = [[row[key] for key in classes] for row in maps if row["norm"] == norm]
        picture = axes.imshow(
            values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="none", origin="lower"
        )
        axes.set_title(NETS[norm][0], loc="left", fontsize=10)
        axes.set_xlabel("class")
        axes.set_xticks(range(len(classes)))
        axes.grid(False)
    panels[0].set_ylabel(f"image (seed {maps[0]['seed']})")
    above.colorbar(picture, ax=panels, label="B dL/dlogits", fraction=0.06)
    axes = below.subplots()
    edges = np.linspace(0, 1, BINS + 1)
    for norm in nets:
        text, colour, marker = NETS[norm]
        selected = [row for row in rows if row["image"] < 0 and row["norm"] == norm]
        counts, _ = np.histogram(column(selected, "largest"), edges)
        axes.stairs(counts, edges, color=colour, fill=True, alpha=0.35)
        axes.stairs(counts, edges, color=colour, linewidth=1.2, label=text)
        axes.plot(column(selected, "largest", shown=1), [0], marker, color=colour, markersize=9, clip_on=False)
    axes.set(xlim=(0, 1.02), ylim=(0, None), xlabel="largest column mean of B dL/dlogits", ylabel="seeds")
    axes.legend(loc="upper center")
    return figure
