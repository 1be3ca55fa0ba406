"""The process group of a distributed run. Its threads end before the interpreter ends."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def process_group(backend: str, **options: Any) -> Iterator[None]:
    """Provides the default process group while the block runs. When the block is left, the group's threads have ended.

    ``dist.destroy_process_group`` only drops torch's own references. The group ends, and joins gloo's threads, with
    the last reference. If gloo's threads still run while the interpreter shuts down, one that releases the tensors of
    the last collective then waits for the GIL; CPython ends such a thread by ``pthread_exit``, which unwinds a
    ``noexcept`` destructor, and the process aborts ("terminate called without an active exception").

    The references that torch and an exception would keep are therefore avoided or dropped here. The caller must not
    keep any: a module in DistributedDataParallel belongs to a function that returns before the block is left.

    Args:
        backend: "gloo" or "nccl".
        options: Further arguments of ``torch.distributed.init_process_group``.

    Raises:
        BaseException: any exception of the block. The frames of its traceback have lost their local variables.
    """
    # This module's functions take the default group as the default value of an argument, `group=group.WORLD`, which is
    # evaluated upon import. DistributedDataParallel imports it; after init_process_group that keeps the group forever.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group(backend, **options)
    try:
        yield
    except BaseException as error:
        _clear(error)
        raise
    finally:
        try:
            gc.collect()  # frees modules in reference cycles
        finally:
            dist.destroy_process_group()


def _clear(error: BaseException | None) -> None:
    """Clears the local variables, modules among them, in the tracebacks of an error and of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
