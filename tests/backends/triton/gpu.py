"""Cases of the tests of Triton's kernels on a GPU."""

import pytest
import torch

from tests.support.cases import Case


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")(test))


LARGE = [
    Case("stage", (128, 16, 32, 32), "the first stage of a CIFAR network: 16 channels in 512 programs"),
    Case("stage_rows", (128, 16, 32, 32), "the first stage of a CIFAR network, in rows", "channels_last"),
    Case("ragged", (37, 17, 13, 11), "no size is a multiple of a block"),
]
