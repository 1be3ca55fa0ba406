"""Figure 1: batch norm generalises better because it allows large learning rates."""

from . import QUICK_TEXT, Claim, Run, Spec, above, at_rate, between, quick, reduced, shortened

NETS = {  # label: norm, initialisation, learning rate, the paper's epochs (165 for networks that it does not train)
    "batch-0.1": ("batch", "xavier_normal", 0.1, 165),
    "batch-0.003": ("batch", "xavier_normal", 0.003, 1320),
    "batch-0.0001": ("batch", "xavier_normal", 0.0001, 2400),
    "none-0.0001": ("none", "xavier_normal", 0.0001, 2400),
    "none-0.003": ("none", "xavier_normal", 0.003, 165),
    "none-0.1": ("none", "xavier_normal", 0.1, 165),
    "fixup-0.1": ("none", "fixup", 0.1, 165),
}
FINAL = {  # label: test accuracy, that at 48 % of training, final train accuracy; read off the figure to 0.15
    "batch-0.1": (93.3, 87.4, 100),
    "batch-0.003": (90.5, 89.0, 100),
    "batch-0.0001": (81.3, 80.8, 99.8),
    "none-0.0001": (82.0, 81.0, 99.6),
}


def claim(quantity: str, label: str, paper: float | None, check=None) -> Claim:
    return Claim(f"{quantity}, {at_rate(label)}", lambda results: results.each(quantity, label=label), paper, check)


def gap(first: str, second: str, paper: float | None, check) -> Claim:
    text = f"test accuracy, {at_rate(first)} minus {at_rate(second)}, points"
    return Claim(text, lambda results: results.gap("test accuracy", first, second), paper, check)


SPEC = Spec(
    title="Does batch norm help by allowing larger learning rates?",
    of="Figure 1",
    order=2,
    headline="test accuracy, batch norm at lr 0.1",
    shows="With batch norm, a learning rate of 0.1 reaches 93.3 % test accuracy, 0.003 reaches 90.5 % and 0.0001 "
    "reaches 81.3 %. The network without batch norm reaches about the same as the last at 0.0001, the largest rate at "
    "which it can be trained. All networks fit the training set. So the gain comes from the larger learning rate.",
    method="ResNet-110, SGD with momentum 0.9 and weight decay 1e-4, batches of 128 with random crops and flips, the "
    "paper's epochs. The rate drops tenfold at half and at three quarters of training. Accuracies are those of the "
    "last epoch, and the train accuracy is that of its augmented batches. A run has diverged if a loss after the first "
    "step is above 1e3 or not finite. It then has no accuracy. A run that has not is dead if its train accuracy is "
    "that of a guess, 10 %, or above it by at most three standard deviations of a binomial share of the epoch's "
    "images. Beyond the paper: Fixup, an initialisation for networks without normalisation.",
    claims=(
        gap("batch-0.1", "batch-0.003", 2.8, above(0)),
        gap("batch-0.003", "batch-0.0001", 9.2, above(0)),
        gap("batch-0.0001", "none-0.0001", -0.7, between(-3, 3)),
        *(claim("train accuracy", label, FINAL[label][2], above(99)) for label in FINAL),
        *(claim("diverged", label, 1, above(0.5)) for label in ("none-0.003", "none-0.1")),
        claim("diverged", "fixup-0.1", None, between(0, 0.5)),
        gap("fixup-0.1", "none-0.0001", None, above(0)),
        *(claim("test accuracy", label, FINAL[label][0]) for label in FINAL),
        *(claim("test accuracy before the first drop", label, FINAL[label][1]) for label in FINAL),
        claim("test accuracy", "fixup-0.1", None),
        *(claim("train minus test accuracy", k, FINAL[k][2] - FINAL[k][0] if k in FINAL else None) for k in NETS),
        *(claim("dead", label, None) for label in NETS),
    ),
    runs=tuple(
        Run(label, "training", norm, init=init, seeds=5, options={"lr": lr, "epochs": epochs})
        for label, (norm, init, lr, epochs) in NETS.items()
    ),
    smaller={
        "smoke": shortened(8, 0, batch=32, images=96, tests=50, seeds=1),
        "quick": quick,
        "reduced": reduced(seeds=3),
    },
    reduction={
        "quick": QUICK_TEXT,
        "reduced": "ResNet-110 on the first 1,280 training images, without crops and flips. 300 epochs at 0.1, 200 at "
        "0.003 and 1,200 at 0.0001, three seeds.",
    },
    given="read off",
    minutes={"quick": 5.7, "reduced": 1500, "full": 271_000},
    paper=FINAL,
    remark="At quick scale the networks with batch norm fit their images at 0.1 and nearly fit them at 0.003. At "
    "0.0001 no network comes near fitting them, so its accuracy there says nothing about generalisation.",
)
