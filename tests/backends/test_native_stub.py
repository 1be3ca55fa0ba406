"""bnkern/_native.pyi, which describes the compiled module for type checkers, matches the module."""

import ast
from pathlib import Path

import pytest

import bnkern

native = pytest.importorskip("bnkern._native")


def test_the_stub_has_the_functions_of_the_module() -> None:
    """The stub and the module have the same functions. Those of CUDA are compared only in a build with CUDA."""
    stub = ast.parse((Path(bnkern.__file__).parent / "_native.pyi").read_text())
    stated = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    if native.build_info()["cuda"] is None:
        stated = {name for name in stated if not name.startswith("cuda_")}
    assert stated == {name for name in dir(native) if not name.startswith("_")}


def test_the_stub_has_the_modules_numbers_of_arguments() -> None:
    """The error of a function with C's calling convention states its number of arguments, which the stub must match."""
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
    assert checked == 17
