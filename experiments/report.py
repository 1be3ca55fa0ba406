"""The report: every experiment's claims, the paper's numbers and ours, the verdict, the figure, and how to redo it.

The same content four times: ``report.html``, one self-contained page; ``report.md``; ``report.json`` for programs;
``figures/`` and ``data/`` beside them. The same results give the same bytes.
"""

import csv
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import draw, drawer, names, spec
from .results import PUBLISHED, RUNS, Finding, Results, finished, judge, read
from .specs import JUDGED, Spec

TITLE = "Understanding Batch Normalization, reproduced"
LEAD = (
    "Bjorck, Gomes, Selman and Weinberger (2018) explain what batch norm does by a set of experiments. Each is run "
    "again here on bnkern's kernels, and the paper's claims are held against the results. A claim holds where the mean "
    "over seeds is what is stated under it; beside it stands how many seeds pass by themselves. An experiment "
    "holds where all its claims hold. A number that is not finite never holds. A limit at the edge of what was tried "
    "is only a bound, and is left undecided. The paper's numbers are those that it prints; ≈ marks one that was read "
    'off a figure, brackets one that was derived from its numbers, and "not available" that it gives none.'
)
THRESHOLDS = (
    "Set on 2026-11-22 in the commit that added the experiment, from the paper's numbers and from trials on one to "
    "eight networks; unchanged since."
)
REDUCED = (
    "Reduced means the paper's learning rates on few training images without augmentation, so that every network can "
    "fit them in hours instead of weeks."
)
PARTS = {  # of the paper's story, by the lowest Spec.order that belongs to each
    0: "Larger learning rates, and what they do",
    3: "Why networks without batch norm diverge",
    5: "How badly a fresh network is conditioned",
    5.5: "Random matrices, and other normalisations",
}
CLASSES = {"held": "held", "held in part": "part", "did not hold": "not"}
GIVEN = {"printed": "{}", "read off": "≈ {}", "derived": "({})"}  # how the paper's numbers are written
IMAGES = {"cifar10": "CIFAR-10", "synthetic": "made-up images", "none": "no images"}
COMMANDS = ("again", "to run it")  # those of a section's facts that are typed


@dataclass(frozen=True)
class Section:
    """One experiment, ready to be told."""

    name: str
    spec: Spec
    results: Results
    verdict: str
    findings: list[Finding]
    tables: dict[str, draw.Rows]
    facts: dict[str, str]  # under which conditions; by label

    @property
    def outcome(self) -> str:
        """The verdict, and how many claims it rests on."""
        checked = [finding for finding in self.findings if finding.claim.check and finding.values]
        told = f"{sum(finding.held is True for finding in checked)} of {len(checked)} claims"
        if self.verdict == "incomplete":
            return f"{self.verdict} ({told} so far)"
        return f"{self.verdict} ({told})" if self.verdict in CLASSES else self.verdict

    @property
    def kind(self) -> str:
        """Which of the groups of :func:`_tally` it belongs to."""
        if self.verdict in ("shown", "not run"):
            return self.verdict
        if self.spec.beyond:
            return "beyond the paper"
        return "as in the paper" if self.results.scale == "full" else self.results.scale

    @property
    def n(self) -> str:
        """At which scale, on how many seeds."""
        if not self.results.runs:
            return ""
        seeds = {len(self.results.where(label=run.config["label"])) for run in self.results.runs}
        least, most = min(seeds), max(seeds)
        scale = self.results.scale
        if scale == "full":
            scale = "beyond the paper" if self.spec.beyond else "as in the paper"
        return f"{scale}, n = {least}" + (f" to {most}" if most > least else "")

    @property
    def caution(self) -> str:
        """What limits the numbers, if anything does."""
        if self.results.data == "synthetic":
            return "Synthetic images, not CIFAR-10: these numbers show that everything runs, and nothing else."
        if self.results.scale in ("smoke", "quick"):
            scale = self.results.scale.capitalize()
            return f"{scale} scale: these numbers show that everything runs. No claim is held against them."
        if self.results.scale == "reduced":
            return f"Reduced scale. {REDUCED}"
        return ""


def report(out: Path, scale: str | None = None, published: Path | None = None) -> Path:
    """Writes the report on the results in ``out``, of one scale or of each experiment's largest; the page's path.

    With ``published``, a folder that :func:`publish` has filled, the runs kept there are added.
    """
    for folder in ("figures", "data"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    kept = {name: published and published / RUNS / name for name in names()}
    sections = [_section(name, read(out / name, spec(name), scale, kept[name]), out) for name in names()]
    figures = {}
    for section in sections:
        for name, rows in section.tables.items():
            _write_csv(out / "data" / f"{name}.csv", rows)
        if section.tables:
            stem = out / "figures" / section.name
            draw.save(drawer(section.name).draw, next(iter(section.tables.values())), stem)
            figures[section.name] = stem.with_suffix(".svg").read_text()
    (out / "report.json").write_text(json.dumps(_json(sections), indent=1, ensure_ascii=False) + "\n")
    (out / "report.md").write_text(_markdown(sections))
    page = out / "report.html"
    page.write_text(_html(sections, figures))
    return page


def publish(out: Path, to: Path = PUBLISHED) -> int:
    """Copies the report, its figures and its CSV files to the folder that is committed; the exit status.

    The finished training runs of scales that are judged are copied too: they take hours, and a report on another
    machine can add them. Refuses results that cannot speak about the paper.
    """
    told = json.loads((out / "report.json").read_text())["experiments"]
    unfit = [e["name"] for e in told if e["facts"].get("scale", "").startswith("smoke") or e["synthetic"]]
    if unfit:
        print(f"not published: {', '.join(unfit)} ran on synthetic images or at smoke scale only", file=sys.stderr)
        return 1
    for folder in ("figures", "data"):
        shutil.rmtree(to / folder, ignore_errors=True)
        shutil.copytree(out / folder, to / folder)
    for file in ("report.html", "report.md", "report.json"):
        shutil.copy(out / file, to / file)
    for name in names():
        for run in finished(out / name):
            if run.config["procedure"] == "training" and run.config["scale"] in JUDGED:
                _keep(run.folder, to / RUNS / name / run.folder.name)
    print(f"published: {to}")
    return 0


def _keep(run: Path, to: Path) -> None:
    """Copies what :func:`.results.finished` reads of a run."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run / "probes", to / "probes")
    for name in ("config.json", "env.json", "DONE"):
        shutil.copy(run / name, to / name)


def _section(name: str, results: Results, out: Path) -> Section:
    about = spec(name)
    verdict, findings = judge(about, results)
    tables = drawer(name).tables(about, results) if results.runs else {}
    return Section(name, about, results, verdict, findings, tables, _facts(name, about, results, out))


def _facts(name: str, about: Spec, results: Results, out: Path) -> dict[str, str]:
    """The conditions of the runs, each said once where all agree, else listed."""
    command = f"python -m experiments run {name} --scale {results.scale if results.runs else 'full'}"
    if not results.runs:
        return {"to run it": command}

    def all_of(value) -> str:
        return "; ".join(sorted({str(value(run.env)) for run in results.runs}))

    if results.data == "synthetic":
        command += " --data synthetic"
    prefix = f"{results.scale}-*" + ("-synthetic" if results.data == "synthetic" else "")
    failed = len(list((out / name).glob(f"{prefix}/error.txt")))
    seeds = sorted({run.config["seed"] for run in results.runs})
    per_net = {net.label: len(results.where(label=net.label)) for net in about.runs}
    return {
        "scale": f"{results.scale}, {IMAGES[results.data]}",
        "thresholds": about.thresholds or THRESHOLDS,
        "runs": ", ".join(f"{label}: {count}" for label, count in per_net.items())
        + f"; seeds {_span(seeds)}"
        + (f"; {failed} failed" if failed else "")
        + (f"; {results.stale} of another configuration left out" if results.stale else ""),
        "took": _took(results),
        "machine": all_of(lambda env: f"{env['device']}, {env['cpu']}, {env['threads']} threads, {env['system']}"),
        "kernels": all_of(lambda env: f"bnkern backend {env['backend']}"),
        "versions": all_of(lambda env: ", ".join(f"{k} {v}" for k, v in env["versions"].items())),
        "commit": all_of(lambda env: env["commit"] + (" with changes" if env["dirty"] else "")),
        "again": command,
    }


def _took(results: Results) -> str:
    """All runs' seconds, for a reader."""
    seconds = sum(run.env["seconds"] for run in results.runs)
    if seconds < 120:
        return f"{seconds:.0f} s in all"
    return f"{seconds / 60:.0f} min in all" if seconds < 5400 else f"{seconds / 3600:.1f} h in all"


def _parts(sections: list[Section]) -> dict[str, list[Section]]:
    """The sections under the headings of :data:`PARTS`."""
    told: dict[str, list[Section]] = {}
    for section in sections:
        told.setdefault(PARTS[max(order for order in PARTS if order <= section.spec.order)], []).append(section)
    return told


HEADLINES = {  # by Section.kind
    "as in the paper": "Measured as in the paper",
    "reduced": "At reduced scale",
    "beyond the paper": "Beyond the paper",
    "not run": "Not run",
    "shown": "Only shown, since their scale or data cannot tell",
}


def _tally(sections: list[Section]) -> list[str]:
    """How many experiments came out how: a sentence for each group, and what reduced means."""
    told = []
    for kind, headline in HEADLINES.items():
        verdicts = [section.verdict for section in sections if section.kind == kind]
        counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
        if kind in ("not run", "shown"):
            counts = [str(len(verdicts))]
        if verdicts:
            told.append(f"{headline}: {', '.join(counts)}.")
    return told + [REDUCED] * any(section.results.scale == "reduced" for section in sections)


def _span(seeds: list[int]) -> str:
    """0 to 9, where they are all there; else listed."""
    first, last = seeds[0], seeds[-1]
    return f"{first} to {last}" if last - first + 1 == len(seeds) > 2 else ", ".join(map(str, seeds))


# ------------------------------------------------------------------------------------------------ words for numbers


def number(value: object) -> str:
    """Three digits for a reader, and "-" for what is not there."""
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if 1000 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return _short(value, 3)


def _short(value: float, digits: int = 6) -> str:
    """0.85, 7.5e-5: with at most so many digits, and none that say nothing."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{value:.{digits - 1}e}")
    return f"{value:.{digits}g}"


def _paper(finding: Finding, spec: Spec) -> str:
    """The paper's number: with the digits it prints, or three where it was read off a figure or derived."""
    claim, given = finding.claim, finding.claim.given or spec.given
    if claim.paper is None:
        return "not available"
    return GIVEN[given].format(_short(claim.paper, 6 if given == "printed" else 3))


def _sign(finding: Finding) -> str:
    """Whether the claim held, for a reader."""
    if finding.held is None:
        return "– undecided" if finding.undecided else "shown"
    return "✓ held" if finding.held else "✗ not held"


def _seeds(finding: Finding) -> str:
    """How many seeds pass by themselves."""
    return f"{finding.passing} of {len(finding.values)}" if finding.held is not None else ""


def _ours(finding: Finding) -> tuple[str, str]:
    """Our number, and its spread with n; an arithmetic mean to the digits that its spread leaves sense in."""
    if not finding.values:
        return "-", ""
    count = f"n = {len(finding.values)}"
    if finding.bound != 0:
        bound = {1: "at least ", -1: "at most ", None: "bounds about "}[finding.bound]
        ends = sum(value.bound != 0 for value in finding.values)
        return bound + number(finding.mean), f"{ends} of {len(finding.values)} at the edge of what was tried"
    if not math.isfinite(finding.spread) or not finding.spread:
        return number(finding.mean), count
    if finding.claim.mean == "geometric":
        spread = f"{finding.spread:.2f}" if finding.spread < 100 else number(finding.spread)
        return number(finding.mean), f"×/÷ {spread}, {count}"
    digits = max(0, 1 - math.floor(math.log10(finding.spread)))
    return f"{finding.mean:.{digits}f}", f"± {finding.spread:.{digits}f}, {count}"


def _check(finding: Finding) -> str:
    return finding.claim.check.text if finding.claim.check else ""


def _write_csv(file: Path, rows: draw.Rows) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {key: _plain(value) for key, value in row.items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


# ------------------------------------------------------------------------------------------------ the three tellings


def _json(sections: list[Section]) -> dict:
    def plain(value: object) -> object:  # JSON has no nan and no inf
        value = _plain(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "title": TITLE,
        "tally": _tally(sections),
        "experiments": [
            {
                "name": section.name,
                "title": section.spec.title,
                "of": section.spec.of,
                "verdict": section.verdict,
                "kind": section.kind,
                "synthetic": section.results.data == "synthetic",
                "remark": section.spec.remark,
                "caution": section.caution,
                "facts": section.facts,
                "claims": [
                    {
                        "claim": finding.claim.text,
                        "paper": finding.claim.paper,
                        "ours": plain(finding.mean) if finding.values else None,
                        "mean": finding.claim.mean,
                        "spread": plain(finding.spread) if finding.values else None,
                        "given": finding.claim.given or section.spec.given,
                        "values": [plain(value.number) for value in finding.values],
                        "bounds": [value.bound for value in finding.values],
                        "check": _check(finding) or None,
                        "held": finding.held,
                        "passing": finding.passing,
                    }
                    for finding in section.findings
                ],
                "tables": {
                    name: [{key: plain(value) for key, value in row.items()} for row in rows]
                    for name, rows in section.tables.items()
                },
            }
            for section in sections
        ],
    }


def _markdown(sections: list[Section]) -> str:
    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        return ["| " + " | ".join(line) + " |" for line in lines] + [""]

    text = [f"# {TITLE}", "", LEAD, "", *(f"- {line}" for line in _tally(sections)), ""]
    rows = []
    for part, members in _parts(sections).items():
        rows.append([f"**{part}**", "", "", ""])
        rows += [[f"[{s.spec.title}](#{s.name})", s.spec.of, s.n, s.outcome] for s in members]
    text += table(["experiment", "of the paper", "scale", "verdict"], rows)
    for s in sections:
        text += [f'<a id="{s.name}"></a>', "", f"## {s.spec.title}", ""]
        text += [f"{s.spec.of} · `{s.name}` · **{s.outcome}**", ""]
        text += [f"> {s.caution}", ""] if s.caution else []
        text += [f"**Known.** {s.spec.shows}", "", f"**Method.** {s.spec.method}", ""]
        text += [f"**To note.** {s.spec.remark}", ""] if s.spec.remark else []
        if s.tables:
            text += [f"![{s.spec.title}](figures/{s.name}.svg)", "", drawer(s.name).CAPTION, ""]
            text += table(
                ["claim", "paper", "ours", "spread", "must be", "seeds that pass", ""],
                [
                    [f.claim.text, _paper(f, s.spec), *_ours(f), _check(f) or "-", _seeds(f), _sign(f)]
                    for f in s.findings
                ],
            )
            text += ["Data: " + ", ".join(f"[{name}.csv](data/{name}.csv)" for name in s.tables), ""]
        text += [f"- {label}: {f'`{fact}`' if label in COMMANDS else fact}" for label, fact in s.facts.items()]
        text += [""]
    return "\n".join(text)


def _html(sections: list[Section], figures: dict[str, str]) -> str:
    style = (Path(__file__).parent / "report.css").read_text()
    tally = "".join(f"<li>{escape(line)}</li>" for line in _tally(sections))
    overview, told = [], []
    for part, members in _parts(sections).items():
        overview.append(f'<tr class="chapter"><th colspan="3">{escape(part)}</th></tr>')
        overview += [
            f'<tr><td><a href="#{s.name}">{escape(s.spec.title)}</a><small>{escape(s.spec.of)}</small></td>'
            f"<td><small>{escape(s.n)}</small></td><td>{_badge(s)}</td></tr>"
            for s in members
        ]
        told.append(f"<h2>{escape(part)}</h2>\n")
        told += [_html_section(section, figures.get(section.name)) for section in members]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>\n{style}</style>\n"
        f'<header id="top">\n<h1>{TITLE}</h1>\n<p>{escape(LEAD)}</p>\n<ul class="tally">{tally}</ul>\n'
        f'<table class="overview">{"".join(overview)}</table>\n</header>\n' + "".join(told)
    )


def _html_section(s: Section, figure: str | None) -> str:
    text = [
        f'<p class="warning">{escape(s.caution)}</p>' if s.caution else "",
        f"<p><b>Known.</b> {escape(s.spec.shows)}</p>",
        f"<p><b>Method.</b> {escape(s.spec.method)}</p>",
        f"<p><b>To note.</b> {escape(s.spec.remark)}</p>" if s.spec.remark else "",
    ]
    top = ' · <a href="#top">contents</a>'
    parts = [
        f'<section id="{s.name}">\n<h3>{escape(s.spec.title)}</h3>',
        f'<p class="soft">{escape(s.spec.of)} · {_badge(s)}{top}</p>',
    ]
    if figure:
        caption = f"<figcaption>{escape(drawer(s.name).CAPTION)}</figcaption>"
        shown = f"<figure>{_inline(figure, s.name)}{caption}</figure>"
        parts.append(f'<div class="beside"><div>{"".join(text)}</div>{shown}</div>')
        parts.append(_html_findings([f for f in s.findings if f.claim.check], s.spec))
        if more := [f for f in s.findings if not f.claim.check]:
            summary = f"<summary>{len(more)} more numbers, without a check</summary>"
            parts.append(f"<details>{summary}{_html_findings(more, s.spec)}</details>")
        parts += [_html_table(name, rows) for name, rows in s.tables.items()]
    else:
        parts += text
    facts = "".join(
        f"<dt>{label}</dt><dd>{f'<code>{escape(fact)}</code>' if label in COMMANDS else escape(fact)}</dd>"
        for label, fact in s.facts.items()
    )
    parts.append(f"<dl>{facts}</dl>\n</section>\n")
    return "\n".join(part for part in parts if part)


def _html_findings(findings: list[Finding], spec: Spec) -> str:
    rows = []
    for f in findings:
        ours, spread = _ours(f)
        check = f"<small>must be {escape(_check(f))}</small>" if f.claim.check else ""
        mark = {True: "held", False: "not", None: "soft"}[f.held]
        seeds = f"<small>{_seeds(f)} seeds pass</small>" if _seeds(f) else ""
        rows.append(
            f'<tr><td>{escape(f.claim.text)}{check}</td><td class="number">{_paper(f, spec)}</td>'
            f'<td class="number">{ours}<small>{escape(spread)}</small></td>'
            f'<td class="{mark}">{_sign(f)}{seeds}</td></tr>'
        )
    head = '<th>claim</th><th class="number">paper</th><th class="number">ours</th><th></th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _html_table(name: str, rows: draw.Rows) -> str:
    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(number(_plain(value)))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return (
        f"<details><summary>{name}.csv</summary>"
        f'<div class="scroll"><table class="raw"><tr>{head}</tr>{body}</table></div></details>'
    )


def _plain(value: object) -> object:
    """numpy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else value


def _badge(section: Section) -> str:
    return f'<span class="verdict {CLASSES.get(section.verdict, "soft")}">{section.outcome}</span>'


def _inline(svg: str, name: str) -> str:
    """A figure for the page: without its prologue and white ground, in the page's colours, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.S)
    colours = {draw.INK: "currentColor", draw.GRID: "var(--grid)"}
    colours |= {colour: f"var(--{name})" for name, colour in draw.COLOURS.items()}
    for colour, own in colours.items():
        svg = svg.replace(colour, own)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
