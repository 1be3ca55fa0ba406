"""The report and its files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bnkern.train import cifar10
from experiments import names, page, spec, words
from experiments import report as reporting
from experiments import results as result_files
from experiments import run as runner
from experiments import sections as report_sections
from experiments.__main__ import main
from experiments.results import Results, find
from experiments.specs import Claim
from tests import ROOT
from tests.experiments.support import Procedure, enough_seeds, results_of


@pytest.fixture(scope="module")
def papers_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on result files at scale full that hold the paper's own numbers."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BNKERN_DATA", raising=False)
        patch.setattr(cifar10, "load", lambda data: None)
        for name in runner.PROCEDURES:
            patch.setitem(runner.PROCEDURES, name, Procedure())
        for name in names():
            assert runner.run([name], "full", "some folder", "cpu", enough_seeds(name), out) == 0
    reporting.report(reporting.gather(out), out)
    return out


def test_every_section_is_under_its_heading(papers_results: Path) -> None:
    page = (papers_results / "report.html").read_text()
    positions = [page.index(f'<section id="{name}">') for name in names()]
    assert positions == sorted(positions)
    for heading in reporting.PARTS.values():
        assert page.count(heading) in (0, 3)  # in the navigation, in the first table, and above its sections
    beyond = sum(spec(name).beyond for name in names())
    assert f"Measured as in the paper: {len(names()) - beyond} held." in page
    assert f"Beyond the paper: {beyond} held." in page


def test_report(papers_results: Path, tmp_path: Path) -> None:
    page = (papers_results / "report.html").read_text()
    assert page.count("<svg") == len(names()) and page.count(">held (") == 2 * len(names())
    links = set(re.findall(r'(?:src|href)="(?!#|data:image)([^"]*)', page))
    assert {link for link in links if link.startswith("http")} == {reporting.PAPER}
    assert all((papers_results / link).exists() for link in links - {reporting.PAPER})
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        title, description = re.search(r'role="img" aria-labelledby="(\w+) (\w+)"', figure).groups()
        assert f'<title id="{title}">' in figure and f'<desc id="{description}">' in figure
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {ref for ref in re.findall(r'(?:href="|url\()#([^")]+)', page)} <= set(ids)
    entries = json.loads((papers_results / "report.json").read_text())["experiments"]
    for experiment in entries:
        assert experiment["verdict"] == "held"
        for claim in experiment["claims"] if experiment["name"] in ("gradient_signs", "moments_by_depth") else ():
            assert claim["paper"] is None or claim["ours"] == pytest.approx(claim["paper"], rel=0.01)
    row = (
        "| a/b, layer 18, with batch norm | 251.8 | 252 | ×/÷ 1.00, n\u00a0=\u00a02 "
        "| within a factor of 1.6 of the paper's | 2 of 2 | ✓"
    )
    assert row in (papers_results / "report.md").read_text()
    assert reporting.publish(reporting.gather(papers_results), papers_results, tmp_path / "published") == 0
    assert (tmp_path / "published/figures/gradient_signs.svg").exists()
    assert (tmp_path / "published/data/moments_by_depth.csv").read_text().startswith("norm,layer,seeds,ln_std,")


def test_the_same_results_give_the_same_bytes(
    papers_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected = ["diverging_update", "channel_gradients", "gradient_signs"]  # bands, pictures, bars
    for name in selected:
        shutil.copytree(papers_results / name, tmp_path / name)
    monkeypatch.setattr(reporting, "names", lambda: selected)
    reporting.report(reporting.gather(tmp_path), tmp_path)

    def files() -> dict[str, bytes]:
        found = [tmp_path / f"report.{kind}" for kind in ("html", "md", "json")]
        found += [*(tmp_path / "figures").iterdir(), *(tmp_path / "data").iterdir()]
        return {file.name: file.read_bytes() for file in found}

    before = files()
    reporting.report(reporting.gather(tmp_path), tmp_path)
    assert files() == before
    reporting.report(reporting.gather(tmp_path), tmp_path, keep=True)
    assert files() == before


def test_a_growing_report_has_the_finished_experiments(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """After each experiment the page has its section; figures are drawn once."""
    drawn: list[str] = []
    save = reporting.draw.save
    monkeypatch.setattr(reporting.draw, "save", lambda *a: (drawn.append(a[2].name), save(*a)))
    pages: list[int] = []

    def count_figures(name: str) -> None:
        page = reporting.report(reporting.gather(tmp_path), tmp_path, keep=True)
        pages.append(page.read_text().count("<svg"))

    two = ["moments_by_depth", "padded_shortcuts"]
    assert runner.run(two, "smoke", out=tmp_path, finished=count_figures) == 0
    assert pages == [1, 2] and drawn == two


def test_experiments_without_results_are_taken_from_the_published_report(papers_results: Path, tmp_path: Path) -> None:
    """Its tables, figures, numbers and verdicts, without the results of its runs."""
    published, out = tmp_path / "published", tmp_path / "out"
    assert reporting.publish(reporting.gather(papers_results), papers_results, published) == 0
    sections = reporting.gather(out, published=published)
    out.mkdir()
    reporting.report(sections, out)
    for kind in ("json", "md"):
        published_text, new_text = ((folder / f"report.{kind}").read_text() for folder in (published, out))
        assert published_text.replace(reporting.repository(published), "") == new_text.replace(
            reporting.repository(out), ""
        )
    for folder in ("data", "figures"):
        for file in (published / folder).glob("*.[cs]*"):
            assert file.read_bytes() == (out / folder / file.name).read_bytes()
    assert not reporting.gather(out)[0].runs, "only where it is asked for"


def test_larger_results_and_a_changed_spec_replace_a_published_experiment(papers_results, tmp_path) -> None:
    entries = {
        entry["name"]: entry for entry in json.loads((papers_results / "report.json").read_text())["experiments"]
    }
    entry = entries["moments_by_depth"]
    section = report_sections.of_record(entry, papers_results)
    assert section and section.verdict == "held" and len(section.runs) == 2 * result_files.FOR_PERCENTILES
    assert report_sections.of_record(entry | {"configuration": "of another spec"}, papers_results) is None
    assert report_sections.of_record(entry | {"claims": entry["claims"][1:]}, papers_results) is None
    small = report_sections.of_results(
        "moments_by_depth", Results("quick", "cifar10", results_of("moments_by_depth").runs[:0]), tmp_path
    )
    assert section.rank > small.rank
    synthetic = report_sections.Section("", section.spec, "full", "synthetic", "shown", [], {}, {}, section.runs)
    quick = report_sections.Section("", section.spec, "quick", "cifar10", "shown", [], {}, {}, section.runs)
    assert section.rank > quick.rank > synthetic.rank


def test_tables_read_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": 0.25, "c": "x", "d": None}, {"a": -3, "b": float("inf"), "c": "1 2", "d": 7}]
    report_sections.write_csv(tmp_path / "t.csv", rows)
    assert report_sections.read_csv(tmp_path / "t.csv") == rows


def test_similar_claims_are_grouped() -> None:
    texts = ["a/b, layer 18, mean", "a/b, layer 54, mean", "a/b, layer 90, mean", "a, layer 18, mean", "other"]
    findings = [find(Claim(text, list), [1.0], True) for text in texts]
    groups = words.grouped(findings)
    assert [len(group) for group in groups] == [3, 1, 1]
    assert words.group_title(texts[:3]) == "a/b, layer 18 to layer 90, mean"


def test_figures_keep_their_text_and_lose_decimals() -> None:
    svg = '<svg><path d="M 1.23456 7"/><text x="0.66666">0.0001</text></svg>'
    assert reporting.draw.rounded(svg, 1) == '<svg><path d="M 1.2 7"/><text x="0.7">0.0001</text></svg>'


def test_published_files_are_small() -> None:
    for file in (ROOT / "experiments/published").rglob("*"):
        assert not file.is_file() or file.stat().st_size < 500_000, file


def test_shorter_paths_have_the_same_points() -> None:
    random = np.random.default_rng(0)
    points = random.choice([0.0, 0.04, 1.25, -3.5, 120.0, 41.6], (200, 2)) + random.choice([0, 0, 0.3], (200, 2))
    commands = ["M", *random.choice(["L", "L", "L", "M"], 199)]
    text = " \n".join(f"{command} {x} {y}" for command, (x, y) in zip(commands, points, strict=True)) + " \nz\n"
    found, here, kind = [], [0.0, 0.0], ""
    tokens = iter(re.findall(r"[Mhvlz]|-?(?:\d+\.?\d*|\.\d+)", page._shorter(text)))
    for token in tokens:
        if token in "Mhvlz":
            kind, token = token, "" if token == "z" else next(tokens)
        if token:
            numbers = [float(token)] if kind in "hv" else [float(token), float(next(tokens))]
            step = {"h": [*numbers, 0.0], "v": [0.0, *numbers]}.get(kind, numbers)
            here = step if kind == "M" else [here[0] + step[0], here[1] + step[1]]
            found.append((kind == "M", *here))
    expected = [(command == "M", *point) for command, point in zip(commands, points, strict=True)]
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=0.0501)
    assert page._shorter("M 1 2 \nC 1 2 3 4 5 6 \n") == "M1 2C1 2 3 4 5 6"


def test_a_report_without_results_has_the_commands(tmp_path: Path) -> None:
    page = reporting.report(reporting.gather(tmp_path), tmp_path).read_text()
    assert page.count(">not run<") == 2 * len(names()) and "<svg" not in page
    assert "python -m experiments run gradient_signs --scale full" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.5e-5, "7.5e-5"),
        (2.2e-4, "2.2e-4"),
        (3.0e-10, "3e-10"),
        (2e6, "2e6"),
        (251.8, "252"),
        (0.0, "0"),
        (-0.85, "-0.85"),
        (131072, "131072"),
        (12345.6, "12346"),
        (None, "-"),
    ],
)
def test_numbers_for_readers(value: object, text: str) -> None:
    assert words.number(value) == text


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"The report cannot be written: Not a directory \(.*file\)\n", capsys.readouterr().err)
