"""Figure 3: with batch norm, a step along the gradient may be much larger before the loss rises."""

from . import Claim, Run, Spec, above, below, within_factor

RATES = tuple(10 ** (k / 4) for k in range(-20, -2))  # 1e-5 to 0.18
AT = (1, 4, 7)
NETS = {"batch": "with batch norm", "none": "without"}
LOWEST = {("batch", 1): 10**-0.06, ("batch", 4): 10**-0.15, ("batch", 7): 10**-0.11, ("none", 1): 0.1}


def claim(quantity: str, text: str, at: int, norm: str, paper: float | None = None, check=None) -> Claim:
    return Claim(
        f"{text}, mini-batch {at}, {NETS[norm]}",
        lambda results: results.each(quantity, at, norm=norm),
        paper,
        check,
        "geometric",
    )


SPEC = Spec(
    title="How far along its gradient may a step go?",
    of="Figure 3",
    order=4.05,
    shows="The loss of a mini-batch after a step of size a along minus its own gradient, over the loss before, for "
    "mini-batches 1, 4 and 7 of training. With batch norm it falls up to a of about 0.03 to 0.09 and at 0.2 is no more "
    "than three times its start. Without, the best a is near 2e-4 for the first mini-batch, and between 3e-3 and 8e-3 "
    "the loss passes a million times its start.",
    method="ResNet-110 with projection shortcuts, batches of 128 augmented images, training as in Figure 1: lr 0.1 "
    "with batch norm, 1e-4 without, momentum 0.9, weight decay 1e-4. Before the updates by mini-batches 1, 4 and 7 "
    "the loss is taken along minus the gradient of that mini-batch, without momentum and decay, with batch norm in "
    "training mode, at a from 1e-5 to 0.18, four to a decade. Only the first mini-batch is checked: what the later "
    "ones look like without batch norm depends on the seed, since the first steps undo most of a bad start. The "
    "paper's values are read off its figure. Means over seeds are geometric.",
    claims=(
        Claim(
            "largest a before the loss rises, with batch norm over without, mini-batch 1",
            lambda results: results.ratio(
                dict(quantity="improving", layer=1, norm="batch"), dict(quantity="improving", layer=1, norm="none")
            ),
            None,
            above(10),
            "geometric",
        ),
        claim("largest to 0.01", "largest relative loss, a up to 0.01", 1, "none", 1e6, above(1e3)),
        claim("largest", "largest relative loss", 1, "batch", 3, below(10)),
        claim("best rate", "best a", 1, "batch", 0.03, within_factor(0.03, 3)),
        claim("best rate", "best a", 1, "none", 2e-4),
        *(claim("lowest", "lowest relative loss", at, norm, LOWEST.get((norm, at))) for norm in NETS for at in AT),
        *(claim("improving", "largest a before the loss rises", at, norm) for norm in NETS for at in AT),
    ),
    runs=tuple(
        Run(norm, "landscape", norm, seeds=5, options={"lr": lr, "at": AT, "rates": RATES})
        for norm, lr in (("batch", 0.1), ("none", 1e-4))
    ),
    smaller={"smoke": {"batch": 2, "seeds": 1, "depth": 8, "rates": RATES[::6]}, "quick": {"seeds": 2}},
    minutes={"quick": 2.5, "paper": 6},
)
