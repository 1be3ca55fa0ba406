"""Invalid calls: each raises an error that names the argument, and changes no tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bnkern
from tests.support.arguments import bad_arguments, good_arguments
from tests.support.cases import Precision


def raises_naming(argument: str, error: type[Exception], function: Callable, **arguments: object) -> None:
    """Requires the error, with the argument's name in its message.

    All tensors keep their bytes and version counters.
    """
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [(t.clone(), t._version) for t in tensors]
    described = f"{argument}={arguments[argument]!r}"
    try:
        function(**arguments)
    except (TypeError, ValueError) as caught:
        assert type(caught) is error, f"{described} raised {type(caught).__name__}: {caught}"
        assert argument in str(caught), f"{described} is not named in: {caught}"
    else:
        pytest.fail(f"{described} did not raise")
    for t, (value, version) in zip(tensors, before, strict=True):
        assert t._version == version
        assert torch.equal(t.to_dense() if t.is_sparse else t, value.to_dense() if t.is_sparse else value)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_malformed_calls(precision: Precision, layout: str, training: bool) -> None:
    good = good_arguments(precision, layout, training)
    calls = list(bad_arguments(good))
    assert len(calls) > 100
    for argument, wrong, error in calls:
        raises_naming(argument, error, bnkern.batch_norm, **{**good, argument: wrong})
    bnkern.batch_norm(**good)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_malformed_add_act(precision: Precision, layout: str) -> None:
    good = good_arguments(precision, layout, True)
    count = 0
    for argument, wrong, error in bad_arguments(good):
        if argument in ("residual", "act"):
            raises_naming(argument, error, bnkern.add_act, **{"x": good["input"], "residual": None, argument: wrong})
            count += 1
    assert count > 20
    bnkern.add_act(good["input"], good["residual"])


@pytest.mark.parametrize("function", [bnkern.add_act, bnkern.channel_moments], ids=["add_act", "channel_moments"])
def test_malformed_first_argument(function: Callable) -> None:
    for wrong, error in [
        (None, TypeError),
        (1.0, TypeError),
        ([[1.0]], TypeError),
        (torch.ones(3, 4, dtype=torch.int64), TypeError),
        (torch.ones(3, 4).to_sparse(), TypeError),
        (torch.ones(3), ValueError),
        (torch.tensor(1.0), ValueError),
    ]:
        raises_naming("input", error, lambda **kwargs: function(kwargs["input"]), input=wrong)


def test_missing_together() -> None:
    x, mean = torch.ones(4, 3).cumsum(0), torch.ones(3)
    with pytest.raises(ValueError, match="running_mean and running_var must be given when training=False"):
        bnkern.batch_norm(x, None, None)
    with pytest.raises(ValueError, match="num_batches_tracked must be given when momentum is None"):
        bnkern.batch_norm(x, mean, mean.clone(), training=True, momentum=None)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bnkern.batch_norm(x[:1], mean, mean.clone(), training=True)
    assert mean.tolist() == [1.0] * 3


def test_messages_state_the_actual_and_the_required_value() -> None:
    x = torch.ones(2, 3, 4, 4)
    for arguments, message in [
        ({"weight": torch.ones(4)}, "weight must have one element per channel of input, shape [3], got [4]"),
        ({"weight": torch.ones(3).half()}, "weight must be torch.float32 for torch.float32 input, got torch.float16"),
        ({"residual": torch.ones(2, 3, 1, 1)}, "the shape of input, [2, 3, 4, 4], got [2, 3, 1, 1]"),
        ({"eps": 0.0}, "eps must be positive during training, got 0.0"),
        ({"eps": -1.0}, "eps must be positive during training, got -1.0"),
        ({"act": "gelu"}, "act must be None or \"relu\", got 'gelu'"),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            bnkern.batch_norm(x, None, None, training=True, **arguments)
        assert message in str(caught.value)


def test_unusual_valid_arguments() -> None:
    """Strided or expanded weights, an integer eps, vectors of mixed dtypes, and an unusual residual are valid."""
    x, p = (
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0]),
    )
    expected = bnkern.batch_norm(x, None, None, torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), True, eps=1.0)
    assert torch.equal(bnkern.batch_norm(x, None, None, p[::2], torch.ones(1).expand(3), True, eps=1), expected)
    half, stats = x.bfloat16(), torch.ones(3)
    for weight, bias in ((stats, stats.bfloat16()), (stats.bfloat16(), stats), (stats, None)):
        assert bnkern.batch_norm(half, stats, stats.bfloat16(), weight, bias).dtype == torch.bfloat16
    assert torch.equal(bnkern.add_act(x, x), (x + x).relu())
    corner, position = x[:, :, :1, :1], x[:, :, 2:3, 2:3]  # one position per channel: both memory formats at once
    assert torch.equal(bnkern.add_act(corner, position), (corner + position).relu())
    assert torch.equal(bnkern.add_act(corner.contiguous(), position), (corner + position).relu())
