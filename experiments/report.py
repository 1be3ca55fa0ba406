"""The report: for every experiment the claims, the paper's numbers and ours, the verdict, the figure, and the command.

Three files have the same content: ``report.html``, one page with its figures; ``report.md``; and ``report.json`` for
programs. ``figures/`` and ``data/`` are in the same folder. The same results give the same bytes.
"""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from . import draw, drawer, names, page, spec, words
from .results import PUBLISHED, RUNS, finished, read
from .sections import COMMANDS, Section, of_record, of_results, read_csv, record, write_csv
from .specs import JUDGED

ROOT = Path(__file__).parent.parent
PAPER = "https://arxiv.org/abs/1806.02375"
PUBLISHED_PROCEDURES = (
    "training",
    "rates",
)  # the procedures whose runs are published: they take hours, and their files are small
TITLE = "Understanding Batch Normalization, reproduced"
LEAD = (
    "Bjorck, Gomes, Selman and Weinberger (2018) explain by a set of experiments why batch norm works. This report "
    "repeats the experiments with the kernels of bnkern and compares the results with the paper's claims."
)
READING = (
    "A claim holds if our mean over seeds meets the condition stated under it. The number of seeds that meet the "
    "condition by themselves is stated too. An experiment holds if all its claims hold.",
    "A number that is not finite never holds. If a search ends at the edge of its range, its result is only a bound, "
    "and the claim is undecided.",
    "Numbers of the paper are those that it prints. ≈ marks a number that was read off a figure. Brackets mark one "
    'that was derived from printed numbers. "Not available" means that the paper gives no number in its main text.',
    "The thresholds of the claims were set on 2026-11-22, in the commit that added the experiment, from the paper's "
    "numbers and from trials on one to eight networks. They are unchanged since, unless a section states otherwise.",
    "± is the standard deviation over n seeds. ×/÷ is the same for the logarithm, as a factor around a geometric mean.",
    '"paper at 4 %" states that 4 % of our numbers are below the paper\'s. It is stated for 40 seeds and more. It '
    "compares a number of the paper that may belong to one network with the spread of networks.",
)
SCALES = (
    "What needs no training is measured at the paper's own scale. Training runs at the paper's scale take weeks on a "
    "CPU, and are replaced by smaller ones. At scale quick they are a demonstration of minutes, and no claim is judged "
    "by them. At scale reduced the learning rates are the paper's and the training images are few, so that every "
    "network can fit them. Claims are judged there.",
)
DEVIATIONS = (
    "Learning rate schedule: the rate drops tenfold at 50 % and at 75 % of training. The paper drops it when learning "
    "plateaus. The curves of its Figure 1 have their drops near these two points.",
    "Learning rate grid: the paper tries 0.1, 0.003, 0.001, 0.0003, 0.0001 and 0.00003 and reports the best. Here only "
    "the rates of its Figure 1 are trained to the end. For the network without batch norm the grid is tried in short "
    "runs (rate_grid).",
    "Appendices: their text is not available to us. Nothing is reproduced of Appendices C, F and I. What the main text "
    "says about Appendices D, E, G, H, J and K is reproduced with choices of our own, for example the depths and rates "
    "of Appendix H and the norms of Appendix K. The training recipe of Appendix B is taken from the main text and from "
    "the papers that it cites.",
    "Details that the main text leaves open: projection shortcuts (padding shortcuts do not fit Figure 5), normal "
    "weights (Xavier), torch's own initialisation of the classifier, images standardised by channel, batches of 128, "
    "no warm-up of the learning rate.",
    "Numbers that the paper only draws are read off its figures. Their reading error is about 0.15 points in Figure 1 "
    "and 0.08 in Figure 5.",
    "Random seeds, and so networks and batches, are ours. Figures of the paper that may show a single network are "
    "compared with means over several.",
)
PARTS = {  # of the paper, by the lowest Spec.order that belongs to each
    0: "Larger learning rates and their effect",
    3: "Why networks without batch norm diverge",
    5: "The conditioning of a network at initialisation",
    5.5: "Random matrices, and other normalisations",
}


def gather(out: Path, scale: str | None = None, published: Path | None = None) -> list[Section]:
    """A section for each experiment, on its results in ``out`` of the given scale, or else of its largest scale.

    ``published`` is a folder that :func:`publish` has filled. Its training runs are added to the results. An
    experiment is taken from its report if the results there have a higher rank than those in ``out``.
    """
    sections = []
    records = _records(published) if published else {}
    for name in names():
        published_runs = published / RUNS / name if published else None
        section = of_results(name, read(out / name, spec(name), scale, published_runs), out)
        if published and name in records and scale in (None, records[name]["scale"]):
            published_section = of_record(records[name], published)
            section = published_section if published_section and published_section.rank > section.rank else section
        sections.append(section)
    return sections


def _records(folder: Path) -> dict[str, dict]:
    """The records of a report by the experiment's name. It is empty if there is no report."""
    file = folder / "report.json"
    return {entry["name"]: entry for entry in json.loads(file.read_text())["experiments"]} if file.exists() else {}


def report(sections: list[Section], out: Path, keep: bool = False) -> Path:
    """Writes the report, its figures and its CSV files to ``out``. Returns the path of the page.

    With ``keep``, a figure is drawn only if its data have changed. This is for a report that is written after every
    experiment, because drawing all figures takes longer than some experiments.
    """
    before = {file.name: file.read_bytes() for file in (out / "data").glob("*.csv")} if keep else {}
    for folder in ("figures", "data"):
        if not keep:
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True, exist_ok=True)
    for section in sections:
        for name, rows in section.tables.items():
            write_csv(out / "data" / f"{name}.csv", rows)
        if section.tables:
            data, stem = out / "data" / f"{next(iter(section.tables))}.csv", out / "figures" / section.name
            if before.get(data.name) != data.read_bytes() or not stem.with_suffix(".svg").exists():
                drawing = drawer(section.name)
                draw.save(drawing.draw, read_csv(data), stem, section.spec.title, drawing.CAPTION)
    return _write(sections, out, out / "figures")


def _write(sections: list[Section], out: Path, figures: Path) -> Path:
    content = {"title": TITLE, "paper": PAPER, "tally": tally(sections), "experiments": [*map(record, sections)]}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list on one line
    (out / "report.json").write_text(text + "\n")
    (out / "report.md").write_text(_markdown(sections, out))
    drawn = {s.name: (figures / f"{s.name}.svg").read_text() for s in sections if s.tables}
    front = page.Front(
        title=TITLE,
        lead=LEAD,
        links={"the paper (arXiv 1806.02375)": PAPER, "the repository": repository(out)},
        tally=tally(sections),
        lists={
            "What is reduced": [*SCALES, *_reductions(sections)],
            "Deviations from the paper": DEVIATIONS,
            "How to read the tables": READING,
        },
        sets=run_sets(sections),
    )
    file = out / "report.html"
    file.write_text(page.html(front, parts(sections), drawn))
    return file


def publish(sections: list[Section], out: Path, target: Path = PUBLISHED) -> int:
    """Copies the report in ``out`` on these sections to the folder that is committed. Returns the exit status.

    The finished training runs of scales that are judged are copied too: they take hours, and a report on another
    machine can add them. Results on synthetic images or at scale smoke are refused.
    """
    unfit = [section.name for section in sections if section.scale == "smoke" or section.data == "synthetic"]
    if unfit:
        print(f"Not published: {', '.join(unfit)} ran on synthetic images or at scale smoke only.", file=sys.stderr)
        return 1
    for folder in ("figures", "data"):
        shutil.rmtree(target / folder, ignore_errors=True)
        shutil.copytree(out / folder, target / folder)
    _write(sections, target, target / "figures")
    for name in names():
        for run in finished(out / name):
            if run.config["procedure"] in PUBLISHED_PROCEDURES and run.config["scale"] in JUDGED:
                _publish_run(run.folder, target / RUNS / name / run.folder.name)
    print(f"published: {target}")
    return 0


def _publish_run(run: Path, target: Path) -> None:
    """Copies the files of a run that :func:`.results.finished` reads."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run / "probes", target / "probes")
    for name in ("config.json", "env.json", "DONE"):
        shutil.copy(run / name, target / name)


def repository(folder: Path) -> str:
    """The address of the repository, or the relative path of its README if the project states no address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository") or os.path.relpath(ROOT / "README.md", folder.resolve())


# ------------------------------------------------------------------------------------------------ the front matter


def parts(sections: list[Section]) -> dict[str, list[Section]]:
    """The sections under the headings of :data:`PARTS`."""
    groups: dict[str, list[Section]] = {}
    for section in sections:
        groups.setdefault(PARTS[max(order for order in PARTS if order <= section.spec.order)], []).append(section)
    return groups


HEADLINES = {  # by Section.kind
    "as in the paper": "Measured as in the paper",
    "reduced": "At reduced scale",
    "beyond the paper": "Beyond the paper",
    "not run": "Not run",
    "shown": "Only shown, because their scale or their data cannot decide",
}


def tally(sections: list[Section]) -> list[str]:
    """The number of experiments by verdict, in one sentence for each kind."""
    sentences = []
    for kind, headline in HEADLINES.items():
        verdicts = [section.verdict for section in sections if section.kind == kind]
        counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
        if kind in ("not run", "shown"):
            counts = [str(len(verdicts))]
        if verdicts:
            sentences.append(f"{headline}: {', '.join(counts)}.")
    return sentences


def run_sets(sections: list[Section]) -> list[tuple[str, str, str, list[str]]]:
    """Date, commit and scale of the results, and the experiments that share them."""
    sets: dict[tuple[str, str, str], list[str]] = {}
    for section in sections:
        if section.runs:
            key = (section.facts.get("date", "-"), section.facts.get("commit", "-"), section.scale)
            sets.setdefault(key, []).append(section.name)
    return [(*key, experiments) for key, experiments in sorted(sets.items())]


def _reductions(sections: list[Section]) -> list[str]:
    return [f"{s.spec.of} ({s.name}, {s.scale}): {s.reduction}" for s in sections if s.reduction]


# ------------------------------------------------------------------------------------------------ Markdown


def _markdown(sections: list[Section], out: Path) -> str:
    text = [f"# {TITLE}", "", LEAD, "", f"Links: [the paper]({PAPER}), [the repository]({repository(out)})", ""]
    text += [*(f"- {line}" for line in tally(sections)), "", "## Results", ""]
    rows = []
    for part, members in parts(sections).items():
        rows.append([f"**{part}**", *[""] * 5])
        for s in members:
            ours, spread = words.ours(s.headline)
            link = f"[{s.spec.title}](#{s.name}) ({s.spec.of})"
            paper = words.paper(s.headline, s.spec)
            rows.append([link, s.spec.headline, paper, f"{ours} {spread}".strip(), s.n, s.outcome])
    text += _table(["experiment", "number", "paper", "ours", "scale", "verdict"], rows)
    lists = {"What is reduced": [*SCALES, *_reductions(sections)], "Deviations from the paper": DEVIATIONS}
    for head, lines in (lists | {"How to read the tables": READING}).items():
        text += [f"## {head}", "", *(f"- {line}" for line in lines), ""]
    sets = [[date, commit, scale, ", ".join(experiments)] for date, commit, scale, experiments in run_sets(sections)]
    text += ["## Date and commit of the results", ""]
    text += _table(["date", "commit", "scale", "experiments"], sets)
    for s in sections:
        text += _markdown_section(s)
    return "\n".join(text)


def _markdown_section(s: Section) -> list[str]:
    text = [f'<a id="{s.name}"></a>', "", f"## {s.spec.title}", ""]
    text += [f"{s.spec.of} · `{s.name}` · **{s.outcome}**", ""]
    text += [f"> {s.caution}", ""] if s.caution else []
    text += [f"**{label}.** {line}\n" for label, line in page.paragraphs(s)]
    if s.tables:
        text += [f"![{s.spec.title}](figures/{s.name}.svg)", "", drawer(s.name).CAPTION, ""]
        text += _table(
            ["claim", "paper", "ours", "spread", "must be", "seeds that pass", ""],
            [
                [
                    f.claim.text, words.paper(f, s.spec), *words.ours(f), words.check(f) or "-", words.seeds(f),
                    words.sign(f),
                ]
                for f in s.findings
            ],
        )  # fmt: skip
        text += ["Data: " + ", ".join(f"[{name}.csv](data/{name}.csv)" for name in s.tables), ""]
    text += [f"- {label}: {f'`{fact}`' if label in COMMANDS else fact}" for label, fact in s.facts.items()]
    return [*text, ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]
