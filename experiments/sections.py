"""The report on one experiment: verdict, claims, tables and the conditions of its runs.

A section is built from the results of runs, or from the record of an earlier report. The record of a published report
is used if the runs of an experiment are not on this machine.
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from . import draw, drawer, spec
from .results import Finding, Results, Value, configuration, find, judge, judged, verdict
from .specs import PRECISIONS, SCALES, Spec

IMAGES = {"cifar10": "CIFAR-10", "synthetic": "synthetic images", "none": "no images"}
COMMANDS = ("repeat", "to run it")  # the facts that are commands
JUDGEMENTS = ("held", "held in part", "did not hold")


@dataclass(frozen=True)
class Section:
    """The content of the report on one experiment."""

    name: str
    spec: Spec
    scale: str
    data: str
    verdict: str
    findings: list[Finding]
    tables: dict[str, draw.Rows]
    facts: dict[str, str]  # the conditions of the runs, by label
    runs: list[dict]  # label, seed, date and seconds of each run; the seconds are None if they are not known
    precision: str = PRECISIONS[0]  # of training

    @property
    def headline(self) -> Finding:
        """The finding whose number is in the first table."""
        [headline] = [finding for finding in self.findings if finding.claim.text == self.spec.headline]
        return headline

    @property
    def outcome(self) -> str:
        """The verdict, and the number of claims that it depends on."""
        checked = [finding for finding in self.findings if finding.claim.check and finding.values]
        count = f"{sum(finding.held is True for finding in checked)} of {len(checked)} claims"
        if self.verdict == "incomplete":
            return f"{self.verdict} ({count} so far)"
        return f"{self.verdict} ({count})" if self.verdict in JUDGEMENTS else self.verdict

    @property
    def kind(self) -> str:
        """The group of the report's tally to which it belongs."""
        if self.verdict in ("shown", "not run"):
            return self.verdict
        if self.spec.beyond:
            return "beyond the paper"
        return "as in the paper" if self.scale == "full" else self.scale

    @property
    def n(self) -> str:
        """The scale and the number of seeds."""
        if not self.runs:
            return ""
        labels = [run["label"] for run in self.runs]
        counts = [labels.count(label) for label in set(labels)]
        least, most = min(counts), max(counts)
        scale = self.scale
        if scale == "full":
            scale = "beyond the paper" if self.spec.beyond else "as in the paper"
        return f"{scale}, n\u00a0=\u00a0{least}" + (f" to {most}" if most > least else "")

    @property
    def reduction(self) -> str:
        """The differences from scale full, or "" if there are none."""
        return self.spec.reduction.get(self.scale, "")

    @property
    def caution(self) -> str:
        """The limits of the numbers, or "" if there are none."""
        if self.data == "synthetic":
            return "Synthetic images instead of CIFAR-10. These numbers only show that everything runs."
        if self.scale == "smoke":
            return "Smoke scale. These numbers only show that everything runs. No claim is judged by them."
        if self.scale == "quick":
            return "Quick scale, a demonstration of minutes. No claim is judged by these numbers."
        cautions = ["Reduced scale."] * (self.scale == "reduced")
        return " ".join([*cautions, *[f"Trained in {self.precision}."] * (self.precision != PRECISIONS[0])])

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Of two sections on one experiment, the one with the higher rank has the more informative results."""
        is_scale = self.scale in SCALES
        return bool(self.runs), self.data != "synthetic", SCALES.index(self.scale) if is_scale else -1


# ------------------------------------------------------------------------------------------------ from runs


def of_results(name: str, results: Results, out: Path) -> Section:
    """The section on the results in ``out``."""
    experiment_spec = spec(name)
    outcome, findings = judge(experiment_spec, results)
    tables = drawer(name).tables(experiment_spec, results) if results.runs else {}
    runs = [
        {
            "label": run.config["label"],
            "seed": run.config["seed"],
            "date": run.env["started"][:10],
            "seconds": run.env["seconds"],
        }
        for run in results.runs
    ]
    facts = _facts(name, experiment_spec, results, out)
    return Section(
        name, experiment_spec, results.scale, results.data, outcome, findings, tables, facts, runs, results.precision
    )


def _facts(name: str, experiment_spec: Spec, results: Results, out: Path) -> dict[str, str]:
    """The conditions of the runs. Each is stated once if all runs agree, and else as a list."""
    if not results.runs:
        return {"to run it": _command(name, "full", "")}

    def all_of(value) -> str:
        return "; ".join(sorted({str(value(run.env)) for run in results.runs}))

    prefix = f"{results.scale}-*" + ("-synthetic" if results.data == "synthetic" else "")
    failed = len(list((out / name).glob(f"{prefix}/error.txt")))
    seeds = sorted({run.config["seed"] for run in results.runs})
    counts = {run.label: len(results.where(label=run.label)) for run in experiment_spec.runs}
    lenders = sorted({run.folder.parent.name for run in results.runs} - {name})
    measured = {
        "runs": ", ".join(f"{label}: {count}" for label, count in counts.items())
        + f"; seeds {_span(seeds)}"
        + (f"; {failed} failed" if failed else "")
        + (f"; {results.stale} with another configuration left out" if results.stale else "")
        + (f"; some are runs of {', '.join(lenders)} with the same settings" if lenders else ""),
        "date": all_of(lambda env: env["started"][:10]),
        "commit": all_of(lambda env: env["commit"] + (" with changes" if env["dirty"] else "")),
        "duration": _duration(sum(run.env["seconds"] for run in results.runs)),
        "machine": all_of(lambda env: f"{env['device']}, {env['cpu']}, {env['threads']} threads, {env['system']}"),
        "kernels": all_of(
            lambda env: f"bnkern backend {env['backend']}" + (f", {env['layout']}" if "layout" in env else "")
        ),
        "versions": all_of(lambda env: ", ".join(f"{k} {v}" for k, v in env["versions"].items())),
    }
    return _conditions(name, experiment_spec, results.scale, results.data, results.precision, measured)


def _conditions(
    name: str, experiment_spec: Spec, scale: str, data: str, precision: str, measured: dict[str, str]
) -> dict[str, str]:
    return {
        "scale": f"{scale}, {IMAGES[data]}",
        **({"thresholds": experiment_spec.thresholds} if experiment_spec.thresholds else {}),
        **measured,
        "repeat": _command(name, scale, data, precision),
    }


def _command(name: str, scale: str, data: str, precision: str = PRECISIONS[0]) -> str:
    command = f"python -m experiments run {name} --scale {scale}" + " --data synthetic" * (data == "synthetic")
    return command + f" --precision {precision}" * (precision != PRECISIONS[0])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s in all"
    return f"{seconds / 60:.0f} min in all" if seconds < 5400 else f"{seconds / 3600:.1f} h in all"


def _span(seeds: list[int]) -> str:
    """The seeds as text: "0 to 9" if none is missing, and else a list."""
    first, last = seeds[0], seeds[-1]
    return f"{first} to {last}" if last - first + 1 == len(seeds) > 2 else ", ".join(map(str, seeds))


# ------------------------------------------------------------------------------------------------ from a record


def record(section: Section) -> dict:
    """The section as data for programs and for :func:`of_record`. It names the CSV files of its tables."""
    return {
        "name": section.name,
        "title": section.spec.title,
        "of": section.spec.of,
        "verdict": section.verdict,
        "kind": section.kind,
        "scale": section.scale,
        "data": section.data,
        "precision": section.precision,
        "configuration": fingerprint(section.name, section.spec, section.scale, section.data, section.precision),
        "headline": section.spec.headline,
        "remark": section.spec.remark,
        "caution": section.caution,
        "reduction": section.reduction,
        "facts": section.facts,
        "runs": section.runs,
        "claims": [
            {
                "claim": finding.claim.text,
                "paper": finding.claim.paper,
                "ours": plain(_digits(finding.mean, 7)) if finding.values else None,
                "mean": finding.claim.mean,
                "spread": plain(_digits(finding.spread, 7)) if finding.values else None,
                "given": finding.claim.given or section.spec.given,
                "values": [plain(_digits(value.number, 9)) for value in finding.values],
                "bounds": [value.bound for value in finding.values],
                "check": finding.claim.check.text if finding.claim.check else None,
                "held": finding.held,
                "passing": finding.passing,
                "percentile": finding.percentile,
            }
            for finding in section.findings
        ],
        "tables": list(section.tables),
    }


def of_record(entry: dict, folder: Path) -> Section | None:
    """The section of a record in the folder of a report, judged by the present spec.

    None if the record has no runs, or if its configuration or its checks are not those of the present spec.
    """
    name, scale, data = entry["name"], entry["scale"], entry["data"]
    precision = entry.get("precision", PRECISIONS[0])
    experiment_spec = spec(name)
    checks = [claim.check.text if claim.check else None for claim in experiment_spec.claims]
    if (
        not entry["runs"]
        or entry["configuration"] != fingerprint(name, experiment_spec, scale, data, precision)
        or [claim["check"] for claim in entry["claims"]] != checks
    ):
        return None
    findings = [
        find(
            claim,
            [Value(float(n), b) for n, b in zip(stored_claim["values"], stored_claim["bounds"], strict=True)],
            judged(scale, data),
        )
        for claim, stored_claim in zip(experiment_spec.claims, entry["claims"], strict=True)
    ]
    outcome = verdict(findings, True, judged(scale, data))
    tables = {table: read_csv(folder / "data" / f"{table}.csv") for table in entry["tables"]}
    recomputed = ("scale", "thresholds", "repeat")
    measured = {label: fact for label, fact in entry["facts"].items() if label not in recomputed}
    facts = _conditions(name, experiment_spec, scale, data, precision, measured)
    return Section(name, experiment_spec, scale, data, outcome, findings, tables, facts, entry["runs"], precision)


def fingerprint(name: str, experiment_spec: Spec, scale: str, data: str, precision: str = PRECISIONS[0]) -> str:
    """A hash of the configurations of all runs, without the number of seeds. "" if there are no runs."""
    planned = experiment_spec.at(scale) if scale in SCALES else ()
    configs = [configuration(name, experiment_spec, run, scale, data, 0, precision) for run in planned]
    return hashlib.sha1(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:12] if configs else ""


def _digits(value: float, digits: int) -> float:
    """The value with that many digits. A record keeps fewer than all 17 digits, in half of the space."""
    return float(f"{value:.{digits}g}")


def plain(value: object) -> object:
    """The value as JSON can store it: a Python number for a numpy number, and a string for nan and inf."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and value - value != 0 else value


# ------------------------------------------------------------------------------------------------ tables as CSV


def write_csv(file: Path, rows: draw.Rows) -> None:
    """Writes a table, with numbers to six digits. Figures are drawn from the file, so they can be repeated from it."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read_csv(file: Path) -> draw.Rows:
    """The rows of a table: numbers as numbers, empty cells as None, other cells as text."""
    with file.open(newline="") as stream:
        return [{key: _value(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]


def _value(cell: str) -> object:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None
