"""Checks under AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes must be loaded at process start.

``@sandboxed`` runs a function by its name in a second Python process that was started with these runtimes. Its
exceptions are raised in the calling process. If the second process dies, its error output is raised.
"""

import atexit
import functools
import importlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import pytest

from tests import ROOT

INSIDE = "BNKERN_SANDBOX"
COMPILER = os.environ.get("CXX") or "g++"


def _send(stream: BinaryIO, message: Any) -> None:
    body = pickle.dumps(message)
    stream.write(struct.pack("q", len(body)) + body)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(*struct.unpack("q", head)))


def runtime(name: str) -> str | None:
    """The path of a sanitizer's runtime, or None."""
    result = subprocess.run([COMPILER, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
    return result if os.path.isabs(result) else None


class Sandbox:
    """The second process. It is started at the first call, and again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this does)

    def start(self) -> None:
        libraries = [runtime(name) for name in ("asan", "ubsan")]
        if not shutil.which(COMPILER) or None in libraries:
            pytest.skip(f"{COMPILER} or its sanitizers are not installed")
        environment = os.environ | {
            INSIDE: "1",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        command = [sys.executable, "-m", "tests.backends.cuda_on_cpu.sandbox"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def call(self, module: str, name: str, args: tuple, kwargs: dict) -> Any:
        if self.process is None:
            self.start()
        try:
            _send(self.process.stdin, (module, name, args, kwargs))
            problem, result = _receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.process.wait()
            self.process = None
            self.errors.seek(0)
            message = self.errors.read().decode(errors="replace")
            self.errors.truncate(0)
            raise Died(message[-12000:]) from None
        if problem is not None:
            raise AssertionError(problem)
        return result


class Died(Exception):
    """The sandbox ended during a call. The text is its error output."""


_sandbox = Sandbox()
atexit.register(_sandbox.stop)


def sandboxed(function: Callable) -> Callable:
    """The function, run in the sandbox. Its arguments and its result must be picklable."""
    if INSIDE in os.environ:
        return function

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _sandbox.call(function.__module__, function.__qualname__, args, kwargs)

    return wrapped


def _serve() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text must not mix with replies
    while True:
        try:
            module, name, args, kwargs = _receive(requests)
        except EOFError:
            return
        try:
            result = functools.reduce(getattr, name.split("."), importlib.import_module(module))(*args, **kwargs)
            _send(replies, (None, result))
        except BaseException:
            _send(replies, (traceback.format_exc(), None))


if __name__ == "__main__":
    _serve()
