"""Check an installed bnkern: ``python -P tests/installed.py``, from outside the repository.

It compares the CPU kernels with torch, forward and backward. Wheels are tested with it, so it imports nothing from the
repository, and ``-P`` keeps this file's folder off the import path.
"""

import torch
import torch.nn.functional as F

import bnkern
from bnkern import _native


def results(batch_norm, x, residual, weight, bias, dy) -> list[torch.Tensor]:
    """The output of relu(batch_norm(x) + residual), the gradients, and the running statistics after the call."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
    running = [torch.zeros_like(weight), torch.ones_like(weight)]
    y = batch_norm(*leaves, *running)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *running]


def fused(x, residual, weight, bias, mean, var) -> torch.Tensor:
    return bnkern.batch_norm(x, mean, var, weight, bias, training=True, residual=residual, act="relu")


def separate(x, residual, weight, bias, mean, var) -> torch.Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + residual)


def main() -> None:
    print(f"bnkern {bnkern.__version__} from {bnkern.__file__}, built with {_native.build_info()}")
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, residual, dy = (torch.randn(8, 16, 9, 7).contiguous(memory_format=memory_format) for _ in range(3))
        weight, bias = torch.rand(16) + 0.5, torch.randn(16)
        with bnkern.use_backend("cpu"):  # an error, not the slow reference, if the kernels cannot be used
            ours = results(fused, x, residual, weight, bias, dy)
        exact = results(separate, *(t.double() for t in (x, residual, weight, bias, dy)))
        names = ("output", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")
        for name, actual, expected in zip(names, ours, exact, strict=True):
            # float32 against float64. The largest differences are those of dweight and dbias, sums of 504 products.
            torch.testing.assert_close(
                actual.double(), expected, rtol=1e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
            print(f"{memory_format}, {name}: largest difference {(actual.double() - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
