"""The allowed imports between modules. A module that is not in the table must be added to it."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bnkern import backends
from tests import ROOT


class Rule(NamedTuple):
    """The allowed imports of modules that match a pattern: own modules, and packages besides the standard library."""

    ours: tuple[str, ...]
    others: tuple[str, ...] = ("torch",)


# Modules that every backend may import: the arguments of a call, activations, memory layouts, and the dtype of sums.
LEAVES = (
    "bnkern.backends.activations",
    "bnkern.backends.calls",
    "bnkern.backends.layout",
    "bnkern.backends.records",
    "bnkern.backends.reference.accumulator",
)

# The first pattern that matches a module applies.
RULES = {
    "bnkern.backends.activations": Rule(()),
    "bnkern.backends.calls": Rule(()),
    "bnkern.backends.layout": Rule(()),
    "bnkern.backends.records": Rule(()),
    "bnkern.backends.protocol": Rule(("bnkern.backends.calls",)),
    "bnkern.backends.reference*": Rule(
        (
            "bnkern.backends.activations",
            "bnkern.backends.calls",
            "bnkern.backends.layout",
            "bnkern.backends.reference.*",
        )
    ),
    # The native module declines some operands. The reference serves empty batches.
    "bnkern.backends.native": Rule((*LEAVES, "bnkern._native", "bnkern.backends.reference")),
    "bnkern.backends.cpu.convolution": Rule((*LEAVES, "bnkern.backends.native", "bnkern.backends.protocol")),
    # Merging a few [C] vectors on the CPU needs no kernel.
    "bnkern.backends.cpu": Rule(
        ("bnkern.backends.native", "bnkern.backends.cpu.convolution", "bnkern.backends.reference.merge")
    ),
    "bnkern.backends.architectures": Rule((), ()),
    # Triton's kernels do what the C++/CUDA kernels do not, and are imported where they are needed.
    "bnkern.backends.cuda": Rule(
        (
            "bnkern.backends.calls",
            "bnkern.backends.native",
            "bnkern.backends.architectures",
            "bnkern.backends.triton",
            "bnkern.backends.triton.samples",
        )
    ),
    "bnkern.backends.cuda_conv": Rule(
        ("bnkern.backends.calls", "bnkern.backends.native", "bnkern.backends.cuda", "bnkern.backends.protocol")
    ),
    "bnkern.backends.triton*": Rule((*LEAVES, "bnkern.backends.triton*"), ("torch", "triton")),
    "bnkern.backends": Rule(("bnkern.backends.protocol",)),  # imports its backends by name, from the table
    # Batch norm, from the lowest to the highest layer.
    "bnkern.norm.context": Rule(()),
    "bnkern.norm.validation": Rule(("bnkern.backends", "bnkern.backends.activations", "bnkern.backends.calls")),
    "bnkern.norm.ranks": Rule((*LEAVES, "bnkern.backends.protocol", "bnkern.backends.reference.update_running")),
    # The decomposition into torch's operators packs the mask with the reference's function.
    "bnkern.norm.op": Rule(
        ("bnkern.norm.context", "bnkern.norm.ranks", "bnkern.backends", "bnkern.backends.reference.pack_mask", *LEAVES)
    ),
    # The second derivative uses the reference formula.
    "bnkern.norm.vmap": Rule(("bnkern.norm.context", "bnkern.norm.op", "bnkern.backends.reference", *LEAVES)),
    "bnkern.norm.autograd": Rule(
        ("bnkern.norm.context", "bnkern.backends", "bnkern.backends.protocol", "bnkern.backends.reference", *LEAVES)
    ),
    "bnkern.norm.sync": Rule(
        ("bnkern.norm.context", "bnkern.norm.op", "bnkern.norm.autograd", "bnkern.norm.validation", *LEAVES)
    ),
    "bnkern.norm.api": Rule(
        (
            *(f"bnkern.norm.{module}" for module in ("autograd", "context", "op", "vmap", "validation")),
            "bnkern.backends",
            "bnkern.backends.reference",
            *LEAVES,
        )
    ),
    "bnkern.norm": Rule(("bnkern.norm.*",)),
    "bnkern.conv.*": Rule(("bnkern.backends", "bnkern.backends.protocol", "bnkern.conv.*")),
    "bnkern.conv": Rule(("bnkern.conv.*",)),
    "bnkern.chain": Rule(
        (
            *("bnkern.backends", "bnkern.backends.calls", "bnkern.backends.protocol", "bnkern.backends.records"),
            "bnkern.norm.context",
        )
    ),
    "bnkern.guard": Rule(()),
    "bnkern.nn.leaf": Rule(()),
    "bnkern.nn.norms": Rule(
        ("bnkern.backends.activations", "bnkern.norm", "bnkern.norm.context", "bnkern.guard", "bnkern.nn.leaf")
    ),
    "bnkern.nn.convolution": Rule(("bnkern.conv", "bnkern.norm.context", "bnkern.nn.leaf")),
    "bnkern.nn.chain": Rule(
        (
            *("bnkern.backends.calls", "bnkern.backends.protocol", "bnkern.chain", "bnkern.norm.context"),
            *("bnkern.nn.convolution", "bnkern.nn.norms"),
        )
    ),
    "bnkern.nn.*": Rule(("bnkern.nn.norms",)),
    "bnkern.nn": Rule(("bnkern.nn.*",)),
    "bnkern.statistics": Rule(("bnkern.norm", "bnkern.norm.ranks", "bnkern.backends.reference")),
    "bnkern.convert*": Rule(("bnkern.nn", "bnkern.nn.*", "bnkern.convert*")),
    "bnkern.probes.flight_figure": Rule(("bnkern.probes.diagnosis",), ("numpy", "matplotlib")),
    "bnkern.probes*": Rule(
        (*LEAVES, "bnkern", "bnkern.nn", "bnkern.conv", "bnkern.norm", "bnkern.norm.context", "bnkern.probes*"),
        ("torch", "numpy"),
    ),
    "bnkern.train.sweep": Rule(("bnkern*",), ("torch", "ray")),
    "bnkern.train*": Rule(("bnkern*",), ("torch", "numpy", "tqdm", "PIL")),
    "bnkern.__main__": Rule(("bnkern*",)),
    "bnkern": Rule(("bnkern.*",)),
    "experiments.specs*": Rule(("experiments.specs*",), ()),
    "experiments.draw*": Rule(("experiments.draw*",), ("numpy", "matplotlib")),
    "experiments.report": Rule(("experiments*",), ("numpy",)),
    "experiments.results": Rule(("experiments*",), ("numpy",)),
    "experiments.sections": Rule(("experiments*",), ()),
    "experiments.page": Rule(("experiments*",), ()),
    "experiments.words": Rule(("experiments*",), ()),
    "experiments": Rule(("experiments.*",), ()),
    "experiments.__main__": Rule(("experiments*",), ()),
    "experiments.procedures*": Rule(("experiments.procedures*", "bnkern*"), ("torch", "numpy")),
    "experiments*": Rule(("experiments*", "bnkern*"), ("torch", "numpy", "tqdm")),
    "setup": Rule((), ("setuptools", "pybind11")),
}
OURS = ("bnkern", "experiments", "benchmarks", "tests")


def modules() -> dict[str, Path]:
    """The modules of the package by dotted name, without tests and benchmarks, which may import anything."""
    results = {"setup": ROOT / "setup.py"}
    for package in ("bnkern", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            results[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return results


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere: "package.module", or "package.module.attribute"."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def allowed(imported: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern allows a dotted name, or names a module that contains it."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(imported, pattern):
            return True
        inside = imported.rpartition(".")[0] == pattern
        if inside and (pattern in MODULES or pattern == "bnkern._native") and imported not in MODULES:
            return True
    return False


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    rule = next((RULES[pattern] for pattern in RULES if fnmatch.fnmatchcase(name, pattern)), None)
    assert rule is not None, f"{name} has no place in the table of this test"
    for imported in imports_of(name, MODULES[name]):
        top = imported.partition(".")[0]
        if top in OURS:
            assert allowed(imported, rule.ours), f"{name} must not import {imported}"
        else:
            assert top in rule.others or top in sys.stdlib_module_names, f"{name} must not import {imported}"


def test_forbidden_imports_are_detected(tmp_path: Path) -> None:
    """imports_of resolves every form of import, and the table refuses forbidden ones."""
    path = tmp_path / "m.py"
    forms = [
        "import a.b, c",
        "from . import x",
        "from .. import y",
        "from ..z.w import v",
        "def f():",
        " from q import r",
    ]
    path.write_text("\n".join(forms))
    assert sorted(imports_of("p.q.m", path)) == ["a.b", "c", "p.q.x", "p.y", "p.z.w.v", "q.r"]
    assert not allowed("bnkern.backends.reference.forward", RULES["bnkern.backends.cpu"].ours)
    assert not allowed("bnkern.backends.cpu", RULES["bnkern.backends.triton*"].ours)
    assert not allowed("bnkern.norm.api.batch_norm", RULES["bnkern.norm.op"].ours)
    assert not allowed("bnkern.backends.reference", RULES["bnkern.norm.op"].ours)
    assert allowed("bnkern.backends.reference.accumulator", RULES["bnkern.norm.op"].ours)
    assert not allowed("tests.support.cases", RULES["bnkern.train*"].ours)


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_test_modules_are_not_imported(folder: str) -> None:
    """Code that several test modules or benchmarks share is in a module that pytest does not collect."""
    checked = 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for imported in imports_of(name, path):
            if imported.partition(".")[0] in ("tests", "benchmarks"):
                parts = [part for part in imported.split(".") if part.startswith(("test_", "bench_"))]
                assert not parts, f"{name} must not import {imported}"
                checked += 1
    assert checked > 50


def test_the_table_of_backends_names_modules() -> None:
    """The backends are imported by name: each name that exists is a module of backends, and there are no others."""
    existing = {name.split(".")[2] for name in MODULES if name.startswith("bnkern.backends.")}
    existing -= {"activations", "calls", "layout", "records", "protocol", "native", "architectures", "cuda_conv"}
    assert existing <= set(backends.NAMES)
    assert {"cpu", "reference"} <= existing


def test_native_sources_include_neither_torch_nor_python() -> None:
    """csrc includes no header of torch.

    Only bind.cpp includes pybind11, and only csrc/call includes Python's header.
    """
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 5
    for path in sources:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
        foreign = [i for i in included if re.match(r"(torch|ATen|c10|caffe2|Python\.h|pybind11)", i)]
        if path.stem == "bind":
            foreign = [i for i in foreign if not i.startswith("pybind11")]
        if path.parent.name == "call":
            foreign = [i for i in foreign if i != "Python.h"]
        assert not foreign, f"{path.name} includes {foreign}"


# ------------------------------------------------------------------------------------------------ what gets loaded


def run(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "BNKERN_BACKEND"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_loads_no_kernels() -> None:
    """The compiled module and triton are not imported before the first call."""
    loaded = "[m for m in sys.modules if m == 'bnkern._native' or m.partition('.')[0] == 'triton']"
    assert run(f"import sys, bnkern; print({loaded})") == "[]"


def test_works_without_compiled_module_and_triton() -> None:
    """If neither can be imported, the package works, and the reference serves calls with one warning."""
    code = """
import sys, warnings
sys.modules["bnkern._native"] = sys.modules["triton"] = None
import torch, bnkern
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    bn = bnkern.nn.BatchNorm2d(3, act="relu")
    bn(torch.randn(2, 3, 4, 4)).sum().backward()
    bn(torch.randn(2, 3, 4, 4)).sum().backward()
print(len([w for w in caught if "slow reference" in str(w.message)]), bn.num_batches_tracked.item())
print(bnkern.explain(torch.ones(2, 3)))
"""
    first, *table = run(code).splitlines()
    assert first == "1 2"
    assert table[0].startswith("cpu        cannot: cannot be imported")
    assert table[1].startswith("reference  serves this call")


@pytest.mark.parametrize("package", ["experiments.specs", "experiments.draw"])
def test_specs_and_drawings_need_no_torch(package: str) -> None:
    """Figures can be drawn, and runs described, without torch and bnkern."""
    names = [name for name in MODULES if name == package or name.startswith(f"{package}.")]
    assert len(names) > 1
    blocked = "import sys; sys.modules['torch'] = sys.modules['bnkern'] = None"
    run(f"{blocked}; import {', '.join(names)}")
