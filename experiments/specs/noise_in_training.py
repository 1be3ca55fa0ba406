"""Beyond the paper: the noise lr C / |B| that the runs of Figure 1 feel, measured along their way."""

from . import REDUCED, Claim, Run, Spec, above, between, each

NETS = {
    "batch-0.1": ("batch", 0.1),
    "batch-0.003": ("batch", 0.003),
    "batch-0.0001": ("batch", 0.0001),
    "none-0.0001": ("none", 0.0001),
}
FELT = "lr C / |B| before the first drop"


def gap(first: str, second: str, check) -> Claim:
    return Claim(
        f"log10 {FELT}: {first} less {second}",
        lambda results: results.gap(f"log10 {FELT}", first, second),
        None,
        check,
    )


SPEC = Spec(
    title="How much gradient noise do the runs of Figure 1 feel?",
    of="Beyond the paper: equation 2 along Figure 1",
    order=2.6,
    shows="The paper reads equation 2 as: the noise of SGD is lr C / |B|, so that a high learning rate means noise, "
    "which regularises. It does not measure C, which changes along training and with the network.",
    method="Runs of Figure 1, all for as many epochs as that of 0.1, scales as there. At "
    "steps spread evenly over the logarithm, eight further batches of 128 pass through the network as it stands, in "
    "training mode; C is 128 times the variance of their gradients. Compared is the last measurement before the "
    "learning rate drops. Were C the same for all, lr C / |B| would differ as the learning rates do: 1.5 decades "
    "between 0.1 and 0.003, and 1.5 between that and 0.0001.",
    claims=(
        gap("batch-0.1", "batch-0.003", above(0.5)),
        gap("batch-0.003", "batch-0.0001", above(0.5)),
        gap("batch-0.0001", "none-0.0001", between(-1.5, 1.5)),
        *(Claim(f"{FELT}, {k}", each(FELT, label=k), mean="geometric") for k in NETS),
        *(
            Claim(
                f"C before the first drop, {k}",
                each("C before the first drop", label=k),
                mean="geometric",
            )
            for k in NETS
        ),
    ),
    runs=tuple(
        Run(label, "training", norm, seeds=3, options={"lr": lr, "epochs": 165, "noise": 16})
        for label, (norm, lr) in NETS.items()
    ),
    smaller={
        "smoke": {"depth": 8, "epochs": 1, "batch": 16, "images": 64, "tests": 50, "noise": 3, "seeds": 1},
        "quick": {"depth": 8, "epochs": 2, "images": 5000, "noise": 8, "seeds": 1},
        "reduced": {**REDUCED, "epochs": 100},
    },
    beyond=True,
    minutes={"quick": 1, "reduced": 240},
    remark="Of ResNet-20, trained for 6 epochs on all images (one seed, two for 0.1), C before the drop is 86 at 0.1, "
    "1281 at 0.003 and 343 at 0.0001: the step is 33 times as long at 0.1 as at 0.003, the noise it brings only twice. "
    "So C is not a constant of the network, and lr alone does not tell the noise. Without batch norm C is 38 at "
    "0.0001, nine times smaller: at the same learning rate the two networks of Figure 1 that end alike do not feel "
    "the same noise. After two short epochs (quick) C is still alike for all rates.",
)
