"""Figure 4: when training diverges, activations explode with depth."""

from . import Claim, Run, Spec, above, each

LAYERS = (8, 44, 80)
LARGEST = (1.4, 3.7e3, 3e8)  # max |channel mean| after the update, read off the figure


def grows(layer: int, after: int, paper: float) -> Claim:
    return Claim(
        f"largest |mean| after the update, layer {after} over layer {layer}",
        lambda results: results.ratio(
            dict(quantity="largest mean", layer=after), dict(quantity="largest mean", layer=layer)
        ),
        paper,
        above(10),
        "geometric",
    )


SPEC = Spec(
    title="What happens to activations when training diverges?",
    of="Figure 4",
    order=4.1,
    shows="Channel means and variances of layers 8, 44 and 80 of the un-normalised network while the update that "
    "makes the loss exceed 1e3 is applied bit by bit. After it means reach about 1, 4e3 and 3e8: the deeper a layer, "
    "the more it explodes, and the later along the update.",
    method="ResNet-110 without batch norm, projection shortcuts, batches of 128 augmented images, trained at lr 0.003 "
    "with momentum 0.9 and weight decay 1e-4 until a mini-batch's loss is above 1e3 after step 0. With theta0 and "
    "theta1 the parameters before and after the last update, theta0 + p (theta1 - theta0), p = 0, 5% .. 100%, is fed "
    "the mini-batch that showed the divergence, in float64. The paper does not say at which learning rate its "
    "network diverged; its values are read off the figure. Means over seeds are geometric.",
    claims=(
        grows(8, 44, 2.6e3),
        grows(44, 80, 8e4),
        Claim(
            "share of the update at which the largest |mean| is half its last, layer 80 less layer 44",
            lambda results: results.difference("half way", 80, 44),
            None,
            above(0),
        ),
        *(
            Claim(
                f"largest |mean| after the update, layer {layer}",
                each("largest mean", layer),
                paper,
                mean="geometric",
            )
            for layer, paper in zip(LAYERS, LARGEST, strict=True)
        ),
        Claim("step whose loss showed it", lambda results: results.each("step")),
    ),
    runs=(Run("none", "divergence", "none", layers=LAYERS, seeds=5, options={"lr": 0.003, "parts": 20, "epochs": 1}),),
    smaller={"smoke": {"batch": 2, "seeds": 1, "lr": 1e3, "parts": 2}},
    given="read off",
    minutes={"full": 2.5},
)
