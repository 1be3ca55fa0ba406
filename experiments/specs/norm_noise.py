"""Beyond the paper: whether the norm layers' gradients predict the noise of the whole gradient (Gray et al., 2024)."""

from . import Claim, Run, Spec, above, below, between, each

NETS = {"batch": "batch norm", "affine": "without batch norm"}


def claims(text: str, quantity: str, check=None, mean: str = "arithmetic") -> list[Claim]:
    return [Claim(f"{text}, {net}", each(quantity, label=label), None, check, mean=mean) for label, net in NETS.items()]


SPEC = Spec(
    title="Do norm layers see the noise of the whole gradient?",
    of="Beyond the paper: Gray et al. (2024)",
    order=2.7,
    headline="rank correlation, samples and network, batch norm",
    shows="Gray et al. (2024) find for layer norm that the noise scale of the gradients of the norm layers, which one "
    "backward pass gives, follows that of all parameters along training. They do not examine batch norm, which couples "
    "the samples of a batch through its statistics.",
    method="ResNet-110 at a rate of 0.0001, at which both networks train, three seeds of each. Without batch norm the "
    "same layers have statistics that are frozen at mean 0 and variance 1. They keep a weight and a bias for each "
    "channel, and their samples are independent. At steps that are evenly spaced in the logarithm, 16 more batches "
    "pass through the network in training mode, and nothing of the training changes. They give the noise scale B = tr "
    "Sigma / |G|^2 (McCandlish et al., 2018) in three ways. (a) network: from the gradients of the batches, of all "
    "parameters. (b) norms: the same for the parameters of the norm layers alone. (c) samples: from the contributions "
    "of the samples within each batch to the gradients of the norm layers' parameters. tr Sigma and |G|^2 of (c) are "
    "added up over the layers and averaged over the batches. With batch norm a contribution is not the gradient of an "
    "independent sample, because it depends on the other samples of its batch. (c) against (b) shows what this does, "
    "and (c) against (a) is the question. Where the estimate of |G|^2 is not positive, B counts as infinite.",
    claims=(
        *claims("rank correlation, samples and network", "rank correlation", above(0.8)),
        *claims("largest factor between samples / network and its median", "departure", below(2), "geometric"),
        *claims("B, samples / norms, median of a run", "scale, samples / norms", between(0.7, 1.4), "geometric"),
        *claims("tr Sigma, samples / norms", "noise, samples / norms", between(0.7, 1.4), "geometric"),
        *claims("rank correlation, norms and network", "rank correlation of norms"),
        *claims("test accuracy", "test accuracy"),
    ),
    runs=tuple(
        Run(norm, "norm_noise", norm, seeds=3, options={"lr": 0.0001, "epochs": 165, "noise": 24, "parts": 16})
        for norm in NETS
    ),
    smaller={
        "smoke": {"depth": 8, "epochs": 1, "batch": 8, "images": 64, "tests": 50, "noise": 3, "parts": 2, "seeds": 1},
        "quick": {
            "depth": 8,
            "lr": 0.03,
            "epochs": 1,
            "batch": 32,
            "images": 9600,
            "augment": False,
            "tests": 1000,
            "noise": 10,
            "parts": 32,
        },
        "reduced": {"depth": 20, "lr": 0.01, "epochs": 5, "noise": 16},
    },
    reduction={
        "quick": "ResNet-8 at a rate of 0.03, 300 steps with batches of 32, no image twice, without crops and flips. "
        "10 measurements on 32 batches.",
        "reduced": "ResNet-20 at a rate of 0.01, 5 epochs, 16 measurements.",
    },
    beyond=True,
    given="derived",
    thresholds="Set on 2026-11-30 before any measurement.",
    minutes={"quick": 1.7, "reduced": 50, "full": 8000},
    remark="With batch norm the samples do not show the noise. For ResNet-20 their tr Sigma is 2.0 to 2.4 times that "
    "of the batches at first and 7 to 9 times after 1,000 steps, and the estimate of |G|^2 is negative at all 48 "
    "measurements, so B does not exist. The contributions of the samples of a batch cancel in part, because the "
    "statistics couple them. Without batch norm tr Sigma agrees, and B from the samples follows that of the network "
    "with rank correlations of 0.85, 0.82 and 0.79, as Gray et al. find for layer norm. Single values differ by much "
    "more than a factor of 2, because |G|^2 is small beside its error. The norm layers' gradients over batches follow "
    "the network in both cases, in part because both come from the same batches. At quick scale batches of 32 are too "
    "small to follow B: rank correlations of 0.44, 0.14 and 0.22 without batch norm.",
)
