"""bnkern/_native.pyi, by which a type checker knows the compiled module, names what is there."""

import ast
from pathlib import Path

import pytest

import bnkern

native = pytest.importorskip("bnkern._native")


def test_the_stub_names_what_the_module_has() -> None:
    """Each function of the module is in the stub, and the other way round; those of CUDA where it was built."""
    stub = ast.parse((Path(bnkern.__file__).parent / "_native.pyi").read_text())
    stated = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    if native.build_info()["cuda"] is None:
        stated = {name for name in stated if not name.startswith("cuda_")}
    assert stated == {name for name in dir(native) if not name.startswith("_")}


def test_the_stub_counts_arguments_as_the_module_does() -> None:
    """A function of C's calling convention says how many arguments it wants; so do the stub's positional ones."""
    stub = ast.parse((Path(bnkern.__file__).parent / "_native.pyi").read_text())
    checked = 0
    for node in stub.body:
        if not isinstance(node, ast.FunctionDef) or not hasattr(native, node.name):
            continue
        try:
            getattr(native, node.name)(*[None] * 20)
        except TypeError as error:
            if str(error).startswith("expected "):
                assert str(error) == f"expected {len(node.args.posonlyargs)} arguments, got 20", node.name
                checked += 1
    assert checked == 11
