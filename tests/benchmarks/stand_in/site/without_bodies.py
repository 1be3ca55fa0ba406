"""A plugin of pytest that sets up every test of tests/ and leaves out its body."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return True if pyfuncitem.nodeid.startswith("tests/") else None
