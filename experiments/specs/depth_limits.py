"""Appendix H: without batch norm, the largest stable learning rate falls with depth."""

from typing import Any

from . import NETWORKS, RATES, SEARCH, Claim, Run, Spec, above, between, each

DEPTHS = (8, 14, 20, 32, 56, 110)
DEEP = 56  # the depth of most claims: small enough for every scale
NORMS = ("batch", "none")


def named(label: str) -> str:
    norm, _, depth = label.partition("-")
    return f"{NETWORKS[norm]}, depth {depth}"


def gap(first: str, second: str, check) -> Claim:
    text = f"log10 of the largest stable rate: {named(first)} minus {named(second)}"
    return Claim(text, lambda results: results.gap("limit", first, second), None, check)


def net(norm: str, depth: int) -> Run:
    return Run(f"{norm}-{depth}", "rates", norm, depth=depth, seeds=5, options=SEARCH)


def scaled(steps: int, **changes: Any):
    return lambda run: {"images": steps * changes.get("batch", run.batch)} | changes


SPEC = Spec(
    title="How does the largest stable learning rate depend on depth?",
    of="Appendix H",
    order=4.8,
    headline="log10 of the largest stable rate: no batch norm, depth 8 minus no batch norm, depth 110",
    shows="Without batch norm, shallower networks can be trained with much larger learning rates. Activations that "
    "grow with every layer limit the rate.",
    method="Learning rates from 1e-6 to 100, eight in each decade, at depths 8 to 110. Every rate is a run of its own "
    "of one epoch, from the same initialisation, with momentum and weight decay as in Figure 1 and without drops of "
    "the rate. A rate is stable if every loss after the first step is finite and at most 1e3. The largest one is found "
    "by bisection. The network learns at a rate if the rate is stable and the mean loss of the last quarter is 0.05 "
    "below the first loss and below that of guessing. The largest one is searched downwards from the stable one. The "
    "text of Appendix H was not available to us, so its depths and rates are not known.",
    claims=(
        gap("none-8", f"none-{DEEP}", above(0.4)),
        gap("none-8", "none-110", above(0.4)),
        gap("batch-8", f"batch-{DEEP}", between(-0.6, 0.6)),
        gap(f"batch-{DEEP}", f"none-{DEEP}", above(0.9)),
        *(
            Claim(
                f"log10 of the largest rate at which it learns: {NETWORKS[n]}, depth {d}",
                each("learning limit", label=f"{n}-{d}"),
            )
            for n in NORMS
            for d in DEPTHS
        ),
    ),
    runs=tuple(net(norm, depth) for norm in NORMS for depth in DEPTHS),
    smaller={
        "smoke": lambda run: {"depth": 8, "images": 16, "batch": 8, "seeds": 1, "lrs": (1e-3, 1)},
        "quick": scaled(20, batch=32, seeds=1, lrs=RATES[::8]),
        "reduced": scaled(50, seeds=3),
    },
    reduction={
        "quick": "20 steps of 32 images instead of an epoch, one rate in each decade, one seed.",
        "reduced": "50 steps of 128 images instead of an epoch, three seeds instead of five.",
    },
    minutes={"quick": 1.5, "reduced": 170},
    thresholds="Set on 2026-11-22 without a trial. The rates went from 1e-5 to 1 at first. They were extended on "
    "2026-11-28, because networks had reached either end. On 2026-11-29 the grid became four times as fine, and the "
    "margin of 0.05 was added.",
)
