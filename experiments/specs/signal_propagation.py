"""Beyond the paper: how the signal grows from block to block, and what each block adds."""

from . import Claim, Run, Spec, above, below

ENDS = (37, 73, 109)  # the last layers of the three stages
NETS = {"batch": "with batch norm", "none": "without"}


def claim(text: str, quantity: str, layer: int, norm: str, check=None) -> Claim:
    return Claim(
        f"{text}, layer {layer}, {NETS[norm]}",
        lambda results: results.each(quantity, layer, norm=norm),
        None,
        check,
        "geometric",
    )


SPEC = Spec(
    title="What does a residual block add to the signal?",
    of="Beyond the paper: De and Smith (2020), Brock et al. (2021)",
    order=4.25,
    shows="De and Smith explain batch norm's effect on deep residual networks by the size of the branches: at "
    "initialisation each branch has variance one while the skip path's grows with depth, so that deep blocks are "
    "nearly the identity. Brock et al. draw this block by block.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step, on a batch of 128 "
    "standardised training images: for each of the 54 blocks, the mean over channels of the output's variance and of "
    "its squared channel mean, and the variance of the branch over that of the skip path, before they are added (the "
    "probe signal_propagation). Means over seeds are geometric.",
    claims=(
        *(claim("variance", "variance", layer, "batch", below(20)) for layer in ENDS),
        claim("variance", "variance", 109, "none", above(100)),
        *(claim("variance of branch over skip", "branch over skip", layer, "batch", below(0.2)) for layer in ENDS),
        *(claim("variance of branch over skip", "branch over skip", layer, "none", above(0.2)) for layer in ENDS),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("propagation",)) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1}},
    beyond=True,
    minutes={"full": 0.2},
)
