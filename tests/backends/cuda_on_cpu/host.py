"""Checks of the backends with ``bnkern.backends.cuda`` over the kernels on the host."""

from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import bnkern
from bnkern import backends
from bnkern.backends import cuda
from bnkern.backends import native as backend_functions
from tests.backends.cuda_on_cpu import native


class Counting:
    """The native module on the host. It counts the calls that were not declined."""

    accepted = 0

    def __getattr__(self, name: str) -> Callable:
        function = getattr(native.module(), name)

        def counted(*args: object) -> object:
            results = function(*args)
            Counting.accepted += results is not None or name == "update"  # which has no results
            return results

        return counted


class NothingLaunched(AssertionError):
    """A check that should run kernels passed without running one."""


def on_the_host(check: Callable, *args: object, single_read_from: int = 0) -> None:
    """Runs a check of the backends on the CPU, with ``bnkern.backends.cuda`` over the kernels on the host."""
    lib = native.kernels()
    lib.configure(1, 1 << 20)
    native.module().connect(backend_functions)
    lib.register_device(native.Device().struct, single_read_from)
    with ExitStack() as patches:
        patches.enter_context(patch.object(backend_functions, "_native", Counting()))
        patches.enter_context(patch.object(backends, "choose", lambda name, device, dtype: cuda))
        patches.enter_context(bnkern.use_backend("cuda"))
        before = Counting.accepted
        check(*args)
        if Counting.accepted == before:
            raise NothingLaunched
