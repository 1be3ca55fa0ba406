"""PyTorch's own test inputs for batch norm give the same results, errors and state with torch's functions and bnkern's.

Values are compared with those of torch in float64 on the same rounded tensors; shapes, dtypes, strides, state and
errors with those of torch in the same dtype. DIFFERENCES lists the calls that differ, each with its reason. The tests
fail if a listed difference no longer exists.
"""

import copy
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from tests import ROOT
from tests.nn.torch_samples import DTYPES, MODULES, OPS, ModuleSample, OpSample, Samples

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])

# rtol is that of torch.testing.assert_close for the dtype. atol is wider. In float32 a gradient is the sum of some
# hundred terms of size 10, each rounded. Half precisions round the state of two steps twice, at values of order one.
TOLERANCE = {
    torch.float32: (1.3e-6, 1e-4),
    torch.float64: (1e-7, 1e-7),
    torch.bfloat16: (1.6e-2, 4e-3),
    torch.float16: (1e-3, 5e-4),
    torch.int64: (0, 0),
}

# Calls that torch accepts and bnkern refuses with a ValueError, by name, with a condition. docs/use_in_your_model.md
# lists them too.
DIFFERENCES: dict[str, Callable[[Tensor], bool]] = {
    # An input without a channel axis has no batch norm. torch's own modules refuse it too, but F.batch_norm returns it.
    "input of fewer than two dimensions": lambda x: x.dim() < 2,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    if importlib.util.find_spec("expecttest") is None:
        pytest.skip("torch.testing._internal needs the library expecttest, which the extra dev installs")
    path = tmp_path_factory.mktemp("samples") / "samples.pickle"
    subprocess.run([sys.executable, "-m", "tests.nn.torch_samples", str(path)], cwd=ROOT, check=True)
    return pickle.loads(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------- outcomes

Outcome = list[tuple[str, Tensor]]  # the results of a call, each with its name


def gradient_of(y: Tensor) -> Tensor:
    """A gradient for y whose values are exact in every dtype."""
    return (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)


def outcome_of_module(module: nn.Module, x: Tensor, training: bool) -> Outcome:
    """Two calls, each with a backward, so that momentum None and accumulation have an effect."""
    module.train(training)
    x = x.clone().requires_grad_()
    results = []
    for call in ("first", "second"):
        y = module(x)
        y.backward(gradient_of(y))
        results.append((f"{call} output", y.detach()))
    grads = [("input", x), *module.named_parameters()]
    return results + [(f"{k}.grad", t.grad) for k, t in grads] + list(module.state_dict().items())


def outcome_of_function(function: Callable, sample: OpSample, dtype: torch.dtype) -> Outcome:
    """The output, the gradients of all arguments that have one, and the arguments after the call."""
    arguments = [t.to(dtype, copy=True) if isinstance(t, Tensor) else t for t in (sample.input, *sample.args)]
    leaves = {k: t for k, t in enumerate(arguments) if isinstance(t, Tensor) and k not in running_in(sample)}
    for t in leaves.values():
        t.requires_grad_()
    y = function(*arguments, **sample.kwargs)
    grads = torch.autograd.grad(y, list(leaves.values()), gradient_of(y))
    return [
        ("output", y.detach()),
        *((f"gradient of argument {k}", t) for k, t in zip(leaves, grads, strict=True)),
        *((f"argument {k} after", arguments[k]) for k in running_in(sample) if isinstance(arguments[k], Tensor)),
    ]


def running_in(sample: OpSample) -> tuple[int, int]:
    """The positions of the running statistics: F.batch_norm has them first, the native operators last."""
    return (1, 2) if len(sample.args) == 4 else (3, 4)


def assert_same(ours: Outcome, theirs: Outcome, truth: Outcome, label: str) -> None:
    """``ours`` has the form of ``theirs`` and the values of ``truth``."""
    assert [k for k, _ in ours] == [k for k, _ in theirs] == [k for k, _ in truth]
    for (name, actual), (_, torchs), (_, exact) in zip(ours, theirs, truth, strict=True):
        form = (actual.dtype, actual.shape, actual.stride())
        assert form == (torchs.dtype, torchs.shape, torchs.stride()), f"{label}: {name}"
        rtol, atol = TOLERANCE[actual.dtype]
        torch.testing.assert_close(
            actual,
            exact.to(actual.dtype),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{label}: {n}: {m}",
        )


# ----------------------------------------------------------------------------------------------------------- modules


def build(cls: type[nn.Module], sample: ModuleSample, dtype: torch.dtype) -> nn.Module:
    """The module, whose state has different numbers for each channel and tensor."""
    module = cls(*sample.args, **sample.kwargs).to(dtype)
    with torch.no_grad():
        for k, t in enumerate(t for t in module.state_dict().values() if t.is_floating_point()):
            t.copy_(torch.linspace(0.5 + k, 1.5 + k, t.numel(), dtype=torch.float64))
    return module


def calls_of(samples: Samples, dtype: torch.dtype, training: bool) -> list[tuple[str, ModuleSample]]:
    """Each class with its samples. SyncBatchNorm has no samples and uses those of the three others."""
    calls = [(name, sample) for name in MODULES for sample in samples.modules[name, dtype, training]]
    return calls + [("SyncBatchNorm", sample) for _, sample in calls]


@EACH_DTYPE
@TRAINING
def test_module_inputs(samples: Samples, dtype: torch.dtype, training: bool) -> None:
    calls = [call for call in calls_of(samples, dtype, training) if call[1].error is None]
    assert len(calls) >= 36
    for name, sample in calls:
        label = f"{name} {sample.name}"
        ours, theirs = (build(getattr(package.nn, name), sample, dtype) for package in (bnkern, torch))
        assert repr(ours) == repr(theirs), label
        assert list(ours.state_dict()) == list(theirs.state_dict()), label
        exact = copy.deepcopy(theirs).double()
        assert_same(
            outcome_of_module(ours, sample.input, training),
            outcome_of_module(theirs, sample.input, training),
            outcome_of_module(exact, sample.input.double(), training),
            label,
        )


@EACH_DTYPE
@TRAINING
def test_module_error_inputs(samples: Samples, dtype: torch.dtype, training: bool) -> None:
    """eps that is not positive. torch 2.13 accepts zero in eval mode, and torch 2.11 does not. bnkern accepts it."""
    calls = [call for call in calls_of(samples, dtype, training) if call[1].error is not None]
    assert len(calls) >= 12
    for name, sample in calls:
        ours, theirs = (build(getattr(package.nn, name), sample, dtype).train(training) for package in (bnkern, torch))
        if not training and ours.eps == 0:
            vectors = (ours.weight, ours.bias, ours.running_mean, ours.running_var)
            exact = torch.batch_norm(*(t.double() for t in (sample.input, *vectors)), False, 0.1, 0.0, False)
            rtol, atol = TOLERANCE[dtype]
            torch.testing.assert_close(ours(sample.input), exact.to(dtype), rtol=rtol, atol=atol)
            continue
        for module in (ours, theirs):
            with pytest.raises(ValueError, match=sample.error if training else "eps must"):
                module(sample.input)


# --------------------------------------------------------------------------------------------------------- functions


def native(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: object) -> Tensor:
    """bnkern.batch_norm with the arguments of the native operators, one of which takes no running statistics."""
    *running, training, momentum, eps = rest
    return bnkern.batch_norm(x, *(running or (None, None)), weight, bias, training, momentum, eps)


def with_update(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *rest: float) -> Tensor:
    return bnkern.batch_norm(x, mean, var, weight, bias, True, *rest)


def aten(name: str) -> Callable[..., Tensor]:
    """Only the output of the operator; its other results are inputs of its own backward."""
    return lambda *args: getattr(torch.ops.aten, name)(*args)[0]


FUNCTIONS = {
    "nn.functional.batch_norm": (bnkern.batch_norm, F.batch_norm),
    "native_batch_norm": (native, aten("native_batch_norm")),
    "_native_batch_norm_legit": (native, aten("_native_batch_norm_legit")),
    "_batch_norm_with_update": (with_update, aten("_batch_norm_with_update")),
}


@EACH_DTYPE
@pytest.mark.parametrize("name", OPS)
def test_op_samples(samples: Samples, name: str, dtype: torch.dtype) -> None:
    ours, theirs = FUNCTIONS[name]
    observed, calls = set(), samples.ops[name, dtype]
    assert len(calls) >= 8
    for k, sample in enumerate(calls):
        expected = outcome_of_function(theirs, sample, dtype), outcome_of_function(theirs, sample, torch.float64)
        different = [reason for reason, applies in DIFFERENCES.items() if applies(sample.input)]
        observed.update(different)
        if different:
            with pytest.raises(ValueError, match="at least 2 dimensions"):
                ours(sample.input, *sample.args, **sample.kwargs)
        else:
            assert_same(outcome_of_function(ours, sample, dtype), *expected, f"{name}, sample {k}")
    assert observed == (set(DIFFERENCES) if name == "nn.functional.batch_norm" else set())
