"""The documents at the top of the repository and in docs/: links lead somewhere, and what they repeat agrees."""

import os
import re
from pathlib import Path

import pytest

import bnkern

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def anchors(document: Path) -> set[str]:
    """The names under which headings can be linked, as GitHub forms them, and those that are set by hand."""
    text = document.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    formed = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return formed | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(document.parent / path)) if path else document
        assert target.exists(), f"{document.name} links {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{document.name} links {link}"


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
