"""Beyond the paper: Figure 5 with padding instead of projection shortcuts."""

from . import Claim, Run, Spec, below
from .moments_by_depth import CONVOLUTIONS, LAYERS, NETS, PAPER


def fall(layer: int, after: int, paper: float) -> Claim:
    return Claim(
        f"ln std, fall from layer {layer} to {after}, with batch norm",
        lambda results: results.difference("ln_std", layer, after, norm="batch"),
        paper,
        below(0.5),
    )


SPEC = Spec(
    title="Which shortcuts did the paper's network have?",
    of="Beyond the paper: the shortcuts of Figure 5",
    order=4.21,
    headline="ln std, fall from layer 30 to 42, with batch norm",
    shows="The paper does not say how its residual network joins stages of different width. Two ways are known: "
    "projections (option B of He et al.), or subsampling and padding with zero channels (option A, which He et al. "
    "use for CIFAR-10). In the paper's Figure 5 the values fall back where a stage begins.",
    method="Figure 5 again with option A and 5 seeds. The claim is that the fall is then missing: below 0.5, where "
    "the paper has 0.85 and 1.0. The paper's figure therefore shows projections. Every other experiment here uses "
    "projections.",
    claims=(
        fall(30, 42, 0.85),
        fall(66, 78, 1.0),
        Claim(
            "ln std, slope per layer (6 to 102), without batch norm",
            lambda results: results.slope("ln_std", CONVOLUTIONS, norm="none"),
            0.0437,
        ),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("log_moments",), LAYERS, shortcut="padding", seeds=5) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1}},
    beyond=True,
    given="read off",
    minutes={"full": 0.082},
    paper=PAPER,
)
