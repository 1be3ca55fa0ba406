"""The specs and drawers of the experiments, in order, and what they import."""

import ast
import subprocess
import sys

import pytest

from experiments import drawer, names, spec
from experiments import run as running
from tests import ROOT


@pytest.mark.parametrize("name", names())
def test_every_spec_is_whole_and_has_its_drawer(name: str) -> None:
    about, draws = spec(name), drawer(name)
    assert about.title and about.of and about.shows and about.method and about.claims and about.runs
    assert any(claim.check for claim in about.claims)
    assert [claim.text for claim in about.claims].count(about.headline) == 1
    assert set(about.reduction) == set(about.smaller) - {"smoke"}, "every scale that is published states its changes"
    assert draws.tables and draws.draw and draws.CAPTION
    assert all(run.procedure in running.PROCEDURES for run in about.runs)
    assert sum(run.seeds for run in about.at("smoke")) <= 12
    lines = (ROOT / f"experiments/specs/{name}.py").read_text().splitlines()
    assert len(lines) < 80, "a spec is data: what computes belongs elsewhere"


def test_specs_import_nothing_but_their_own_words() -> None:
    for file in (ROOT / "experiments/specs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert set(modules) <= {"dataclasses", "collections.abc", "typing"}, f"{file.name} imports {modules}"


def test_drawing_and_reporting_need_neither_torch_nor_bnkern() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['bnkern'] = None\n"
        "import experiments, experiments.report, experiments.__main__\n"
        "[experiments.drawer(name) for name in experiments.names()]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_scales() -> None:
    about = spec("channel_gradients")
    assert about.scale("reduced") == "full" and about.scale("smoke") == "smoke"
    about = spec("gradient_signs")
    assert about.scale("quick") == "reduced" and about.scale("full") == "full"
    assert about.at("full") == about.runs and about.runs[0].batch == 128 and about.runs[0].seeds >= 5
    assert {run.batch for run in about.at("smoke")} == {2}
