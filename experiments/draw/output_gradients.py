"""Figure 6: the gradient at the logits, image by image."""

from matplotlib.figure import Figure

from . import NETS, Rows, column

CAPTION = (
    "B dL/dlogits of seed 0, a row for each image of the batch and a column for each class: orange pushes a logit "
    "down, purple up. A full orange column is a class that the network gives to nearly all images with certainty."
)


def tables(spec, results) -> dict[str, Rows]:
    """The gradients of the first seed, times the batch; and how uneven those of each seed are."""
    pictures, seeds = [], []
    for norm in NETS:
        runs = results.where(norm=norm)
        for image, gradient in enumerate(runs[0].at("gradient") * len(runs[0].at("gradient")) if runs else ()):
            row = {"norm": norm, "image": image}
            pictures.append(row | {f"class {k}": value for k, value in enumerate(gradient)})
        seeds += [
            {"norm": norm, "seed": run.config["seed"]}
            | {name: run.at(name).item() for name in ("largest column mean", "entropy", "cosine")}
            for run in runs
        ]
    return {"output_gradients": pictures, "output_gradients_seeds": seeds}


def draw(rows: Rows) -> Figure:
    """Two pictures side by side in one scale of colours, from -1 to 1."""
    figure = Figure(figsize=(5.4, 4.8))
    nets = [norm for norm in NETS if column(rows, "image", norm=norm)]
    classes = [key for key in rows[0] if key.startswith("class")]
    panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
    for axes, norm in zip(panels, nets, strict=True):
        values = [[row[key] for key in classes] for row in rows if row["norm"] == norm]
        picture = axes.imshow(
            values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="none", origin="lower"
        )
        axes.set_title(NETS[norm][0], loc="left", fontsize=10)
        axes.set_xlabel("class")
        axes.set_xticks(range(len(classes)))
        axes.grid(False)
    panels[0].set_ylabel("image")
    figure.colorbar(picture, ax=panels, label="B dL/dlogits", fraction=0.06)
    return figure
