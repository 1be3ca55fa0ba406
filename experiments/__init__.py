"""Every figure and table of "Understanding Batch Normalization" (Bjorck et al., 2018), each from one command.

An experiment is a name with two files. ``specs/<name>.py`` has the paper's claims, the runs and the conditions under
which a claim holds. ``draw/<name>.py`` makes tables and a figure of the results. ``python -m experiments --help``.
"""

import importlib
import pkgutil
from types import ModuleType

from .specs import Spec


def names() -> list[str]:
    """The experiments in the order of the report, which is that of the paper."""
    from . import specs

    found = [module.name for module in pkgutil.iter_modules(specs.__path__)]
    return sorted(found, key=lambda name: (spec(name).order, name))


def spec(name: str) -> Spec:
    """The Spec of one experiment."""
    return importlib.import_module(f"{__name__}.specs.{name}").SPEC


def drawer(name: str) -> ModuleType:
    """The module that draws one experiment: see experiments/draw/__init__.py."""
    return importlib.import_module(f"{__name__}.draw.{name}")
