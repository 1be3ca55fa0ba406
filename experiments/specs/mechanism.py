"""Beyond the paper: how much of Table 1 comes from the means of the channels."""

from . import Claim, Run, Spec, above, below, between, each

LAYERS = (18, 54, 90)
ROOTS = (0.70, 0.62, 0.45)  # the paper's a/b over sqrt N, with batch norm
NONE, BATCH = {"norm": "none"}, {"norm": "batch"}
NETS = {"batch": "with batch norm", "none": "without batch norm"}


def centred(quantity: str, operand: str, layer: int, net: dict, check) -> Claim:
    return Claim(
        f"{quantity}, {operand} centred over not centred, layer {layer}, {NETS[net['norm']]}",
        lambda results: results.ratio(
            dict(quantity=quantity, layer=layer, centred=operand, **net),
            dict(quantity=quantity, layer=layer, centred="", **net),
        ),
        None,
        check,
        "geometric",
    )


SPEC = Spec(
    title="Do the signs agree because channels have means?",
    of="Beyond the paper: Table 1's mechanism",
    order=5.15,
    headline="a/b, input centred over not centred, layer 54, without batch norm",
    shows="The paper reports that a/b is small without batch norm, and argues from it. It does not say why the signs "
    "agree.",
    method="Table 1 again (ResNet-110, batch 128, before any step) with one change: the mean of each channel is "
    "subtracted from the convolution's input I, or from the gradient dy at its output. A batch norm after the "
    "convolution makes dy sum to zero over each channel. The mean of I then adds nothing to the gradient of a weight, "
    "and b should not change. Without batch norm b should fall and a/b should rise if means make the summands agree. "
    "a/(b sqrt N) is near 1 for independent signs. Means over seeds are geometric.",
    claims=(
        *(centred("b", "input", layer, NONE, below(0.5)) for layer in LAYERS),
        *(centred("a/b", "input", layer, NONE, above(1.5)) for layer in LAYERS),
        *(centred("a/b", "gradient", layer, NONE, above(1.5)) for layer in LAYERS),
        *(centred("b", "input", layer, BATCH, between(0.8, 1.25)) for layer in LAYERS),
        *(
            Claim(
                f"a/(b sqrt N), layer {layer}, with batch norm",
                each("a/(b sqrt N)", layer, norm="batch", centred=""),
                paper,
                between(0.3, 1),
                "geometric",
            )
            for layer, paper in zip(LAYERS, ROOTS, strict=True)
        ),
    ),
    runs=tuple(
        Run(
            f"{norm}{'-' * bool(operand)}{operand}",
            "at_init",
            norm,
            ("gradient_signs",),
            LAYERS,
            seeds=5,
            options={"centred": operand},
        )
        for norm, operand in (("batch", ""), ("batch", "input"), ("none", ""), ("none", "input"), ("none", "gradient"))
    ),
    smaller={"smoke": {"batch": 2, "seeds": 1}},
    beyond=True,
    given="derived",
    minutes={"full": 0.66},
    remark="Without batch norm, the channel means make up most of b, but they do not explain most of the contrast. If "
    "they are subtracted, a/b rises a few times and stays far below that of the network with batch norm.",
)
