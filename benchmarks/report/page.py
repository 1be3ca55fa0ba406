"""The report on a results file: ``report.md`` with a folder of figures, and ``report.html``, a self-contained page.

The page is generated from the Markdown, so the two have the same content. The same results give the same bytes.
"""

import re
import shutil
from html import escape
from itertools import groupby
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report import compare, figures, tables
from experiments.draw import GRID, INK

TITLE = "Benchmarks of bnkern"
LEAD = (
    "Times are medians of interleaved rounds. All providers take turns, so that noise affects all of them alike. "
    "docs/measuring.md describes how each number is measured, and its limits."
)
# The figures of each section, by its title.
SECTION_FIGURES = {
    "Against other results": ("changes",),
    "Whole batch norms": ("speedups",),
    "Phases": ("roof",),
    "Growth": ("growth-N", "growth-C", "growth-S", "growth-depth"),
    "Memory of networks": ("memory",),
}
STYLES = ROOT / "experiments" / "report.css"
OWN_STYLE = """
body { max-width: 60rem; } td:not(:first-child), th:not(:first-child) { text-align: right; }
td { font-size: .85rem; white-space: nowrap; } td:first-child { min-width: 9rem; white-space: normal; }
p { overflow-wrap: anywhere; }
:root { --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #e69f00; --s5: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --s0: #56b4e9; --s1: #ee8144; --s2: #4cc9a0; --s3: #e0a0c6; --s4: #f0c05a; --s5: #9ad4f5; }
}
"""


def report(results: dict, out: Path, old: dict | None = None) -> Path:
    """Writes the report, with a comparison if other results are given. Returns the path of the page."""
    drawn = figures.draw_all(results, old)
    text = "\n".join(_markdown(results, drawn, old))
    shutil.rmtree(out / "figures", ignore_errors=True)
    (out / "figures").mkdir(parents=True)
    for name, (svg, _) in drawn.items():
        (out / "figures" / f"{name}.svg").write_text(svg)
    (out / "report.md").write_text(text)
    page = out / "report.html"
    page.write_text(_page(text, {name: svg for name, (svg, _) in drawn.items()}))
    return page


def _markdown(results: dict, drawn: dict[str, tuple[str, str]], old: dict | None) -> list[str]:
    lines = [f"# {TITLE}", "", LEAD, "", *tables.environment(results)]
    parts = list(tables.sections(results))
    parts.sort(key=lambda part: part[0] != "Targets")  # the targets come first
    if old is not None:
        parts.insert(0, ("Against other results", list(compare.markdown(old, results))))
    for title, table in parts:
        lines += [f"## {title}", ""]
        for name in SECTION_FIGURES.get(title, ()):
            if name in drawn:
                lines += [f"![{drawn[name][1]}](figures/{name}.svg)", ""]
        lines += [*table, ""]
    return lines


# -------------------------------------------------------------------------------------------------- Markdown to HTML


def _page(text: str, svgs: dict[str, str]) -> str:
    blocks = (list(lines) for blank, lines in groupby(text.splitlines(), key=lambda line: not line) if not blank)
    body = "\n".join(_block(lines, svgs) for lines in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>\n{STYLES.read_text()}{OWN_STYLE}</style>\n{body}\n"
    )


def _block(lines: list[str], svgs: dict[str, str]) -> str:
    """A heading, a figure, a table or a paragraph. The Markdown of the report has no other blocks."""
    first = lines[0]
    if heading := re.match(r"(#+) (.*)", first):
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if figure := re.match(r"!\[(.*)\]\(figures/(.*)\.svg\)", first):
        return f"<figure>{_svg(svgs[figure[2]], figure[2])}<figcaption>{_inline(figure[1])}</figcaption></figure>"
    if first.startswith("|"):
        return _table([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    return f"<p>{_inline(' '.join(lines))}</p>"


def _table(rows: list[list[str]]) -> str:
    head, _, *body = rows
    lines = [f"<tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in body]
    table = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    if len(body) > 24:
        return f"<details><summary>{len(body)} rows</summary>{table}</details>"
    return table


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False))
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    for word, mark in (("missed", "not"), ("slower", "not"), ("holds", "held"), ("faster", "held")):
        if text == word:
            return f'<span class="{mark}">{text}</span>'
    return text


def _svg(svg: str, name: str) -> str:
    """A figure for the page, without prologue and background, in the page's colours, with unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    colours = {INK: "currentColor", GRID: "var(--grid)"}
    colours |= {colour: f"var(--s{k})" for k, (colour, _) in enumerate(figures.SERIES)}
    for colour, replacement in colours.items():
        svg = svg.replace(colour, replacement)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
