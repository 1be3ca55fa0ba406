"""Figure 6: without batch norm, the gradients of all images of a batch reduce the same logit."""

from . import FEWER, FEWER_TEXT, MANY, Claim, Run, Spec, above, below

NETS = {"batch": "with batch norm", "none": "without batch norm"}


def claim(text: str, quantity: str, norm: str, check=None) -> Claim:
    return Claim(f"{text}, {NETS[norm]}", lambda results: results.each(quantity, norm=norm), None, check)


SPEC = Spec(
    title="What do the gradients at the output look like?",
    of="Figure 6",
    order=5.0,
    headline="largest column mean x 128, without batch norm",
    shows="Figure 6 has the gradient of the loss at the ten logits for each of 128 images, at initialisation. Without "
    "batch norm one column has the largest possible value, 1/128, in almost every row. The network assigns almost all "
    "images to one class with certainty, and all gradients point the same way. With batch norm the values are spread "
    "over the classes.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, before any step. Each of 100 seeds draws "
    "a network and a batch of 128 standardised training images. The classifier has torch's own initialisation. The "
    "probe output_gradient records the gradient. The paper prints no numbers. Three numbers are checked: the largest "
    "of the ten column means times 128 (1 if every image is assigned with certainty to one wrong class), the entropy "
    "of the softmax, and the mean cosine between the gradients of two images.",
    claims=(
        claim("largest column mean x 128", "largest column mean", "none", above(0.7)),
        claim("largest column mean x 128", "largest column mean", "batch", below(0.7)),
        claim("entropy of the softmax, nats", "entropy", "none", below(0.1)),
        claim("entropy of the softmax, nats", "entropy", "batch", above(0.5)),
        Claim(
            "mean cosine of two images' gradients, without batch norm over with",
            lambda results: results.ratio(dict(quantity="cosine", norm="none"), dict(quantity="cosine", norm="batch")),
            None,
            above(1.5),
        ),
        claim("mean cosine of two images' gradients", "cosine", "none"),
        claim("mean cosine of two images' gradients", "cosine", "batch"),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("output_gradients",), seeds=MANY) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1, "depth": 8}, "reduced": FEWER},
    reduction={"reduced": FEWER_TEXT},
    minutes={"reduced": 0.51, "full": 6.5},
    remark="Batch norm weakens the pattern and does not remove it. The largest column mean times 128 is 0.13 to 0.63 "
    "in 90 of 100 networks with batch norm, with a median of 0.30, and 0.62 to 0.94 without, with a median of 0.89. "
    "The heat maps show the seed whose value with batch norm is nearest to the median.",
)
