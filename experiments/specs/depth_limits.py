"""Appendix H: without batch norm, deeper networks bear smaller learning rates."""

from typing import Any

from . import Claim, Run, Spec, above, between, each

DEPTHS = (8, 14, 20, 32, 56, 110)
DEEP = 56  # that of the claims: small enough for every scale
NORMS = ("batch", "none")
RATES = tuple(10 ** (k / 2) for k in range(-12, 5))  # 1e-6 to 100, two to a decade


def gap(first: str, second: str, check) -> Claim:
    text = f"log10 of the largest rate borne: {first} less {second}"
    return Claim(text, lambda results: results.gap("limit", first, second), None, check)


def net(norm: str, depth: int) -> Run:
    return Run(f"{norm}-{depth}", "training", norm, depth=depth, seeds=5, options={"lrs": RATES, "epochs": 1})


def scaled(steps: int, **changes: Any):
    return lambda run: {"images": steps * changes.get("batch", run.batch)} | changes


SPEC = Spec(
    title="How large a learning rate does a network of a given depth bear?",
    of="Appendix H",
    order=4.8,
    shows="Without batch norm, shallower networks bear much larger learning rates: activations that grow with every "
    "layer are what limits the rate. (The appendix was not at hand; its depths and rates are not known.)",
    method="Depths 8 to 110, learning rates two to a decade from 1e-6 to 100. Each is a run of its own from the same "
    "initialisation, with momentum and weight decay as in Figure 1 and without drops: one epoch at scale full, "
    "100 steps at reduced, 20 steps of 32 images at quick. A rate is borne if no loss after the first step is "
    "above 1e3 or not finite; it teaches if, besides, the mean loss of the last quarter is below the first loss and "
    "below that of guessing.",
    claims=(
        gap("none-8", f"none-{DEEP}", above(0.4)),
        gap("none-8", "none-110", above(0.4)),
        gap("batch-8", f"batch-{DEEP}", between(-0.6, 0.6)),
        gap(f"batch-{DEEP}", f"none-{DEEP}", above(0.9)),
        *(
            Claim(
                f"log10 of the largest rate that teaches, {n}-{d}",
                each("learning limit", label=f"{n}-{d}"),
            )
            for n in NORMS
            for d in DEPTHS
        ),
    ),
    runs=tuple(net(norm, depth) for norm in NORMS for depth in DEPTHS),
    smaller={
        "smoke": lambda run: {"depth": 8, "images": 16, "batch": 8, "seeds": 1, "lrs": (1e-3, 1)},
        "quick": scaled(20, batch=32, seeds=1, lrs=RATES[::2]),
        "reduced": scaled(100, seeds=3),
    },
    minutes={"quick": 4, "reduced": 300},
    thresholds="Set on 2026-11-22 without a trial. On 2026-11-28 the rates, from 1e-5 to 1 before, were extended on "
    "both sides, since networks had reached either end.",
)
