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
    headline="largest |mean| after the update, layer 80 over layer 44",
    shows="Figure 4 has the channel means and variances of layers 8, 44 and 80 of the network without batch norm. "
    "They are taken while the update that raises the loss above 1e3 is applied in small parts. After the update the "
    "means reach about 1, 4e3 and 3e8. Deeper layers explode more, and later along the update.",
    method="ResNet-110 without batch norm, projection shortcuts, batches of 128 augmented images. It is trained at lr "
    "0.003 with momentum 0.9 and weight decay 1e-4 until the loss of a mini-batch after step 0 is above 1e3. theta0 "
    "and theta1 are the parameters before and after the last update. The network with parameters theta0 + p (theta1 - "
    "theta0), p = 0, 5 %, .., 100 %, is evaluated in float64 on the mini-batch whose loss was above 1e3. The paper "
    "does not say at which learning rate its network diverged. Its values are read off the figure. Means over seeds "
    "are geometric.",
    claims=(
        grows(8, 44, 2.6e3),
        grows(44, 80, 8e4),
        Claim(
            "share of the update at which the largest |mean| reaches half of its last value, layer 80 minus layer 44",
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
        Claim("step whose loss was above 1e3", lambda results: results.each("step")),
    ),
    runs=(Run("none", "divergence", "none", layers=LAYERS, seeds=5, options={"lr": 0.003, "parts": 20, "epochs": 1}),),
    smaller={"smoke": {"batch": 2, "seeds": 1, "lr": 1e3, "parts": 2}, "reduced": {"seeds": 2}},
    reduction={"reduced": "Two seeds instead of five."},
    given="read off",
    minutes={"reduced": 3.6, "full": 7.4},
)
