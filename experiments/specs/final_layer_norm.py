"""Section 4 and Appendix E: one batch norm after the last block gives most of what batch norms everywhere give."""

from typing import Any

from . import Claim, Measured, Run, Spec, above, between, each, reduced, shortened

NETS = {"batch-0.1": ("batch", 0.1, 165), "final-0.03": ("final", 0.03, 330), "none-0.0001": ("none", 0.0001, 2400)}
PAPER = {"batch-0.1": 93.3, "final-0.03": 90.1, "none-0.0001": 82.0}
LIMITS = ("none", "final", "batch")
RATES = tuple(10 ** (k / 4) for k in range(-14, 9))  # 0.0003 to 100


def gap(first: str, second: str, quantity: str = "test accuracy", paper: float | None = None) -> Claim:
    text = f"{'log10 of the largest rate borne' if quantity == 'limit' else quantity}: {first} less {second}"
    return Claim(text, lambda results: results.gap(quantity, first, second), paper, above(0))


def share(results: Measured) -> list:
    """Of the gain from no batch norm to batch norms everywhere, that of the last one alone."""
    part, whole = (results.gap("test accuracy", first, "none-0.0001") for first in ("final-0.03", "batch-0.1"))
    return [a.over(b) for a, b in zip(part, whole, strict=False)]


def scaled(depth: int, factor: float, steps: int, rates=RATES, **changes: Any):
    """Trained runs with the epochs times ``factor``, and the search for limits over one epoch of ``steps`` steps."""

    trained = shortened(depth, factor, **changes)

    def change(run: Run) -> dict:
        images = steps * changes.get("batch", run.batch)
        return {"depth": depth, **changes, "images": images, "lrs": rates} if "lrs" in run.options else trained(run)

    return change


def small(run: Run) -> dict:
    """The changes for scale reduced."""
    return {"images": 100 * run.batch} if "lrs" in run.options else reduced(seeds=3)(run)


SPEC = Spec(
    title="Is the normalisation of the output alone enough?",
    of="Section 4 and Appendix E",
    order=4.7,
    shows="With a single batch norm, on the output of the last residual block, rates of up to 0.03 can be used and "
    "the test accuracy is 90.1 %: about two thirds of the gain from 82.0 % without to 93.3 % with batch norm "
    "everywhere.",
    method="The batch norm acts on the last block's output, before the mean over places. Training as for Figure 1. "
    "The paper gives no number of epochs for it: twice those of 0.1 are our choice. Largest learning rates: four to a "
    "decade, each run for one epoch (100 steps at scale reduced, 20 at quick), without drops; a rate is borne if no "
    "loss is above 1e3. Scale full and reduced: ResNet-110, reduced with images and epochs as for Figure 1. Quick: "
    "ResNet-8, 5,000 images, epochs times 2/165.",
    claims=(
        gap("limit-final", "limit-none", "limit"),
        gap("limit-batch", "limit-final", "limit"),
        gap("final-0.03", "none-0.0001", "test accuracy", 8.1),
        gap("batch-0.1", "final-0.03", "test accuracy", 3.2),
        Claim("share of batch norm's gain", share, 0.72, between(0.4, 0.95)),
        *(Claim(f"test accuracy, {k}", each("test accuracy", label=k), v) for k, v in PAPER.items()),
    ),
    runs=(
        *(Run(label, "training", n, seeds=5, options={"lr": r, "epochs": e}) for label, (n, r, e) in NETS.items()),
        *(Run(f"limit-{n}", "training", n, seeds=3, options={"lrs": RATES, "epochs": 1}) for n in LIMITS),
    ),
    smaller={
        "smoke": scaled(8, 0, 2, batch=32, images=64, tests=50, seeds=1, rates=(1e-3, 1)),
        "quick": scaled(8, 2 / 165, 20, rates=RATES[::2], images=5000, seeds=1),
        "reduced": small,
    },
    minutes={"quick": 2.5, "reduced": 900},
    paper=PAPER,
)
