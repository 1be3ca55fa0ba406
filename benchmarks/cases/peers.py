"""The providers of a batch norm: bnkern's module, torch's eager and compiled forms, and other packages.

Every class takes (channels, act). Its forward takes x and, for the fused operation, a residual. Operations that a
package does not fuse are torch's. A package that is not installed, or does not support a case, is listed in every table
with the reason (``Missing``).
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from benchmarks.tools import timing


class Eager(nn.BatchNorm2d):
    """``act(bn(x) + residual)`` as separate operations, each of which writes a fresh tensor."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.act else y


class EagerInPlace(Eager):
    """The same, as written in torchvision's ResNet: ``out = bn(x); out += residual; relu_(out)``."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = nn.BatchNorm2d.forward(self, x)
        if residual is not None:
            y += residual
        return F.relu_(y) if self.act else y


class WithoutCudnn(Eager):
    """Eager with torch's own kernels in place of cuDNN. The backward uses the choice of the forward."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(x, residual)


class InTriton(bnkern.nn.BatchNorm2d):
    """bnkern's module on the Triton kernels, where another backend would be chosen."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__(channels, act=act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with bnkern.use_backend("triton"):
            return super().forward(x, residual)


# ------------------------------------------------------------------------------------------ kernels of other packages


class Missing(Exception):
    """A peer cannot be measured; the message is the reason."""


def package(name: str, instructions: str) -> object:
    """Imports the module. Raises Missing, with how to install it, if that fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # another package may raise anything when it is imported
        message = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise Missing(f"{instructions} ({message})") from error


class _Alias(torch.autograd.Function):
    """The identity in forward and backward, without a copy. Its result is no leaf, so a module may write into it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


class InPlaceABN(nn.Module):
    """inplace_abn (Rota Bulò et al., 2018): the output is written to the input's memory, and the backward inverts it.

    It has no ReLU, because a ReLU cannot be inverted. Addition and ReLU are torch's. Its weight is |weight| + eps.
    """

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__()
        abn = package(
            "inplace_abn",
            "no wheel on PyPI; pip refuses the source archive, because it is named 1.1.0 and contains 0.0.0",
        )
        self.norm = abn.InPlaceABN(channels, activation="identity")
        self.weight, self.bias, self.num_features, self.act = self.norm.weight, self.norm.bias, channels, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(_Alias.apply(x))
        if residual is not None:
            y = y + residual  # not in place: the backward reads y
        return F.relu_(y) if self.act else y


class Attorch(nn.Module):
    """attorch: Triton kernels with one program per channel; addition and activation are fused."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__()
        attorch = package("attorch", "not on PyPI; put a checkout on the PYTHONPATH")
        self.norm = attorch.BatchNorm2d(channels, act_func=act)
        self.weight, self.bias, self.num_features, self.act = self.norm.weight, self.norm.bias, channels, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x) if residual is None else self.norm(x, residual)


class _Gems(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gems, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y, batch_mean, invstd = gems.batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
        ctx.gems = gems
        ctx.save_for_backward(x, weight, mean, var, batch_mean, invstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.gems.batch_norm_backward(dy, *ctx.saved_tensors, True, 1e-5, [True, True, True])
        return None, *grads, None, None


class FlagGems(Eager):
    """FlagGems: batch norm in Triton, with statistics in the input's dtype. Addition and ReLU are torch's."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__(channels, act)
        self.gems = package("flag_gems", "pip install flag-gems, or a wheel for gpu-check --wheels")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = _Gems.apply(self.gems, x, self.weight, self.bias, self.running_mean, self.running_var)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.act else y


class ApexGroupBN(nn.Module):
    """Apex's groupbn: reads x once if it fits on chip. Only fp16 in channels_last. Addition and ReLU are fused."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__()
        groupbn = package(
            "apex.contrib.groupbn.batch_norm", "build it from source with CUDA; the package apex on PyPI is another one"
        )
        self.norm = groupbn.BatchNorm2d_NHWC(channels, fuse_relu=bool(act))
        self.weight, self.bias, self.num_features, self.act = self.norm.weight, self.norm.bias, channels, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float16 or not x.is_contiguous(memory_format=torch.channels_last):
            raise Missing("fp16 in channels_last only")
        tensors = (t.permute(0, 2, 3, 1) for t in (x, residual) if t is not None)
        return self.norm(*tensors).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- all of them

# Further modes of torch.compile. It chooses cooperative reductions for few channels only if they are forced.
COMPILED = {
    "compile max-autotune": {"mode": "max-autotune-no-cudagraphs"},  # graph replay is a separate mode of the benchmarks
    "compile cooperative": {
        "options": {"triton.cooperative_reductions": True, "triton.force_cooperative_reductions": True}
    },
}
OTHERS = {"inplace_abn": InPlaceABN, "attorch": Attorch, "FlagGems": FlagGems, "Apex groupbn": ApexGroupBN}


def batch_norms(channels: int, act: str | None, device: torch.device) -> dict[str, nn.Module]:
    """The modules of bnkern and torch by provider, bnkern first. All have the same random weight and bias in fp32, also
    for bf16 input."""
    ours = bnkern.nn.BatchNorm2d(channels, act=act)
    nn.init.uniform_(ours.weight, 0.5, 1.5)
    nn.init.normal_(ours.bias)
    modules = {"bnkern": ours, "eager": Eager(channels, act)}
    if act:
        modules["eager in place"] = EagerInPlace(channels, act)
    modules["compile"] = compiled(Eager(channels, act))
    return {name: _like(module, ours).to(device) for name, module in modules.items()}


def others(
    ours: nn.Module, device: torch.device, without_compile: str | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The other peers, with the parameters of bnkern's module, and the missing ones with the reason.

    ``without_compile`` is the option that leaves out torch.compile, or None.
    """
    gpu = device.type == "cuda"
    makers: dict[str, Callable[[int, str | None], nn.Module]] = {}
    missing = {}
    for name, options in COMPILED.items():
        if without_compile or not gpu:
            missing[name] = (
                f"left out by {without_compile}" if without_compile else "this option changes code for GPUs only"
            )
        else:
            makers[name] = lambda channels, act, options=options: compiled(Eager(channels, act), **options)
    if gpu:
        makers |= {"bnkern in Triton": InTriton, "eager without cuDNN": WithoutCudnn}
    for name, make in OTHERS.items():
        if gpu or make is InPlaceABN:
            makers[name] = make
        else:
            missing[name] = "its kernels run on GPUs only"
    modules = {}
    for name, make in makers.items():
        try:
            modules[name] = _like(make(len(ours.weight), ours.act), ours).to(device)
        except Exception as error:  # reported like a peer that fails when it is called
            missing[name] = str(error) if isinstance(error, Missing) else timing.reason(error)
    return modules, missing


@torch.no_grad()
def _like(module: nn.Module, ours: nn.Module) -> nn.Module:
    module.weight.copy_(ours.weight)
    module.bias.copy_(ours.bias)
    return module


def compiled(module: nn.Module, **options: object) -> nn.Module:
    """torch.compile for one case: without the state of earlier cases, with static shapes, without graph breaks."""
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=False, **options)
