"""The tests, in folders that mirror the package. `support` has what several folders share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The assertions of the helpers show their values too.
pytest.register_assert_rewrite(*(f"tests.{path.parent.name}" for path in Path(__file__).parent.glob("*/__init__.py")))
