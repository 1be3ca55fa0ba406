"""torch.func's vmap and grad on the kernels, with members folded into channels, compared with a loop over members."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

import bnkern
from bnkern.backends import reference

MEMBERS = 3
# Sums of some hundred float32 values. The tiles differ between one member and all members folded.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that calls the reference formula, which is correct but slow."""
    for name in ("forward", "differentiable_backward"):
        monkeypatch.setattr(reference, name, None)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mapped", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_members_equal_a_loop(training: bool, mapped: tuple[bool, ...], channels_last: bool, no_reference) -> None:
    """vmap(grad) over inputs, parameters or both.

    Unmapped tensors are shared. In eval mode it is also over statistics.
    """
    if not any(mapped):
        return
    x, residual = random(MEMBERS, 4, 5, 6, 6, seed=0), random(MEMBERS, 4, 5, 6, 6, seed=1)
    if channels_last:
        x, residual = (t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for t in (x, residual))
    weight, bias = random(MEMBERS, 5, seed=2), random(MEMBERS, 5, seed=3)
    mean, var = random(MEMBERS, 5, seed=4), random(MEMBERS, 5, seed=5).abs() + 0.5
    of_x, of_parameters, of_residual = mapped
    is_mapped = (of_x, of_parameters, of_parameters, of_residual, of_parameters, of_parameters)
    arguments = [t if m else t[0] for t, m in zip((x, weight, bias, residual, mean, var), is_mapped, strict=True)]

    def loss(x, weight, bias, residual, mean, var):
        running = (None, None) if training else (mean, var)
        y = bnkern.batch_norm(x, *running, weight, bias, training, residual=residual, act="relu")
        return y.square().sum(), y

    call = grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    grads, y = vmap(call, tuple(0 if m else None for m in is_mapped))(*arguments)
    for k in range(MEMBERS):
        leaves = [(t[k] if m else t).clone().requires_grad_() for t, m in zip(arguments, is_mapped, strict=True)]
        value, expected = loss(*leaves)
        torch.testing.assert_close(y[k], expected.detach(), **CLOSE)
        for mapped_gradient, expected_gradient in zip(grads, torch.autograd.grad(value, leaves[:4]), strict=True):
            torch.testing.assert_close(mapped_gradient[k], expected_gradient, **CLOSE)
        if channels_last and of_x:
            assert y[k].stride(1) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5)], ids=str)
def test_without_parameters(dtype: torch.dtype, shape: tuple[int, ...], no_reference) -> None:
    """Without weight, bias, residual and ReLU; nested vmap; float32 statistics of bfloat16 members."""
    xs = random(2, MEMBERS, *shape, seed=6, dtype=dtype)

    def norm(x: Tensor) -> Tensor:
        return bnkern.batch_norm(x, None, None, training=True)

    y = vmap(vmap(norm))(xs)
    dx = vmap(vmap(grad(lambda x: (norm(x) * x.cos()).sum())))(xs)
    for i, k in itertools.product(range(2), range(MEMBERS)):
        x = xs[i, k].clone().requires_grad_()
        expected = norm(x)
        (of_x,) = torch.autograd.grad((expected * x.cos()).sum(), x)
        # In bfloat16 y is rounded once, and dx depends on it: two units in the last of 8 bits.
        close = {"rtol": 2**-7, "atol": 2**-6} if dtype is torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(y[i, k], expected.detach(), **close)
        torch.testing.assert_close(dx[i, k], of_x, **close)


def test_gradients_through_vmap(no_reference) -> None:
    """With vmap inside of ordinary autograd one backward computes the gradients of all members' parameters."""
    x, weight, bias = (random(MEMBERS, *s, seed=7) for s in ((4, 5, 3, 3), (5,), (5,)))
    weight.requires_grad_(), bias.requires_grad_()

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bnkern.batch_norm(x, None, None, weight, bias, True, act="relu")

    result = torch.autograd.grad(vmap(norm)(x, weight, bias).square().sum(), (weight, bias))
    looped = torch.stack([norm(*t) for t in zip(x, weight, bias, strict=True)]).square().sum()
    for a, b in zip(result, torch.autograd.grad(looped, (weight, bias)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


SECOND: dict[str, Callable] = {
    "grad(grad)": lambda f, x, w: grad(lambda x: grad(lambda w: f(x, w).sum())(w).square().sum())(x),
    "vmap(grad(grad))": lambda f, x, w: vmap(grad(lambda x: grad(lambda x: f(x, w).sum())(x).sin().sum()))(
        torch.stack([x, x.cos()])
    ),
    "hessian": lambda f, x, w: hessian(lambda w: f(x, w).sum())(w),
    "create_graph": lambda f, x, w: torch.autograd.grad(
        torch.autograd.grad(vmap(f)(x[None], w[None]).sum(), x, create_graph=True)[0].sin().sum(), x
    )[0],
}


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivatives(transform: str, training: bool) -> None:
    """They use the reference formula, like those of a single batch norm, also in forward mode (hessian). In float64."""
    x, weight = random(4, 3, 5, seed=8, dtype=torch.float64).requires_grad_(), random(3, seed=9, dtype=torch.float64)
    mean, var = random(3, seed=10, dtype=torch.float64), random(3, seed=11, dtype=torch.float64).abs() + 0.5
    running = (None, None) if training else (mean, var)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return bnkern.batch_norm(x, *running, w, None, training, act="relu").square()

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, *running, w, None, training).relu().square()

    # float64, sums of 20 values
    torch.testing.assert_close(
        SECOND[transform](ours, x, weight), SECOND[transform](theirs, x, weight), rtol=1e-9, atol=1e-9
    )
