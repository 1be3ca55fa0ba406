"""Figure 6: without batch norm, all images of a batch push the same logit down."""

from . import Claim, Run, Spec, above, below

NETS = {"batch": "with batch norm", "none": "without"}


def claim(text: str, quantity: str, norm: str, check=None) -> Claim:
    return Claim(f"{text}, {NETS[norm]}", lambda results: results.each(quantity, norm=norm), None, check)


SPEC = Spec(
    title="What do the gradients at the output look like?",
    of="Figure 6",
    order=5.0,
    shows="The gradient of the loss at the ten logits, for each of 128 images, at initialisation. Without batch norm "
    "one column is filled by the largest value there is, 1/128: the network gives almost all images to one class, "
    "with certainty, and all gradients ask for the same. With batch norm the values spread over the classes.",
    method="ResNet-110 with projection shortcuts and Xavier-normal weights, torch's own initialisation of the "
    "classifier, before any step; a batch of 128 standardised training images, network and batch drawn anew for each "
    "seed. Recorded by the probe output_gradient. The paper prints no numbers. Checked are the largest of the ten "
    "column means times 128 (1 if all images push one logit down with certainty), the entropy of the softmax, and the "
    "mean cosine between the gradients of two images.",
    claims=(
        claim("largest column mean x 128", "largest column mean", "none", above(0.7)),
        claim("largest column mean x 128", "largest column mean", "batch", below(0.7)),
        claim("entropy of the softmax, nats", "entropy", "none", below(0.1)),
        claim("entropy of the softmax, nats", "entropy", "batch", above(0.5)),
        Claim(
            "mean cosine of two images' gradients, without over with batch norm",
            lambda results: results.ratio(dict(quantity="cosine", norm="none"), dict(quantity="cosine", norm="batch")),
            None,
            above(1.5),
        ),
        claim("mean cosine of two images' gradients", "cosine", "none"),
        claim("mean cosine of two images' gradients", "cosine", "batch"),
    ),
    runs=tuple(Run(norm, "at_init", norm, ("output_gradients",)) for norm in NETS),
    smaller={"smoke": {"batch": 2, "seeds": 1, "depth": 8}},
    minutes={"full": 0.6},
)
