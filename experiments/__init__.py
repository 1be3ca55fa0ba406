"""Every figure and table of "Understanding Batch Normalization" (Bjorck et al., 2018), each from one command.

An experiment is a name with two files: ``specs/<name>.py`` says what the paper claims, what to run and when the
claim holds; ``draw/<name>.py`` turns result files into tables and a figure. ``python -m experiments --help``.
"""

import importlib
import pkgutil
from types import ModuleType

from .specs import Spec


def names() -> list[str]:
    """The experiments, in the order in which the report tells them: that of the paper."""
    from . import specs

    found = [module.name for module in pkgutil.iter_modules(specs.__path__)]
    return sorted(found, key=lambda name: (spec(name).order, name))


def spec(name: str) -> Spec:
    """The Spec of one experiment."""
    return importlib.import_module(f"{__name__}.specs.{name}").SPEC


def drawer(name: str) -> ModuleType:
    """The module that draws one experiment: see experiments/draw/__init__.py."""
    return importlib.import_module(f"{__name__}.draw.{name}")
