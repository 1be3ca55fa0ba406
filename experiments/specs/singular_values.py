"""Theorem 1, Figures 8, 9 and 20: the spectrum of a product of random matrices widens with every factor."""

from . import Claim, Run, Spec, above, between, within, within_factor

FACTORS = (1, 2, 3, 5)
FIRST_BIN = {1: 260, 3: 2150, 5: 3850}  # read off Figure 9: 50 bins, 10 draws of 1000 values
EDGE = {1: 2.0, 3: 3.1, 5: 3.9}
ALL = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20)


def theorem(quantity: str, text: str, factors: int, is_: float, distance: float) -> Claim:
    text += f", {factors} factor{'s' * (factors > 1)}"
    return Claim(text, lambda results: results.each(quantity, factors, label="density"), is_, within(is_, distance))


def sample(quantity: str, text: str, factors: int, paper: float | None = None, check=None, run="products") -> Claim:
    text += f", {factors} factor{'s' * (factors > 1)}"
    return Claim(text, lambda results: results.each(quantity, factors, label=run), paper, check)


def power(m: int) -> float:
    return -m / (m + 1)


def by_depth(quantity: str, text: str, check) -> Claim:
    return Claim(text, lambda results: results.each(quantity, label="conditions"), None, check)


SPEC = Spec(
    title="How do the singular values of matrix products spread?",
    of="Theorem 1, Figures 8 and 9, Appendix K (Figure 20)",
    order=5.5,
    headline="largest singular value drawn, 5 factors",
    shows="A deep linear network multiplies random matrices. As the number M of factors grows, the singular values of "
    "the product spread. Many come close to zero, where their density diverges, the largest grows, and the condition "
    "number rises with depth. Theorem 1 has the density, Figure 9 has samples of 1, 3 and 5 factors, and Figure 20 "
    "has condition numbers.",
    method="Equation 5 is evaluated and integrated over its angle. Its x is the square of a singular value s, as the "
    "distances below show. The paper speaks of singular values. Samples: 1, 2, 3 and 5 factors of 1000 x 1000 with "
    "independent N(0, 1/N) entries, ten draws (the paper's caption says standard Gaussian, its axis fits 1/N). "
    "Condition numbers: 20 draws of 20 factors with N = 200, because the paper's N is not known. |X| and |X^-1| are "
    "accumulated separately. This is exact far beyond 10^16, where the singular values of the computed product are "
    "rounding noise. Exponents of a sample come from its share below x between 2 and 20 %.",
    claims=(
        *(theorem("edge of s", "largest singular value, theorem", m, EDGE[m], 0.05) for m in EDGE),
        *(theorem("mass", "total mass of the density", m, 1, 1e-6) for m in FACTORS),
        *(theorem("m2", "mean of x^2, which is M + 1", m, m + 1, 1e-5) for m in FACTORS),
        *(theorem("exponent", "density near 0 as a power of x", m, power(m), 0.001) for m in FACTORS),
        theorem("edge over e (M + 1/2)", "edge of x over e (M + 1/2): the theorem's O(M)", 5, 1, 0.005),
        *(
            sample("first bin", "values in the first of 50 bins", m, n, within_factor(n, 1.1))
            for m, n in FIRST_BIN.items()
        ),
        *(sample("largest", "largest singular value drawn", m, s, within(s, 0.1)) for m, s in EDGE.items()),
        *(sample("exponent", "drawn density near 0 as a power", m, power(m), within(power(m), 0.02)) for m in FACTORS),
        *(sample("distance of s^2", "Kolmogorov distance, s^2", m, check=between(0, 0.008)) for m in FACTORS),
        *(sample("distance of s", "Kolmogorov distance, s itself", m, check=above(0.1)) for m in FACTORS),
        by_depth("slope", "log10 condition number, gain per factor", between(1.25, 1.6)),
        by_depth("straightness", "log10 condition number against M: R^2 of a straight line", above(0.98)),
        *(sample("log10 kappa", "log10 condition number, N = 200", m, run="conditions") for m in ALL),
        *(sample("log10 kappa", "log10 condition number, N = 1000", m) for m in FACTORS),
    ),
    runs=(
        Run("density", "theory", quantities=("density",), seeds=1, options={"factors": (*FACTORS, 10)}),
        Run("products", "theory", quantities=("products",), seeds=10, options={"factors": FACTORS, "size": 1000}),
        Run("conditions", "theory", quantities=("conditions",), seeds=20, options={"factors": ALL, "size": 200}),
    ),
    smaller={"smoke": lambda run: {"seeds": min(run.seeds, 2)} | ({"size": 60} if run.seeds > 1 else {})},
    given="read off",
    minutes={"full": 0.38},
    images=False,
    remark="The theorem's O(M) for the largest value is about x. The largest singular value itself grows like the "
    "root of e M. Condition numbers gain 1.49 decades with each factor. The theory of Lyapunov exponents (Newman, "
    "1986) has 1.43 in the limit of many factors. Singular values of the computed product cannot show condition "
    "numbers above 10^18.",
)
