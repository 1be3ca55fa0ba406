"""Beyond the paper: how far along a step its gradient stays what it was."""

from . import Claim, Run, Spec, above, each

RATES = tuple(10 ** (k / 4) for k in range(-32, -3))  # 1e-8 to 0.1
AT = (1, 7)
NETS = {"batch": "with batch norm", "none": "without"}


def ratio(text: str, quantity: str, of: str, to: str, at: int, check) -> Claim:
    return Claim(
        f"{text}, mini-batch {at}, {NETS[of]} over {NETS[to]}",
        lambda results: results.ratio(
            dict(quantity=quantity, layer=at, norm=of), dict(quantity=quantity, layer=at, norm=to)
        ),
        None,
        check,
        "geometric",
    )


SPEC = Spec(
    title="How far does a gradient predict the next one?",
    of="Beyond the paper: Santurkar et al. (2018)",
    order=4.06,
    shows="Santurkar et al. explain batch norm by a smoother landscape: along a step, the gradient changes less. The "
    "paper's Figure 3 looks at the loss alone.",
    method="Along the lines of Figure 3, at mini-batches 1 and 7 and a from 1e-8 to 0.1, four to a decade, the "
    "gradient g(a) there: its change ||g(a) - g|| / ||g||, and the effective smoothness ||g(a) - g|| / ||a g||, which "
    "their paper calls beta when it is the largest along the line. Reach is the largest a before the change is half "
    "of ||g||.",
    claims=(
        *(ratio("reach", "reach", "batch", "none", at, above(10)) for at in AT),
        ratio("norm of the gradient", "norm", "none", "batch", 1, above(10)),
        ratio("norm of the gradient", "norm", "none", "batch", 7, None),
        *(
            Claim(
                f"reach, mini-batch {at}, {text}",
                each("reach", at, norm=norm),
                mean="geometric",
            )
            for norm, text in NETS.items()
            for at in AT
        ),
    ),
    runs=tuple(
        Run(norm, "landscape", norm, seeds=5, options={"lr": lr, "at": AT, "rates": RATES, "gradients": True})
        for norm, lr in (("batch", 0.1), ("none", 1e-4))
    ),
    smaller={
        "smoke": {"batch": 2, "seeds": 1, "depth": 8, "rates": RATES[::4]},
        "quick": {"seeds": 1, "rates": RATES[::2]},
    },
    minutes={"quick": 1.5, "full": 14},
    beyond=True,
    remark="Refuted at mini-batch 1: in a fresh network the gradient keeps its direction for a step of 4e-6 with batch "
    "norm and of 2e-6 without, so a factor of 2 and not of 10. Per unit of a the gradient without batch norm is 200 "
    "times as long, so that at equal length of the step, a ||g||, the network without batch norm is the one whose "
    "gradient holds further. At mini-batch 7 the claim holds in the mean, at three seeds of five.",
    thresholds="Set on 2026-11-22 without a trial, on rates from 1e-5 on, where no network had any reach at mini-batch "
    "1 and the ratio was 0/0. On 2026-11-28 the rates were extended down to 1e-8 and the same threshold was put on "
    "mini-batch 7. A computation on two networks was known by then, which contradicts the claim at mini-batch 1.",
)
