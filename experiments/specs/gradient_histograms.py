"""Figure 2: without batch norm, gradients at initialisation are far larger and have heavy tails."""

from . import FEWER, FEWER_TEXT, MANY, Claim, Run, Spec, above, below, within_factor

LAYER = 55
NETS = {"batch": "with batch norm", "none": "without batch norm"}


def claim(quantity: str, norm: str, paper: float | None, check=None, mean: str = "geometric") -> Claim:
    return Claim(
        f"{quantity} of the entries, {NETS[norm]}",
        lambda results: results.each(quantity, LAYER, norm=norm),
        paper,
        check,
        mean,
    )


SPEC = Spec(
    title="How are the entries of a gradient distributed?",
    of="Figure 2",
    order=3.2,
    headline="sd, without batch norm over with",
    shows="Figure 2 has histograms of the entries of the gradient of layer 55's kernel at initialisation. With batch "
    "norm they are bell-shaped within about ±0.04. Without batch norm they reach ±4, about a hundred times as far, "
    "with a sharp peak and long tails.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each of 100 seeds draws a "
    "network and two batches of 128 standardised training images. Standard deviation (sd), excess kurtosis and largest "
    "magnitude are those of the two batches of one network. The figure has the network whose sd is nearest to the "
    "median, because a histogram over networks of different scale would have longer tails than any of them. The probe "
    "parameter_gradient_histogram counts in bins that are uniform in the logarithm. The paper's values are read off "
    "its figure. It is not known how many batches the paper's figure pools.",
    claims=(
        claim("sd", "batch", 0.012, within_factor(0.012, 2.5)),
        Claim(
            "sd, without batch norm over with",
            lambda results: results.ratio(
                dict(quantity="sd", layer=LAYER, norm="none"), dict(quantity="sd", layer=LAYER, norm="batch")
            ),
            100,
            above(50),
            "geometric",
        ),
        claim("excess kurtosis", "batch", None, below(5), "arithmetic"),
        claim("excess kurtosis", "none", None, above(10), "arithmetic"),
        claim("sd", "none", None),
        claim("largest", "batch", 0.04),
        claim("largest", "none", 4),
    ),
    runs=tuple(
        Run(norm, "at_init", norm, ("gradient_histogram",), (LAYER,), seeds=MANY, options={"batches": 2})
        for norm in NETS
    ),
    smaller={"smoke": {"batch": 2, "seeds": 1, "depth": 56}, "reduced": FEWER},
    reduction={"reduced": FEWER_TEXT},
    given="read off",
    minutes={"reduced": 1.3, "full": 11},
    remark="Without batch norm the largest entry in the paper's figure is below those of 99 % of our networks, and "
    "the ratio of the sd, which is read off, below those of 98 %. In Figure 5 the paper's activations are below most "
    "of ours too. The figures agree with one network that is small, and not with an average one. With batch norm the "
    "largest entry is ordinary, at 59 % of ours.",
)
