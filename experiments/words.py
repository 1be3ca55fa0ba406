"""Numbers and findings as text for a reader."""

import math
import re

from .results import Finding
from .specs import Spec

GIVEN = {"printed": "{}", "read off": "≈ {}", "derived": "({})"}  # formats of the paper's numbers


def number(value: object) -> str:
    """The number with three digits, or "-" for a missing value."""
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if 1000 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return _short(value, 3)


def _short(value: float, digits: int = 6) -> str:
    """The number with at most this many digits and no trailing zeros, for example 0.85 or 7.5e-5."""
    if value and not 1e-3 <= abs(value) < 10 ** min(digits, 5):
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{value:.{digits - 1}e}")
    return f"{value:.{digits}g}"


def paper(finding: Finding, spec: Spec) -> str:
    """The paper's number. It keeps its digits if it is printed, and has three if it was read off or derived."""
    claim, given = finding.claim, finding.claim.given or spec.given
    if claim.paper is None:
        return "–" if spec.beyond else "not available"
    return GIVEN[given].format(_short(claim.paper, 6 if given == "printed" else 3))


def sign(finding: Finding) -> str:
    """A text that states whether the claim held."""
    if finding.held is None:
        return "– undecided" if finding.undecided else "shown"
    return "✓ held" if finding.held else "✗ not held"


def seeds(finding: Finding) -> str:
    """The number of seeds that pass the check by themselves, as text."""
    if finding.held is None or finding.claim.pooled:
        return ""
    return f"{finding.passing} of {len(finding.values)}"


def ours(finding: Finding) -> tuple[str, str]:
    """Our number, and its spread with n. The spread decides the digits of an arithmetic mean.

    "paper at 4 %" means that 4 % of our numbers are below the paper's.
    """
    if not finding.values:
        return "-", ""
    if finding.claim.pooled:
        return ("not known", "too few networks") if finding.bound != 0 else (number(finding.mean), "all networks")
    count = f"n\u00a0=\u00a0{len(finding.values)}"
    if finding.percentile is not None:
        count += f", paper at\u00a0{finding.percentile:.0f}\u00a0%"
    if finding.bound != 0:
        bound = {1: "at least ", -1: "at most ", None: "bounds near "}[finding.bound]
        ends = sum(value.bound != 0 for value in finding.values)
        return bound + number(finding.mean), f"{ends} of {len(finding.values)} at the edge of the search"
    if not math.isfinite(finding.spread) or not finding.spread:
        return number(finding.mean), count
    if finding.claim.mean == "geometric":
        spread = f"{finding.spread:.2f}" if finding.spread < 100 else number(finding.spread)
        return number(finding.mean), f"×/÷ {spread}, {count}"
    digits = max(0, 1 - math.floor(math.log10(finding.spread)))
    return f"{finding.mean:.{digits}f}", f"± {finding.spread:.{digits}f}, {count}"


def check(finding: Finding) -> str:
    """The condition of the claim, or "" if it has none."""
    return finding.claim.check.text if finding.claim.check else ""


def group_title(texts: list[str]) -> str:
    """One title for claims whose texts differ in one part between commas: "a/b, layer 18 to layer 90, mean"."""
    parts = [dict.fromkeys(column) for column in zip(*(text.split(", ") for text in texts), strict=True)]
    return ", ".join(" to ".join(dict.fromkeys((next(iter(part)), next(reversed(part))))) for part in parts)


def grouped(findings: list[Finding]) -> list[list[Finding]]:
    """Groups of consecutive findings. The texts of a group differ only in one part between commas."""
    groups: list[list[Finding]] = []
    for finding in findings:
        if groups and _alike([member.claim.text for member in [*groups[-1], finding]]):
            groups[-1].append(finding)
        else:
            groups.append([finding])
    return groups


def _alike(texts: list[str]) -> bool:
    split = [text.split(", ") for text in texts]
    if len({len(parts) for parts in split}) > 1:
        return False
    return sum(len(set(column)) > 1 for column in zip(*split, strict=True)) <= 1
