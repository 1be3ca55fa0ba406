"""Figure 5: without batch norm, activations grow exponentially with depth."""

from . import Claim, Run, Spec, above, within

LAYERS = (6, 18, 30, 42, 54, 66, 78, 90, 102, 110)
CONVOLUTIONS = LAYERS[:-1]
NETS = {"batch": "with batch norm", "none": "without batch norm"}
PAPER = {  # quantity, norm: one value a layer, read off the figure to about 0.08
    ("ln_abs_mean", "batch"): (-0.95, 0.24, 0.53, -0.85, -0.30, 0.13, -1.1, -0.33, 0.04, -0.65),
    ("ln_abs_mean", "none"): (-1.55, -1.45, -0.27, -0.30, -0.37, 0.75, 1.2, 1.9, 2.85, 3.5),
    ("ln_std", "batch"): (0.1, 0.6, 0.9, 0.05, 0.6, 1.0, 0.0, 0.55, 0.9, -0.85),
    ("ln_std", "none"): (-1.25, -1.15, -0.27, -0.22, 0.12, 0.85, 1.4, 2.2, 3.0, 1.97),
}


def ln_std(norm: str, layer: int, paper: float) -> Claim:
    return Claim(
        f"ln std, {'classifier' if layer == 110 else f'layer {layer}'}, {NETS[norm]}",
        lambda results: results.each("ln_std", layer, norm=norm),
        paper,
        within(paper, 0.15) if norm == "batch" and layer != 110 else None,
    )


def fall(layer: int, after: int, paper: float) -> Claim:
    return Claim(
        f"ln std, fall from layer {layer} to {after}, with batch norm",
        lambda results: results.difference("ln_std", layer, after, norm="batch"),
        paper,
        above(0.5),
    )


SPEC = Spec(
    title="How large are activations, layer by layer?",
    of="Figure 5",
    order=4.2,
    headline="ln std, slope per layer (6 to 102), without batch norm",
    shows="At initialisation without batch norm, the logarithms of channel means and standard deviations grow about "
    "linearly with depth. Activations therefore grow exponentially, up to about 100. With batch norm they stay near "
    "one, and fall back where a new stage begins (layers 38 and 74).",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each seed draws a "
    "network and a batch of 128 standardised training images. Both networks of a seed have the same weights and "
    "batch. The figure has natural logarithms of the |mean| and the standard deviation (std) of each channel at the "
    "convolution's output, before batch norm, averaged over channels after the logarithm. Layer 110 is the classifier "
    "with torch's own initialisation. It and the single values without batch norm are shown and not checked. The "
    "paper's values are read off its figure.",
    claims=(
        *(ln_std("batch", *at) for at in zip(LAYERS, PAPER["ln_std", "batch"], strict=True)),
        fall(30, 42, 0.85),
        fall(66, 78, 1.0),
        Claim(
            "ln std, slope per layer (6 to 102), without batch norm",
            lambda results: results.slope("ln_std", CONVOLUTIONS, norm="none"),
            0.0437,
            above(0.02),
        ),
        *(ln_std("none", *at) for at in zip(LAYERS, PAPER["ln_std", "none"], strict=True)),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("log_moments",), LAYERS) for norm in NETS),
    smaller={"smoke": {"batch": 4, "seeds": 2}},
    given="read off",
    minutes={"full": 0.17},
    paper=PAPER,
    remark="Without batch norm our activations are larger than the paper's from layer 18 on, by 0.7 to 1.7 in the "
    "logarithm of the standard deviation. This is two to five times the spread over these ten seeds. The paper's "
    "figure may show a single network. Ten seeds are too few to say how unusual such a network would be.",
)
