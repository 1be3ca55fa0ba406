"""Figure 7 and Appendix G: without batch norm, channels with a large mean have large gradients."""

from . import Claim, Run, Spec, above, below

LAYER = 45
NETS = {"batch": "with batch norm", "none": "without batch norm"}

UNEVEN = ("variation", "variation of rows", "variation of columns", "explained by rows and columns")


def claim(text: str, quantity: str, norm: str, check=None) -> Claim:
    return Claim(f"{text}, {NETS[norm]}", lambda results: results.each(quantity, LAYER, norm=norm), None, check)


SPEC = Spec(
    title="Which channels have large gradients?",
    of="Figure 7 and Appendix G",
    order=5.2,
    headline="rank correlation of |input mean| and gradient, without batch norm",
    shows="Figure 7 sums the absolute gradient of layer 45's kernel over its 3 x 3 positions. This gives a matrix of "
    "output channels by input channels at initialisation. Without batch norm some rows and columns stand out: a few "
    "channels have most of the gradient. Appendix G relates this to the means of the channels.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each seed draws a "
    "network and a batch of 128 standardised training images. M[o, i] sums |sum over images and positions of d| over "
    "the kernel (the probe weight_gradient_signs, form channels). The variation of M is its standard deviation over "
    "its mean. The mean of an input channel is that of the activation which the convolution reads. The pictures of "
    "the paper's figure and the text of Appendix G were not available to us.",
    claims=(
        Claim(
            "variation of M's entries, without batch norm over with",
            lambda results: results.ratio(
                dict(quantity="variation", layer=LAYER, norm="none"),
                dict(quantity="variation", layer=LAYER, norm="batch"),
            ),
            None,
            above(3),
            "geometric",
        ),
        claim("rank correlation of |input mean| and gradient", "rank correlation", "none", above(0.8)),
        claim("rank correlation of |input mean| and gradient", "rank correlation", "batch", below(0.5)),
        *(claim(f"M: {quantity}", quantity, norm) for norm in NETS for quantity in UNEVEN),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("channel_gradients",), (LAYER,)) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1, "depth": 50}},
    minutes={"full": 0.55},
)
