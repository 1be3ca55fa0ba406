"""The report as one HTML page with its figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import draw, drawer, words
from .results import Finding
from .sections import COMMANDS, Section
from .specs import Spec

CLASSES = {"held": "held", "held in part": "part", "did not hold": "not"}
FOLDED = 12  # if there are more checked claims, groups of similar claims are folded


@dataclass(frozen=True)
class Front:
    """The content before the experiments, without the table of results."""

    title: str
    lead: str
    links: dict[str, str]
    tally: list[str]
    lists: dict[str, Sequence[str]]  # by heading
    sets: list[tuple[str, str, str, list[str]]]  # see report.run_sets


def html(front: Front, parts: dict[str, list[Section]], figures: dict[str, str]) -> str:
    """The page. ``figures`` maps the name of an experiment to its SVG file."""
    style, inlined = (Path(__file__).parent / "report.css").read_text(), Figures()
    links = " · ".join(f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in front.links.items())
    body = [
        f'<header id="top">\n<h1>{front.title}</h1>\n<p>{escape(front.lead)}</p>\n<p>{links}</p>',
        _list(front.tally, "tally"),
        "</header>",
        f'<h2 id="results">Results</h2>\n{_results(parts)}',
    ]
    body += [f'<h2 id="{_id(head)}">{head}</h2>\n{_list(lines)}' for head, lines in front.lists.items()]
    if front.sets:
        body.append(f'<h2 id="{_id(SETS)}">{SETS}</h2>\n{_sets(front.sets)}')
    for part, members in parts.items():
        body.append(f"<h2>{escape(part)}</h2>\n")
        body += [_section(section, figures.get(section.name), inlined) for section in members]
    heads = ["Results", *front.lists, *([SETS] if front.sets else [])]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{front.title}</title>\n<style>\n{style}{inlined.css()}</style>\n"
        f"{_navigation(heads, parts)}\n<main>\n" + "\n".join(body) + "</main>\n"
    )


SETS = "Date and commit of the results"


def paragraphs(s: Section) -> list[tuple[str, str]]:
    """The text of a section: labels and paragraphs."""
    texts = {
        "Background" if s.spec.beyond else "The paper": s.spec.shows,
        "Method": s.spec.method,
        "Reduced here": s.reduction,
        "Remark": s.spec.remark,
    }
    return [(label, text) for label, text in texts.items() if text]


def _id(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _list(lines: Sequence[str], style: str = "") -> str:
    return f'<ul class="{style}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _navigation(heads: list[str], parts: dict[str, list[Section]]) -> str:
    links = [f'<a href="#{_id(head)}">{head}</a>' for head in heads]
    for part, members in parts.items():
        links.append(f"<b>{escape(part)}</b>")
        links += [f'<a href="#{s.name}">{escape(_short_place(s.spec))}<small>{s.name}</small></a>' for s in members]
    return f'<nav aria-label="Contents">{"".join(links)}</nav>'


def _short_place(spec: Spec) -> str:
    place = spec.of.removeprefix("Beyond the paper: ")
    return place[0].upper() + place[1:]


def _results(parts: dict[str, list[Section]]) -> str:
    """The first table: a row for each experiment, with its headline number."""
    rows = []
    for part, members in parts.items():
        rows.append(f'<tr class="chapter"><th colspan="5">{escape(part)}</th></tr>')
        for s in members:
            ours, spread = words.ours(s.headline)
            rows.append(
                f'<tr><td data-label="experiment"><a href="#{s.name}">{escape(s.spec.title)}</a>'
                f"<small>{escape(s.spec.of)}</small></td>"
                f'<td data-label="number">{escape(s.spec.headline)}</td>'
                f'<td class="number" data-label="paper">{words.paper(s.headline, s.spec)}</td>'
                f'<td class="number" data-label="ours">{ours}<small>{escape(spread)}</small></td>'
                f'<td data-label="verdict">{_badge(s)}<small>{escape(s.n)}</small></td></tr>'
            )
    head = '<th>experiment</th><th>number</th><th class="number">paper</th><th class="number">ours</th><th>verdict</th>'
    return f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _sets(sets: list[tuple[str, str, str, list[str]]]) -> str:
    rows = "".join(
        f"<tr><td>{date}</td><td><code>{escape(commit)}</code></td><td>{scale}</td>"
        f"<td>{', '.join(experiments)}</td></tr>"
        for date, commit, scale, experiments in sets
    )
    head = "<th>date</th><th>commit</th><th>scale</th><th>experiments</th>"
    return f'<div class="scroll"><table class="sets"><tr>{head}</tr>{rows}</table></div>'


# ------------------------------------------------------------------------------------------------ an experiment


def _section(s: Section, figure: str | None, inlined: "Figures") -> str:
    text = [f'<p class="warning">{escape(s.caution)}</p>' if s.caution else ""]
    text += [f"<p><b>{label}.</b> {escape(line)}</p>" for label, line in paragraphs(s)]
    lines = [
        f'<section id="{s.name}">\n<h3>{escape(s.spec.title)}</h3>',
        f'<p class="soft">{escape(s.spec.of)} · {_badge(s)} · {escape(s.n)} · <a href="#results">results</a></p>',
        *text,
    ]
    if figure:
        caption = f"<figcaption>{escape(drawer(s.name).CAPTION)}</figcaption>"
        box = f'<div class="scroll" tabindex="0" role="region" aria-label="Figure: {escape(s.spec.title)}">'
        lines.append(f"<figure>{box}{inlined.inline(figure)}</div>{caption}</figure>")
        lines.append(_checked([f for f in s.findings if f.claim.check], s.spec))
        if more := [f for f in s.findings if not f.claim.check]:
            summary = f"<summary>{len(more)} more numbers, without a check</summary>"
            lines.append(f"<details>{summary}{_findings(more, s.spec)}</details>")
        links = [f'<a href="data/{name}.csv">{name}.csv</a> ({len(rows)} rows)' for name, rows in s.tables.items()]
        lines.append(f"<p>Data: {', '.join(links)}</p>")
    facts = "".join(
        f"<dt>{label}</dt><dd>{f'<code>{escape(fact)}</code>' if label in COMMANDS else escape(fact)}</dd>"
        for label, fact in s.facts.items()
    )
    lines.append(f"<dl>{facts}</dl>\n</section>\n")
    return "\n".join(line for line in lines if line)


def _checked(findings: list[Finding], spec: Spec) -> str:
    """The checked claims. If there are many, groups of similar claims are folded, except those with a failed claim."""
    groups = words.grouped(findings) if len(findings) > FOLDED else [findings]
    lines: list[str] = []
    plain: list[Finding] = []
    for group in groups:
        if len(groups) == 1 or len(group) < 3:
            plain += group
            continue
        if plain:
            lines.append(_findings(plain, spec))
            plain = []
        held = sum(f.held is True for f in group)
        failed = any(f.held is False for f in group)
        means = [f.mean for f in group]
        title = words.group_title([f.claim.text for f in group])
        count = f"{held} of {len(group)} held" if any(f.held is not None for f in group) else f"{len(group)} shown"
        interval = f"{words.number(min(means))} to {words.number(max(means))}"
        style = "not" if failed else "held" if held else "soft"
        lines.append(
            f'<details class="group"{" open" * failed}><summary>{escape(title)}: ours {interval}, '
            f'<span class="{style}">{count}</span></summary>{_findings(group, spec)}</details>'
        )
    return "\n".join([*lines, _findings(plain, spec)] if plain else lines)


def _findings(findings: list[Finding], spec: Spec) -> str:
    rows = []
    for f in findings:
        ours, spread = words.ours(f)
        check = f"<small>must be {escape(words.check(f))}</small>" if f.claim.check else ""
        mark = {True: "held", False: "not", None: "soft"}[f.held]
        seeds = f"<small>{words.seeds(f)} seeds pass</small>" if words.seeds(f) else ""
        rows.append(
            f"<tr><td>{escape(f.claim.text)}{check}</td><td>{words.paper(f, spec)}</td>"
            f"<td>{ours}<small>{escape(spread)}</small></td>"
            f'<td class="{mark}">{words.sign(f)}{seeds}</td></tr>'
        )
    head = "<th>claim</th><th>paper</th><th>ours</th><th></th>"
    return f'<div class="scroll"><table class="claims"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _badge(section: Section) -> str:
    return f'<span class="verdict {CLASSES.get(section.verdict, "soft")}">{section.outcome}</span>'


def _shared(markers: re.Match) -> str:
    """Markers that share one class, inside a group that has the class. Other markers are unchanged."""
    classes = set(re.findall(r'class="(\w+)"', markers[1]))
    if len(classes) != 1 or markers[1].count("<use") == 1:
        return markers[1]
    [name] = classes
    return f'<g class="{name}">' + markers[1].replace(f' class="{name}"', "") + "</g>"


def _shorter(path: str) -> str:
    """The data of an SVG path, rounded to 0.1, without spaces at commands. Lines are relative, so numbers are short."""
    path = re.sub(r"\s*([MLCQz])\s*", r"\1", path.strip())
    if re.search("[^MLz0-9. -]", path):
        return path
    result, last, here, start = "", "", (0, 0), (0, 0)
    for command, arguments in re.findall(r"([MLz])([^MLz]*)", path):
        if command == "z":
            result, last, here = result + "z", "z", start
            continue
        x, y = (round(10 * float(number)) for number in arguments.split())  # tenths, so that no rounding adds up
        dx, dy = x - here[0], y - here[1]
        if command == "M":
            start, numbers = (x, y), [x, y]
        else:
            command, numbers = ("h", [dx]) if dy == 0 else ("v", [dy]) if dx == 0 else ("l", [dx, dy])
        text = " ".join(re.sub(r"^(-?)0\.", r"\1.", f"{tenths / 10:g}") for tenths in numbers)
        result += f" {text}" if command == last != "M" else command + text  # numbers after M would be lines
        last, here = command, (x, y)
    return result.replace(" -", "-")


class Figures:
    """SVG files for the page. Equal styles of all figures become one class. This and rounding halve the page."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}
        self._count = 0

    def inline(self, svg: str) -> str:
        """A figure without its prologue and its white background, with classes for its styles and with unique ids."""
        self._count += 1
        prefix = f"i{self._count}_"
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.S)
        svg = re.sub(r"<(metadata|defs>\s*<style).*?</(metadata|style>\s*</defs)>", "", svg, flags=re.S)
        svg = re.sub(r">\s+<", "><", svg)
        svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
        svg = draw.rounded(svg, 1)
        svg = re.sub(r' d="([^"]*)"', lambda path: f' d="{_shorter(path[1])}"', svg)
        svg = re.sub(rf' clip-path="[^"]*"(?= style="[^"]*{draw.GRID})', "", svg)  # the grid ends at the axes
        svg = re.sub(r'style="([^"]*)"', lambda match: f'class="{self._class(match[1])}"', svg)
        svg = re.sub(r"((?:<use [^>]*/>)+)(?=</g>)", _shared, svg.replace("xlink:href", "href"))
        svg = svg.replace('"title description"', f'"{prefix}title {prefix}description"')
        ids = {name: f"{prefix}{k}" for k, name in enumerate(dict.fromkeys(re.findall(r'\bid="(\w+)"', svg)))}
        ids |= {name: prefix + name for name in ("title", "description")}
        return re.sub(r'(\bid="|url\(#|href="#)(\w+)', lambda match: match[1] + ids[match[2]], svg)

    def _class(self, style: str) -> str:
        return self._classes.setdefault(style, f"f{len(self._classes)}")

    def css(self) -> str:
        """The CSS rules of the classes."""
        colours = {draw.INK: "currentColor", draw.GRID: "var(--grid)"}
        colours |= {colour: f"var(--{name})" for name, colour in draw.COLOURS.items()}
        lines = "".join(f".{name}{{{style}}}\n" for style, name in self._classes.items())
        for colour, replacement in colours.items():
            lines = lines.replace(colour, replacement)
        return lines
