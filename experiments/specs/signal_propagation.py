"""Beyond the paper: the growth of activations over the blocks, and the contribution of each block."""

from . import Claim, Run, Spec, above, below

ENDS = (37, 73, 109)  # the last layers of the three stages
NETS = {"batch": "with batch norm", "none": "without batch norm"}


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
    headline="variance of branch over skip, layer 109, with batch norm",
    shows="De and Smith explain the effect of batch norm on deep residual networks by the size of the branches. At "
    "initialisation each branch has variance one, while the variance of the skip path grows with depth, so deep "
    "blocks are nearly the identity. Brock et al. plot this block by block.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each seed draws a "
    "network and a batch of 128 standardised training images. For each of the 54 blocks, the probe signal_propagation "
    "records the mean over channels of the output's variance and of its squared channel mean, and the variance of the "
    "branch over that of the skip path before the addition. Means over seeds are geometric.",
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
