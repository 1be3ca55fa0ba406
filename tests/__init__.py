"""The tests, in folders that mirror the package. `support` has what several folders share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.register_assert_rewrite("tests")  # the helpers' assertions show their values too
