"""``conv_norm_forward`` on a GPU, against the reference in float64, and a chain against the modules one by one."""

import copy

import pytest
import torch

import bnkern
from bnkern import backends
from bnkern.backends import cuda
from bnkern.backends.calls import ForwardCall
from bnkern.nn import Chain, ConvBNAct
from tests.support.conv_norm import CALLS, DTYPES, ODD, STAGES, Problem, check_convolution, check_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or backends.unavailable("cuda", "cuda") is not None,
        reason="there is no CUDA device, or the module was built without CUDA",
    ),
]


@pytest.mark.parametrize(("norm", "act"), CALLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [None, 128, 700])
@pytest.mark.parametrize("size", STAGES + ODD, ids=str)
def test_kernel(size: tuple[int, ...], images: int | None, dtype: str, norm: str, act: str | None) -> None:
    """Twice, with the same bits: fewer images than multiprocessors, about as many, and more."""
    from bnkern.backends import cuda_conv

    backends.choose("cuda", "cuda", DTYPES[dtype])  # introduces the device
    p = Problem((images or size[0], *size[1:]), DTYPES[dtype], norm, act).to("cuda")
    results = []
    for _ in range(2):
        behind = p.norm._replace(**{name: getattr(p.norm, name).clone() for name in STATE})
        forward = cuda_conv.conv_norm_forward(p.source, p.mean, p.invstd, p.keep, p.weight, None, behind)
        results.append((*forward, *behind[4:7]))
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)
    y, mask, r, mean, invstd, *running = results[0]
    source = p.source
    if isinstance(source, ForwardCall):
        source, expected = cuda.normalize(p.source, p.mean, p.invstd)
        assert y is None or torch.equal(y, source)
        assert mask is expected is None or torch.equal(mask, expected)
    check_convolution(source, p.weight, r)
    check_statistics(p.norm, r, mean, invstd, tuple(running))


STATE = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_chain(channels: int) -> None:
    """Output and gradients, with the errors of the modules called one by one against float64 as a measure."""
    torch.manual_seed(0)
    model = Chain(*(ConvBNAct(channels, channels) for _ in range(3))).cuda()
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(32, channels, 8, 8, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for network, fused in ((copy.deepcopy(model).double(), False), (copy.deepcopy(model), False), (model, True)):
        network.zero_grad()
        with bnkern.use_cuda_chains(fused):
            y = network(x.to(next(network.parameters()).dtype))
        assert (type(y.grad_fn).__name__ == "_ChainBackward") is fused
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in network.parameters())])
    for truth, usual, actual in zip(*found, strict=True):
        error, bound = ((t.double() - truth).norm() / truth.norm() for t in (actual, usual))
        assert error <= 1.5 * bound + 2e-3
