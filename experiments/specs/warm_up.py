"""Beyond the paper: is the limit of the learning rate without batch norm a transient of the first steps?"""

from . import REDUCED, Claim, Run, Spec, above, below, each

RATES = (0.003, 0.01, 0.1)
WARM_UPS = (0, 10, 50, 200)  # steps
LONGEST = WARM_UPS[-1]


def named(rate: float, steps: int) -> str:
    return f"{rate:g}-after-{steps}"


def value(quantity: str, rate: float, steps: int, check=None) -> Claim:
    text = f"{quantity}, lr {rate:g} after {steps} steps at 1e-4"
    return Claim(text, each(quantity, label=named(rate, steps)), None, check)


def net(rate: float, steps: int) -> Run:
    options = {"lr": rate, "warmup": steps, "warmup_lr": 1e-4, "epochs": 165}
    return Run(named(rate, steps), "training", "none", seeds=3, options=options)


SPEC = Spec(
    title="Does a warm-up replace batch norm?",
    of="Beyond the paper: the limit of the learning rate",
    order=4.75,
    headline=f"diverged, lr 0.003 after {LONGEST} steps at 1e-4",
    shows="The paper reports that the network without batch norm diverges at large learning rates, and explains it by "
    "the state at initialisation. It does not say whether the limit rises once the network has left that state. In "
    "Figure 3 the step that the network tolerates grows from 3.5e-4 at mini-batch 1 to 8e-2 at mini-batch 7.",
    method="ResNet-110 without batch norm, as in Figure 1. The first 0, 10, 50 or 200 steps use a rate of 1e-4, and "
    "all others 0.003, 0.01 or 0.1, with drops at half and at three quarters of training. If the limit is a transient, "
    "the network trains at each rate after the longest warm-up: it does not diverge, and it ends above 20 % train "
    "accuracy, twice that of guessing.",
    claims=(
        *(value("diverged", rate, LONGEST, below(0.5)) for rate in RATES),
        *(value("train accuracy", rate, LONGEST, above(20)) for rate in RATES),
        *(value("diverged", rate, steps) for rate in RATES for steps in WARM_UPS[:-1]),
        *(value("steps", rate, steps) for rate in RATES for steps in WARM_UPS),
        *(value("train accuracy", rate, steps) for rate in RATES for steps in WARM_UPS[:-1]),
        *(value("test accuracy", rate, steps) for rate in RATES for steps in WARM_UPS),
    ),
    runs=tuple(net(rate, steps) for rate in RATES for steps in WARM_UPS),
    smaller={
        "smoke": {"depth": 8, "epochs": 1, "batch": 32, "images": 96, "tests": 50, "seeds": 1},
        "quick": None,
        "reduced": {**REDUCED, "epochs": 40},
    },
    reduction={
        "quick": "Nothing is run.",
        "reduced": "40 epochs on the first 1,280 training images, 400 steps, without crops and flips.",
    },
    minutes={"reduced": 200},
    beyond=True,
    thresholds="Set on 2026-11-29, before any run.",
)
