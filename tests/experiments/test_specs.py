"""The specs and drawers of the experiments, in order, and what they import."""

import ast
import subprocess
import sys

import pytest

from experiments import drawer, names, spec
from experiments import run as runner
from tests import ROOT


@pytest.mark.parametrize("name", names())
def test_every_spec_is_complete_and_has_a_drawer(name: str) -> None:
    experiment, drawing = spec(name), drawer(name)
    assert (
        experiment.title
        and experiment.of
        and experiment.shows
        and experiment.method
        and experiment.claims
        and experiment.runs
    )
    assert any(claim.check for claim in experiment.claims)
    assert [claim.text for claim in experiment.claims].count(experiment.headline) == 1
    assert set(experiment.reduction) == set(experiment.smaller) - {"smoke"}, (
        "every scale that is published states its changes"
    )
    assert drawing.tables and drawing.draw and drawing.CAPTION
    assert all(run.procedure in runner.PROCEDURES for run in experiment.runs)
    assert sum(run.seeds for run in experiment.at("smoke")) <= 12
    lines = (ROOT / f"experiments/specs/{name}.py").read_text().splitlines()
    assert len(lines) < 80, "a spec is data, and computations belong elsewhere"


def test_specs_import_only_each_other_and_the_standard_library() -> None:
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
    experiment = spec("channel_gradients")
    assert experiment.scale("reduced") == "full" and experiment.scale("smoke") == "smoke"
    experiment = spec("gradient_signs")
    assert experiment.scale("quick") == "reduced" and experiment.scale("full") == "full"
    assert (
        experiment.at("full") == experiment.runs and experiment.runs[0].batch == 128 and experiment.runs[0].seeds >= 5
    )
    assert {run.batch for run in experiment.at("smoke")} == {2}
