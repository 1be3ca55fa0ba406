"""PyTorch's own inputs for batch norm, from the private ``torch.testing._internal``, as data in a file.

This is a separate program (``python -m tests.nn.torch_samples FILE``), because importing that package changes the
process: it forbids setting the flags of torch.backends and replaces methods of torch.jit. The package needs the library
expecttest, which the extra ``dev`` installs.
"""

import pickle
import sys
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODULES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
OPS = ("nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")


class ModuleSample(NamedTuple):
    """An entry of ``module_inputs_func`` or ``module_error_inputs_func``: arguments of the module and its call."""

    name: str
    args: tuple
    kwargs: dict[str, object]
    input: Tensor
    error: str | None = None  # the pattern of the message, for an invalid input


class OpSample(NamedTuple):
    """One entry of ``sample_inputs`` of an OpInfo."""

    input: Tensor
    args: tuple
    kwargs: dict[str, object]


class Samples(NamedTuple):
    modules: dict[tuple[str, torch.dtype, bool], list[ModuleSample]]  # by class, dtype and training
    ops: dict[tuple[str, torch.dtype], list[OpSample]]


def _module_sample(module_input, error: str | None = None) -> ModuleSample:
    constructor, call = module_input.constructor_input, module_input.forward_input
    return ModuleSample(module_input.desc or "plain", constructor.args, constructor.kwargs, call.args[0], error)


def collect() -> Samples:
    """All samples for the CPU, with the same values in every run. No tensor requires grad."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    torch.manual_seed(0)
    modules, ops = {}, {}
    for info in module_db:
        name = info.module_cls.__name__
        for dtype in DTYPES if name in MODULES else ():
            for training in (True, False):
                arguments = (info, "cpu", dtype, False, training)
                modules[name, dtype, training] = [
                    *map(_module_sample, info.module_inputs_func(*arguments)),
                    *(
                        _module_sample(e.module_error_input, e.error_regex)
                        for e in info.module_error_inputs_func(*arguments)
                    ),
                ]
    for info in op_db:
        for dtype in DTYPES if info.name in OPS and not info.variant_test_name else ():
            assert info.error_inputs_func is None, f"torch has error inputs of {info.name} now: collect them too"
            ops[info.name, dtype] = [OpSample(s.input, s.args, s.kwargs) for s in info.sample_inputs("cpu", dtype)]
    return Samples(modules, ops)


if __name__ == "__main__":
    from tests.nn import torch_samples  # so that the classes are pickled with the name that the tests import

    with open(sys.argv[1], "wb") as file:
        pickle.dump(torch_samples.collect(), file)
