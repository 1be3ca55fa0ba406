"""``bnkern.nn.convert_sync_batchnorm``: what it keeps, and what it refuses."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnkern


def test_convert() -> None:
    """Torch's three classes, bnkern's, and torch's SyncBatchNorm keep their tensors, mode, hooks, act and names."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
        bnkern.nn.BatchNorm2d(4, act="relu", affine=False),
        nn.ModuleDict({"a": nn.SyncBatchNorm(4, eps=0.1), "b": bnkern.nn.SyncBatchNorm(4, act="relu")}),
        nn.BatchNorm3d(4, track_running_stats=False, bias=False).requires_grad_(False),
        nn.InstanceNorm2d(4),
    )
    model[1].eval()
    handle, calls = model[1].register_forward_hook(lambda *_: calls.append(1)), []
    before = dict(model.state_dict(keep_vars=True))
    modes = {name: m.training for name, m in model.named_modules()}
    originals = {name: m for name, m in model.named_modules()}
    converted = bnkern.nn.convert_sync_batchnorm(model, "group")
    assert converted is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[k] is v for k, v in before.items())
    assert {name: m.training for name, m in model.named_modules()} == modes
    kinds = {name: type(m) for name, m in model.named_modules()}
    for name in ("1", "2", "3.a", "3.b", "4"):
        module = model.get_submodule(name)
        assert kinds[name] is bnkern.nn.SyncBatchNorm and module.process_group == "group"
        assert module.act == getattr(originals[name], "act", None)
        for key in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
            assert getattr(module, key) == getattr(originals[name], key)
    assert kinds["5"] is nn.InstanceNorm2d
    model[1](torch.ones(2, 4, 2, 2))
    assert calls == [1]
    handle.remove()
    model[1](torch.ones(2, 4, 2, 2))
    assert calls == [1]


def test_convert_a_single_and_a_shared_one() -> None:
    bn = bnkern.nn.BatchNorm1d(4, act="relu")
    converted = bnkern.nn.convert_sync_batchnorm(bn)
    assert type(converted) is bnkern.nn.SyncBatchNorm and type(bn) is bnkern.nn.BatchNorm1d
    assert converted.weight is bn.weight
    model = nn.ModuleList([nn.Sequential(bn), bn, bn])
    bnkern.nn.convert_sync_batchnorm(model)
    assert type(model[1]) is bnkern.nn.SyncBatchNorm
    assert model[0][0] is model[1] is model[2]
    converted_again = bnkern.nn.convert_sync_batchnorm(copy.deepcopy(model))
    assert repr(converted_again) == repr(model)


def test_convert_refuses_modules_that_it_would_break() -> None:
    class Rectified(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = nn.Sequential(Rectified(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"0 \(Rectified\) has a forward of its own"):
        bnkern.nn.convert_sync_batchnorm(model)
    assert type(model[0]) is Rectified and type(model[1]) is bnkern.nn.SyncBatchNorm
    with pytest.raises(ValueError, match=r"a\.0 \(LazyBatchNorm2d\) must be initialised by a first call"):
        bnkern.nn.convert_sync_batchnorm(nn.ModuleDict({"a": nn.Sequential(nn.LazyBatchNorm2d())}))
    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    with pytest.raises(ValueError, match="0 must not be parametrized"):
        bnkern.nn.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnkern.nn.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), bnkern.nn.BatchNorm1d(2)))
