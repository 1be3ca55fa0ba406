"""A 3 x 3 convolution between two batch norms in plain torch, as a specification of the kernels.

The batch norm before it turns x into y = act(batch_norm(x) + residual), and the convolution y into r = conv2d(y,
weight, padding=1). The batch norm behind it needs the moments of r. In the backward, g is the gradient before the
activation of a batch norm. A bias of the convolution is not added to r: it only changes the running mean of the norm
behind it, which is that of r + bias. The formulas of the batch norms are those of batch_norm.py.
"""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..calls import BackwardCall, ForwardCall
from .batch_norm import backward, grad_input, grad_sums, moments, normalize, update_running


def conv_norm_forward(
    source: ForwardCall | Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    keep: bool,
    weight: Tensor,
    bias: Tensor | None,
    norm: ForwardCall,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """y (if ``keep``), its mask, r, and mean and invstd of the norm of r.

    In training they are those of r, and the running statistics of ``norm`` are updated. In eval mode they are the
    running statistics.

    Args:
        source: the call of the norm before the convolution, or y itself, [N, I, H, W].
        mean: of the source, [I], or None if the source is y.
        invstd: of the source, as mean.
        keep: whether y is returned.
        weight: of the convolution, [O, I, 3, 3].
        bias: of the convolution, [O], or None.
        norm: the call of the norm behind the convolution; x is not read.
    """
    mask = None
    if isinstance(source, Tensor):
        y, keep = source, False
    else:
        y, mask = normalize(source, mean, invstd)
    r = torch.nn.functional.conv2d(y, weight, padding=1)
    if norm.training:
        count, r_mean, m2 = moments(r)
        update_running(norm, count, r_mean if bias is None else r_mean + bias, m2)
        return y if keep else None, mask, r, r_mean, torch.rsqrt(m2 / count + norm.eps)
    assert norm.running_mean is not None and norm.running_var is not None
    r_mean = norm.running_mean.clone() if bias is None else norm.running_mean - bias
    return y if keep else None, mask, r, r_mean, torch.rsqrt(norm.running_var + norm.eps)


def conv_norm_backward(
    behind: BackwardCall,
    sums: Tensor,
    weight: Tensor,
    before: BackwardCall | None,
    y: Tensor | None,
    shortcut: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution and of the batch norms beside it.

        dr = grad_input of the norm behind,   dweight = conv2d_weight(y, dr),   dy = conv2d_input(weight, dr) + shortcut

    Args:
        behind: the call of the norm behind the convolution: dy is its g, x is r, and act is None.
        sums: sum g and sum g * xhat of this norm, [2, O]. They are not read in eval mode.
        weight: of the convolution.
        before: the call of the norm before it, without a dy, or None if y has no norm before it.
        y: the convolution's input. If it is None it is computed from ``before``, whose norm then has no residual.
        shortcut: a gradient that is added to that of y, or None.
        needs: whether the gradient of y and that of the weight are needed.

    Returns:
        g of the norm before (or dy, if there is none), its sums [2, I], the gradients of its weight and bias, and the
        gradient of the convolution's weight. Those that are not needed or do not exist are None.
    """
    count = behind.x.numel() // behind.x.shape[1]
    means = (sums[0], sums[1], count) if behind.training else None
    dr, _ = grad_input(behind._replace(needs=(True, False, False, False)), means)
    assert dr is not None
    if y is None:
        assert before is not None, "y or the norm before the convolution is required"
        y, _ = normalize(ForwardCall(before.x, before.weight, before.bias, act=before.act), before.mean, before.invstd)
    dweight = conv2d_weight(y, weight.shape, dr, padding=1) if needs[1] else None
    if not needs[0]:
        return None, None, None, None, dweight
    dy = conv2d_input(y.shape, weight, dr, padding=1)
    dy = dy if shortcut is None else dy + shortcut
    if before is None:
        return dy, None, None, None, dweight
    return *grad_before_act(before._replace(dy=dy)), dweight


def grad_before_act(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """g of a batch norm, its sums [2, C] (float64: sum g and sum g * xhat), and the gradients of weight and bias."""
    sums = torch.stack(grad_sums(call)).double()
    needs = (False, call.weight is not None, call.bias is not None, True)
    _, dweight, dbias, g = backward(call._replace(needs=needs))
    assert g is not None
    return g, sums, dweight, dbias
