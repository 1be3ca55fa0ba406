"""The documents at the top of the repository and in docs/: their links have targets, and repeated facts agree."""

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import bnkern
from tests import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES])


def formed_anchors(document: Path) -> list[str]:
    """The anchors that GitHub and the site form from the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def anchors(document: Path) -> set[str]:
    """The names under which places of a document can be linked: formed from headings, and set by hand."""
    return {*formed_anchors(document), *re.findall(r'<a id="([^"]+)"', document.read_text())}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_have_targets(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(document.parent / path)) if path else document
        assert target.exists(), f"{document.name} links {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{document.name} links {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_headings_differ_within_a_page(page: Path) -> None:
    """Equal headings get numbered anchors, and GitHub and the site number them differently."""
    duplicates = [anchor for anchor, count in Counter(formed_anchors(page)).items() if count > 1]
    assert not duplicates


def test_navigation_has_every_page() -> None:
    navigation = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) == len(set(navigation))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} <= set(navigation)


def test_log_has_a_conclusion_for_every_entry() -> None:
    index = (ROOT / "docs/log/index.md").read_text()
    months = [page for page in PAGES if re.fullmatch(r"\d{4}-\d{2}\.md", page.name)]
    assert months
    for month in months:
        entries = [anchor for anchor in formed_anchors(month) if anchor.startswith(month.stem)]
        assert entries and f"]({month.name}) | {len(entries)} |" in index
        missing = [entry for entry in entries if f"({month.name}#{entry})" not in index]
        assert not missing


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = "".join((tmp_path / f"api/{page}/index.html").read_text() for page in ("bnkern", "probes"))
    modules = {"nn", "probes", "convert", "revert"}  # have pages of their own; the last two are bnkern.convert's
    public = [f"bnkern.{word}" for word in bnkern.__all__ if word not in modules]
    public += [f"bnkern.probes.{word}" for word in bnkern.probes.__all__ if word != "QUANTITIES"]
    missing = [word for word in public if f'id="{word}"' not in reference]
    assert not missing
    assert 'href="../benchmarks/results/' in (tmp_path / "performance/index.html").read_text()


def test_docs_workflow_installs_the_pinned_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    names = [requirement.partition(">=")[0] for requirement in extra]
    workflow = (ROOT / ".github/workflows/docs.yml").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    assert all(word in workflow and f"\n{word.partition('[')[0]}==" in pins for word in names)


def test_readme_is_short_and_names_the_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"make {target} " in text for target in ("demo", "reproduce", "test"))
    assert "pip install -e ." in text and "docs/known_issues.md" in text
    assert text.count("![") == 1 and "![" in text
    prose = re.sub(r"```.*?```|^\|.*?$|\]\([^)]*\)", " ", text, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) < 600


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    pins = set(re.findall(r"^[\w-]+==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    installed = re.findall(r"^ +additional_dependencies: \[(.*)\]$", text, re.MULTILINE)  # one list for each hook
    assert len(installed) == text.count("- id: ") == 3
    assert {requirement.partition("==")[0] for requirement in installed} == {"ruff", "clang-format"}
    assert set(installed) <= pins


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {bnkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == bnkern.__version__


def test_the_workflow_runs_the_script() -> None:
    assert "run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
