"""Section 4 and Appendix E: one batch norm after the last block has most of the effect of batch norm everywhere."""

from typing import Any

from . import (
    NETWORKS,
    QUICK_TEXT,
    RATES,
    SEARCH,
    Claim,
    Measured,
    Run,
    Spec,
    above,
    at_rate,
    between,
    each,
    quick,
    reduced,
    shortened,
    with_searches,
)

NETS = {"batch-0.1": ("batch", 0.1, 165), "final-0.03": ("final", 0.03, 330), "none-0.0001": ("none", 0.0001, 2400)}
PAPER = {"batch-0.1": 93.3, "final-0.03": 90.1, "none-0.0001": 82.0}
SMOKE: dict[str, Any] = dict(batch=32, images=64, tests=50, seeds=1)


def limit_gap(first: str, second: str) -> Claim:
    text = f"log10 of the largest stable rate: {NETWORKS[first]} minus {NETWORKS[second]}"
    return Claim(text, lambda results: results.gap("limit", f"limit-{first}", f"limit-{second}"), None, above(0))


def gap(first: str, second: str, paper: float) -> Claim:
    text = f"test accuracy, {at_rate(first)} minus {at_rate(second)}"
    return Claim(text, lambda results: results.gap("test accuracy", first, second), paper, above(0))


def share(results: Measured) -> list:
    """The share of batch norm's gain in accuracy that one batch norm at the end reaches."""
    part, whole = (results.gap("test accuracy", first, "none-0.0001") for first in ("final-0.03", "batch-0.1"))
    return [a.over(b) for a, b in zip(part, whole, strict=False)]


SPEC = Spec(
    title="Is it enough to normalise the output?",
    of="Section 4 and Appendix E",
    order=4.7,
    headline="test accuracy, one batch norm at lr 0.03",
    shows="With a single batch norm, at the output of the last residual block, rates of up to 0.03 can be used and "
    "the test accuracy is 90.1 %. This is about two thirds of the gain from 82.0 % without batch norm to 93.3 % with "
    "batch norm everywhere.",
    method="The single batch norm acts on the output of the last block, before the mean over positions. Training is "
    "as for Figure 1, and its runs serve for the other networks. The paper gives no epochs for this one; we use twice "
    "those of the rate 0.1. The largest stable rate is searched among eight in each decade, in an epoch without drops.",
    claims=(
        limit_gap("final", "none"),
        limit_gap("batch", "final"),
        gap("final-0.03", "none-0.0001", 8.1),
        gap("batch-0.1", "final-0.03", 3.2),
        Claim("share of batch norm's gain", share, 0.72, between(0.4, 0.95)),
        *(Claim(f"test accuracy, {at_rate(k)}", each("test accuracy", label=k), v) for k, v in PAPER.items()),
    ),
    runs=(
        *(Run(label, "training", n, seeds=5, options={"lr": r, "epochs": e}) for label, (n, r, e) in NETS.items()),
        *(Run(f"limit-{n}", "rates", n, seeds=3, options=SEARCH) for n in ("none", "final", "batch")),
    ),
    smaller={
        "smoke": with_searches(shortened(8, 0, **SMOKE), 2, depth=8, lrs=(1e-3, 1), **SMOKE),
        "quick": with_searches(quick, 20, depth=8, lrs=RATES[::4], seeds=1),
        "reduced": with_searches(reduced(seeds=3), 50),
    },
    reduction={
        "quick": QUICK_TEXT + " 20 steps of 128 images at rates of two in each decade.",
        "reduced": "ResNet-110, images and epochs as for Figure 1 at this scale, 50 steps for each rate, three seeds.",
    },
    minutes={"quick": 1.5, "reduced": 900, "full": 117_000},
    paper=PAPER,
)
