"""Figure 1: the best learning rate without batch norm, among those that the paper tries."""

from . import REDUCED, Claim, Run, Spec, each, within

GRID = (0.1, 0.003, 0.001, 0.0003, 0.0001, 0.00003)
STEP = 0.55  # decades, a little more than the grid's steps around 0.0001: 0.48 up and 0.52 down


SPEC = Spec(
    title="Which learning rate is best without batch norm?",
    of="Figure 1: the grid of learning rates",
    order=2.1,
    headline="log10 of the best rate, no batch norm",
    shows="The paper tries six learning rates from 0.1 to 0.00003 and reports the best. Without batch norm this is "
    "0.0001, the largest rate at which the network can be trained.",
    method="ResNet-110 without batch norm, and everything else as in Figure 1, but with a short run for each rate: 20 "
    "epochs at a constant rate, three seeds. The best rate of a seed is the one with the lowest mean training loss in "
    "the last epoch. This loss decides, and not the accuracy after whole runs as in the paper, because whole runs at "
    "six rates take too long. A run that diverged has an infinite loss. A rate counts as one at which the network "
    "learns if the mean loss of the last quarter of the steps is 0.05 below the first loss and below that of guessing. "
    "The claim is that the best rate is 0.0001 or one of its neighbours in the grid.",
    claims=(
        Claim("log10 of the best rate, no batch norm", each("best rate"), -4, within(-4, STEP)),
        Claim("log10 of the largest rate at which it learns, no batch norm", each("learning limit"), -4),
        *(Claim(f"training loss of the last epoch, lr {rate:g}", each(f"last loss at {rate:g}")) for rate in GRID),
    ),
    runs=(Run("none", "rates", "none", seeds=3, options={"lrs": GRID, "epochs": 20}),),
    smaller={
        "smoke": {"depth": 8, "epochs": 1, "batch": 16, "images": 32, "seeds": 1},
        "quick": {"depth": 8, "epochs": 2, "images": 1280, "seeds": 1},
        "reduced": REDUCED,
    },
    reduction={
        "quick": "ResNet-8 instead of ResNet-110, 2 epochs of 1,280 images, one seed.",
        "reduced": "ResNet-110 on the first 1,280 training images, without crops and flips.",
    },
    given="derived",
    thresholds="Set on 2026-11-29 without a trial.",
    minutes={"quick": 0.14, "reduced": 150, "full": 2900},
)
