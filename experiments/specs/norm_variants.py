"""Appendix K, Table 4: higher learning rates help with other normalisations too."""

from . import Claim, Run, Spec, above, each, reduced, shortened

NORMS = {"layer": "layer norm", "group": "group norm", "instance": "instance norm"}
EPOCHS = {0.1: 165, 0.003: 1320, 0.0001: 2400}


def gap(norm: str, high: float, low: float) -> Claim:
    text = f"test accuracy with {NORMS[norm]}: lr {high:g} less lr {low:g}, points"
    ours = lambda results: results.gap("test accuracy", f"{norm}-{high:g}", f"{norm}-{low:g}")  # noqa: E731
    return Claim(text, ours, None, above(0))


SPEC = Spec(
    title="Is it so with other normalisations?",
    of="Appendix K (Table 4)",
    order=5.8,
    shows="For variants of batch norm too, higher learning rates end at a higher test accuracy. (The appendix was not "
    "at hand: which variants it has is inferred from the paper's references, and its numbers are not known.)",
    method="Layer norm (over channels and places of an image), group norm (8 groups) and instance norm in the place of "
    "each batch norm, trained as for Figure 1, with its epochs for each rate. Scale full: ResNet-110. Reduced: "
    "ResNet-56, images and epochs as for Figure 1. Quick: ResNet-8, 3,000 training and 2,000 test images, epochs times "
    "1/165. The variants are a guess.",
    claims=(
        *(gap(norm, 0.1, 0.0001) for norm in NORMS),
        *(gap(norm, 0.1, 0.003) for norm in NORMS),
        *(
            Claim(f"test accuracy, {norm}-{lr:g}", each("test accuracy", label=f"{norm}-{lr:g}"))
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
        "quick": shortened(8, 1 / 165, images=3000, tests=2000, seeds=1),
        "reduced": reduced(depth=56, seeds=3),
    },
    minutes={"quick": 1.5, "reduced": 1500},
)
