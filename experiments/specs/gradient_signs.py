"""Table 1 and Appendix J: without batch norm, the summands of a weight's gradient agree in sign."""

from . import FEWER, FEWER_TEXT, MANY, Claim, Run, Spec, between, within_factor

LAYERS = (18, 54, 90)
NETS = {"batch": "with batch norm", "none": "without batch norm"}
PAPER = {  # quantity, norm: one value a layer
    ("a/b", "batch"): (251.8, 112.8, 40.7),
    ("a/b", "none"): (1.7, 2.6, 2.1),
    ("a", "batch"): (7.5e-5, 1.9e-5, 6.6e-6),
    ("a", "none"): (6.3e-5, 2.2e-4, 2.6e-4),
    ("b", "batch"): (3.0e-7, 1.7e-7, 1.6e-7),
    ("b", "none"): (3.6e-5, 8.4e-5, 1.2e-4),
    ("a/(b sqrt N)", "batch"): (0.70, 0.62, 0.45),  # these two from the printed a/b
    ("a/(b sqrt N)", "none"): (0.0047, 0.014, 0.023),
    ("median a/b of single weights", "batch"): (None, None, None),  # the text of Appendix J was not available
    ("median a/b of single weights", "none"): (None, None, None),
}


def check(quantity: str, norm: str, paper: float | None):
    """For a and b the order of magnitude. The paper argues from their ratio, so its check is stricter."""
    if paper is None:
        return None
    if quantity == "a/b":
        return within_factor(paper, 1.6) if norm == "batch" else between(1, 4)
    return within_factor(paper, 3) if quantity in ("a", "b") else None


def claim(quantity: str, norm: str, layer: int, paper: float | None) -> Claim:
    return Claim(
        f"{quantity}, layer {layer}, {NETS[norm]}",
        lambda results: results.each(quantity, layer, norm=norm),
        paper,
        check(quantity, norm, paper),
        mean="geometric",
        given="derived" if quantity == "a/(b sqrt N)" else "",
    )


SPEC = Spec(
    title="Do the summands of a gradient agree in sign?",
    of="Table 1 and Appendix J",
    order=5.1,
    headline="a/b, layer 18, with batch norm",
    shows="The gradient of a convolution's weight is a sum over images and positions. a is the mean of the summands' "
    "absolute values and b is the absolute value of their mean, both averaged over the weights of the layer. At "
    "initialisation with batch norm a/b is 40 to 250, so the summands cancel. Without batch norm a/b is about 2: the "
    "summands agree in sign, and gradients are large in a few directions.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each of 100 seeds draws "
    "a network and a batch of 128 standardised training images. Both networks of a seed have the same weights and "
    "batch. d = dy[b,o,x,y] I[b,i,x+x',y+y'] with dy at the output of the convolution. Sums over the N = B H W "
    "summands are divided by N, and a/b is the ratio of averages. The probe weight_gradient_signs records them. Its "
    "float32 sums differ from float64 sums by less than 1e-8 of a and b. Means over seeds are geometric.",
    claims=tuple(claim(*key, *values) for key in PAPER for values in zip(LAYERS, PAPER[key], strict=True)),
    runs=tuple(Run(norm, "at_init", norm, ("gradient_signs",), LAYERS, seeds=MANY) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1}, "reduced": FEWER},
    reduction={"reduced": FEWER_TEXT},
    minutes={"reduced": 0.53, "full": 7.4},
    paper=PAPER,
    remark="Independent signs would give an a/b of about sqrt N. With batch norm a/b is 0.4 to 0.65 of that, so its "
    "fall with depth is mostly the fall of the resolution. The share of signs that agree, |sum sign d| over the "
    "number of nonzero d, is not higher without batch norm than with it (last column of the data). The gradient "
    "before a batch norm sums to zero over each channel, so the mean of I drops out of the sum. The next experiment "
    "measures how much of the contrast this explains.",
)
