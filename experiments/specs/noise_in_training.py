"""Beyond the paper: the gradient noise lr C / |B| in the runs of Figure 1, measured during training."""

from . import QUICK_TEXT, Claim, Run, Spec, above, at_rate, between, each, quick, reduced
from .learning_rates import FINAL, NETS

LABELS = tuple(FINAL)  # the four networks that the paper trains to the end
SCALED_NOISE = "lr C / |B| before the first drop"


def gap(first: str, second: str, check) -> Claim:
    return Claim(
        f"log10 {SCALED_NOISE}: {at_rate(first)} minus {at_rate(second)}",
        lambda results: results.gap(f"log10 {SCALED_NOISE}", first, second),
        None,
        check,
    )


SPEC = Spec(
    title="How large is the gradient noise in the runs of Figure 1?",
    of="Beyond the paper: equation 2 along Figure 1",
    order=2.6,
    headline="log10 lr C / |B| before the first drop: batch norm at lr 0.1 minus batch norm at lr 0.003",
    shows="The paper reads equation 2 as follows: the noise of SGD is lr C / |B|, so a large learning rate means "
    "noise, which regularises. It does not measure C. C changes during training and differs between networks.",
    method="The runs of Figure 1, three seeds of each. They are trained only once: with this measurement a run has the "
    "same bits, and serves for Figure 1 too. At steps that are evenly spaced in the logarithm, eight more batches of "
    "128 pass through the network in training mode. C is 128 times the variance of their gradients. The last "
    "measurement before the learning rate drops is compared. If C were the same for all runs, lr C / |B| would differ "
    "as the learning rates do: by 1.5 decades between 0.1 and 0.003, and by 1.5 between 0.003 and 0.0001.",
    claims=(
        gap("batch-0.1", "batch-0.003", above(0.5)),
        gap("batch-0.003", "batch-0.0001", above(0.5)),
        gap("batch-0.0001", "none-0.0001", between(-1.5, 1.5)),
        *(Claim(f"{SCALED_NOISE}, {at_rate(k)}", each(SCALED_NOISE, label=k), mean="geometric") for k in LABELS),
        *(
            Claim(
                f"C before the first drop, {at_rate(k)}",
                each("C before the first drop", label=k),
                mean="geometric",
            )
            for k in LABELS
        ),
    ),
    runs=tuple(
        Run(label, "training", norm, init=init, seeds=3, options={"lr": lr, "epochs": epochs, "noise": 16})
        for label, (norm, init, lr, epochs) in NETS.items()
        if label in LABELS
    ),
    smaller={
        "smoke": {"depth": 8, "epochs": 1, "batch": 16, "images": 64, "tests": 50, "noise": 3, "seeds": 1},
        "quick": lambda run: quick(run) | {"noise": 8},
        "reduced": reduced(),
    },
    reduction={
        "quick": QUICK_TEXT,
        "reduced": "ResNet-110 on the first 1,280 training images, without crops and flips. 300 epochs at 0.1, 200 at "
        "0.003 and 1,200 at 0.0001.",
    },
    beyond=True,
    minutes={"quick": 4.5, "reduced": 1200, "full": 151_000},
    remark="For ResNet-20, trained for 6 epochs on all images (one seed, two for 0.1), C before the drop is 86 at "
    "0.1, 1281 at 0.003 and 343 at 0.0001. The step at 0.1 is 33 times as long as at 0.003, but its noise is only "
    "twice as large. So C is not a constant of the network, and lr alone does not determine the noise. Without batch "
    "norm C is 38 at 0.0001, nine times smaller. The two networks of Figure 1 that reach about the same accuracy at "
    "the same rate therefore do not have the same noise.",
)
