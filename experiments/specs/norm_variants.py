"""Appendix K, Table 4: larger learning rates help with other normalisations too."""

from . import NETWORKS, Claim, Run, Spec, above, at_rate, each, quick, reduced, shortened

NORMS = ("layer", "group", "instance")
EPOCHS = {0.1: 165, 0.003: 1320, 0.0001: 2400}


def gap(norm: str, high: float, low: float) -> Claim:
    text = f"test accuracy, {NETWORKS[norm]}, lr {high:g} minus lr {low:g}, points"
    ours = lambda results: results.gap("test accuracy", f"{norm}-{high:g}", f"{norm}-{low:g}")  # noqa: E731
    return Claim(text, ours, None, above(0))


SPEC = Spec(
    title="Do other normalisations behave like batch norm?",
    of="Appendix K (Table 4)",
    order=5.8,
    headline="test accuracy, group norm, lr 0.1 minus lr 0.0001, points",
    shows="For variants of batch norm too, larger learning rates reach a higher test accuracy.",
    method="ResNet-110 with layer norm (over channels and positions of an image), group norm (8 groups) or instance "
    "norm in the place of each batch norm, trained as for Figure 1 with the epochs of each rate. The text of Appendix "
    "K was not available to us. The variants are a guess from the paper's references, and the paper's numbers are not "
    "known.",
    claims=(
        *(gap(norm, 0.1, 0.0001) for norm in NORMS),
        *(gap(norm, 0.1, 0.003) for norm in NORMS),
        *(
            Claim(f"test accuracy, {at_rate(f'{norm}-{lr:g}')}", each("test accuracy", label=f"{norm}-{lr:g}"))
            for norm in NORMS
            for lr in EPOCHS
        ),
    ),
    runs=tuple(
        Run(f"{norm}-{lr:g}", "training", norm, seeds=5, options={"lr": lr, "epochs": epochs})
        for norm in NORMS
        for lr, epochs in EPOCHS.items()
    ),
    smaller={
        "smoke": shortened(8, 0, batch=32, images=64, tests=50, seeds=1),
        "quick": lambda run: quick(run) | {"epochs": 25},
        "reduced": reduced(depth=56, seeds=3),
    },
    reduction={
        "quick": "A demonstration: ResNet-8 on the first 256 training images, batches of 32, without crops and flips. "
        "25 epochs at each rate, one seed.",
        "reduced": "ResNet-56 instead of ResNet-110, images and epochs as for Figure 1 at this scale, three seeds.",
    },
    minutes={"quick": 5.3, "reduced": 1500, "full": 466_000},
)
