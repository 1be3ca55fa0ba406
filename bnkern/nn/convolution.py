"""The convolution."""

import torch
from torch import Tensor

from ..conv import conv2d, plan
from ..norm.context import is_plain_eager
from .leaf import fx_leaf


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with bnkern's CPU kernels where these were measured to be faster than torch's.

    All of them are for float32 in channels_last. Which convolutions they serve is decided for the output, the input
    gradient and the weight gradient apart, by the ``prefers`` functions of bnkern/backends/cpu/convolution.py:

        3 x 3, stride and padding 1, no bias, multiples of 16 channels   Winograd's F(2 x 2, 3 x 3)
        stride 2, 1 x 1 kernels, few input channels                      the definition, for up to some hundred products
        the weight gradient of all these                                 the kernel that also computes the probe's sums

    With the probe ``weight_gradient_signs`` the weight gradient has the same bits as without it. Where Winograd's form
    is used, results may be NaN where the definition gives an infinity, and a value that is not finite may spread to all
    nine weight gradients of its channel. The choice depends on the CPU's instruction set. In all other cases torch's
    convolution is used, and the probe is computed in addition. Arguments and state_dict are those of torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        node = fx_leaf(self, input)
        if node is not None:
            return node  # type: ignore[return-value]
        if (
            type(input) is Tensor
            and not isinstance(self.padding, str)
            and self.padding_mode == "zeros"
            and is_plain_eager()
            and not torch.is_autocast_enabled(input.device.type)
            and input.dim() == 4
        ):
            options = (self.stride, self.padding)
            kernels = plan(input, self.weight, self.bias, *options, self.dilation, self.groups)  # type: ignore[arg-type]
            if kernels is not None:
                return conv2d(input, self.weight, self.bias, *options, kernels)  # type: ignore[arg-type]
        return super().forward(input)
