"""Figure 5: without batch norm, activations grow exponentially with depth."""

from . import FEWER, FEWER_TEXT, MANY, Claim, Run, Spec, above, below, each, within

LAYERS = (6, 18, 30, 42, 54, 66, 78, 90, 102, 110)
CONVOLUTIONS = LAYERS[:-1]
NAMES = {"ln_std": "ln std", "ln_abs_mean": "ln |mean|"}
NETS = {"batch": "with batch norm", "none": "without batch norm"}
PAPER = {  # quantity, norm: one value a layer, read off the figure to 0.08
    ("ln_abs_mean", "batch"): (-0.95, 0.24, 0.53, -0.85, -0.30, 0.13, -1.1, -0.33, 0.04, -0.65),
    ("ln_abs_mean", "none"): (-1.55, -1.45, -0.27, -0.30, -0.37, 0.75, 1.2, 1.9, 2.85, 3.5),
    ("ln_std", "batch"): (0.1, 0.6, 0.9, 0.05, 0.6, 1.0, 0.0, 0.55, 0.9, -0.85),
    ("ln_std", "none"): (-1.25, -1.15, -0.27, -0.22, 0.12, 0.85, 1.4, 2.2, 3.0, 1.97),
}


def values(quantity: str, norm: str) -> list[Claim]:
    return [
        Claim(
            f"{NAMES[quantity]}, {'classifier' if layer == 110 else f'layer {layer}'}, {NETS[norm]}",
            each(quantity, layer, norm=norm),
            paper,
            within(paper, 0.15) if (quantity, norm) == ("ln_std", "batch") and layer != 110 else None,
        )
        for layer, paper in zip(LAYERS, PAPER[quantity, norm], strict=True)
    ]


def fall(quantity: str, layer: int, after: int) -> Claim:
    text = f"{NAMES[quantity]}, fall from layer {layer} to {after}, with batch norm"
    first, second = (PAPER[quantity, "batch"][LAYERS.index(number)] for number in (layer, after))
    ours = lambda results: results.difference(quantity, layer, after, norm="batch")  # noqa: E731
    return Claim(text, ours, first - second, above(0.5))


def slope(quantity: str, paper: float) -> Claim:
    text = f"{NAMES[quantity]}, slope per layer (6 to 102), without batch norm"
    return Claim(text, lambda results: results.slope(quantity, CONVOLUTIONS, norm="none"), paper, above(0.02))


def place(quantity: str, norm: str) -> Claim:
    text = f"{NAMES[quantity]}, layers 6 to 102, {NETS[norm]}: % of networks nearer to the mean than the paper's"
    curve = (PAPER[quantity, norm][:-1], 0.08, quantity, CONVOLUTIONS)
    return Claim(text, lambda results: results.distance(*curve, norm=norm), None, below(95), pooled=True)


SPEC = Spec(
    title="How large are activations, layer by layer?",
    of="Figure 5",
    order=4.2,
    headline="ln std, slope per layer (6 to 102), without batch norm",
    shows="At initialisation without batch norm, the logarithms of channel means and standard deviations grow about "
    "linearly with depth, so activations grow exponentially, to about 100. With batch norm they stay near 1, and fall "
    "back where a new stage begins.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each seed draws a "
    "network and a batch of 128 standardised training images, for both nets. Natural logarithms of the |mean| and the "
    "standard deviation (std) of each channel at the convolution's output, before batch norm, are averaged over "
    "channels. Layer 110 is the classifier, with torch's own initialisation. The paper's values are read off its "
    "figure, which may show a single network. Its curves are therefore compared with those of our networks by "
    "Mahalanobis' distance from the mean, with a reading error of 0.08.",
    claims=(
        *values("ln_std", "batch"),
        *(fall(name, *step) for name in NAMES for step in ((30, 42), (66, 78))),
        *(slope(*one) for one in (("ln_std", 0.0437), ("ln_abs_mean", 0.0439))),
        *(place(quantity, norm) for norm in NETS for quantity in NAMES),
        *values("ln_std", "none"),
        *(claim for norm in NETS for claim in values("ln_abs_mean", norm)),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("log_moments",), LAYERS, seeds=MANY) for norm in NETS),
    smaller={"smoke": {"batch": 4, "seeds": 2}, "reduced": FEWER},
    reduction={"reduced": FEWER_TEXT},
    given="read off",
    minutes={"reduced": 0.17, "full": 2.1},
    paper=PAPER,
    remark="Without batch norm the paper's values are lower than most of ours. Its whole curves are ordinary: a "
    "quarter and a third of ours are further from the mean. So its figure fits a single network.",
    thresholds="The claims on ln |mean| and on whole curves were set on 2026-11-29. The means over ten seeds were "
    "known, and that the paper's ln std without batch norm lies within the central 95 % of 120 other networks.",
)
