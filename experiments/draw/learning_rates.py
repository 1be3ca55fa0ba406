"""Figure 1: accuracy during training at several learning rates, with and without batch norm."""

from matplotlib.figure import Figure

from .curves import of_runs, panels

CAPTION = (
    "Accuracy over the share of training that is done, mean and standard deviation over seeds. Above on the test set, "
    "below on the training batches. Hollow: the paper's final values, if the axis reaches them. Runs that diverged "
    "have no line."
)
STYLES = {  # label: text, colour, marker
    "batch-0.1": ("batch norm, 0.1", 0, "o"),
    "batch-0.003": ("batch norm, 0.003", 4, "^"),
    "batch-0.0001": ("batch norm, 0.0001", 2, "v"),
    "none-0.0001": ("no batch norm, 0.0001", 1, "s"),
    "fixup-0.1": ("Fixup, 0.1", 3, "P"),
}


def tables(spec, results) -> dict:
    """The curves, a row for each evaluation, and the end of every run."""
    curves, ends = of_runs(results, [run.label for run in spec.runs], {k: v[0] for k, v in spec.paper.items()})
    return {"learning_rates": curves, "learning_rates_final": ends}


def draw(rows) -> Figure:
    return panels(rows, STYLES)
