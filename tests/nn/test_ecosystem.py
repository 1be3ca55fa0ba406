"""Functions of torch and other libraries that replace, copy, fold or inspect batch norms work, or raise a clear error.

Functions of libraries that are not installed are rewritten in a few lines that read and write the same attributes.
"""

import copy
import inspect
import io
import operator
import pickle
import re
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import mkldnn

import bnkern
from bnkern.guard import REBUILDERS
from tests.nn.ecosystem import CLOSE, X, batches, conv_and_norm, norms_of, pair, train

# ------------------------------------------------------------------------------- functions that must work as on torch's


def lightning_weight_averaging(model: nn.Module) -> None:
    """Lightning's StochasticWeightAveraging: new tensors for the statistics, then one epoch with cumulative means."""
    momenta = {}
    for norm in norms_of(model):
        norm.running_mean, norm.running_var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
        momenta[norm], norm.momentum = norm.momentum, None
        norm.num_batches_tracked *= 0
    with torch.no_grad():
        for x in batches(3):
            model(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


def lightning_finetuning(model: nn.Module) -> None:
    """Lightning's BaseFinetuning.freeze(train_bn=False), some training, and make_trainable."""
    model.norm1.track_running_stats = False
    model.norm1.requires_grad_(False)
    train(model)
    model.norm1.track_running_stats = True
    model.norm1.requires_grad_(True)
    train(model)


def frozen_statistics(model: nn.Module) -> None:
    """Sets batch norms to eval mode in a network that trains.

    They are found by isinstance, as in detection libraries.
    """
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    for x in batches():
        model(x).square().mean().backward()


def precise_statistics(model: nn.Module) -> None:
    """fvcore's update_bn_stats: with momentum 1 the statistics are those of the batch; then their mean is written."""
    norms = norms_of(model)
    momenta, sums = [norm.momentum for norm in norms], [[0.0, 0.0] for _ in norms]
    for norm in norms:
        norm.momentum = 1.0
    for x in batches(3):
        model(x)
        sums = [[m + n.running_mean, v + n.running_var] for (m, v), n in zip(sums, norms, strict=True)]
    for norm, momentum, (mean, var) in zip(norms, momenta, sums, strict=True):
        norm.running_mean, norm.running_var, norm.momentum = mean / 3, var / 3, momentum


def test_time_adaptation(model: nn.Module) -> None:
    """TENT: batch statistics in eval mode too, and only the affine parameters are trained."""
    model.requires_grad_(False)
    for norm in norms_of(model):
        norm.requires_grad_(True)
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    train(model)


def initialization(model: nn.Module) -> None:
    """An initialisation function under ``apply``, and the hyperparameters that YOLO sets."""

    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
            module.eps, module.momentum = 0.3, 0.03

    model.apply(initialize)
    train(model)


def pruning(model: nn.Module) -> None:
    prune.l1_unstructured(model.norm1, "weight", amount=3)
    train(model)
    prune.remove(model.norm1, "weight")
    assert (model.norm1.weight == 0).sum() == 3


def without_running_statistics(model: nn.Module) -> None:
    assert torch.func.replace_all_batch_norm_modules_(model) is model
    assert all(norm.running_mean is None for norm in norms_of(model))
    train(model)


WORKING = [
    lightning_weight_averaging,
    lightning_finetuning,
    frozen_statistics,
    precise_statistics,
    test_time_adaptation,
    initialization,
    pruning,
    without_running_statistics,
]
test_time_adaptation.__test__ = False


@pytest.mark.parametrize("function", WORKING, ids=lambda function: function.__name__)
def test_works_as_on_torch_modules(function: Callable[[nn.Module], None]) -> None:
    """Afterwards gradients, state and outputs equal those of torch's network after the same function."""
    ours, theirs = pair()
    for model in (ours, theirs):
        function(model)
    assert sum(type(norm).__module__ == "bnkern.nn" for norm in norms_of(ours)) == 3
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, **CLOSE)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)
    x = batches(4)[3]
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shifted_average(model: nn.Module) -> nn.Module:
    """timm's ModelEma: a copy whose whole state is averaged with that of the model."""
    average = copy.deepcopy(model).eval()
    train(model)
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.copy_(0.7 * mean + 0.3 * value)
    return average


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "averaged copy": shifted_average,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_whole_networks(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """The copy computes and trains as torch's does, and shares no memory with the original."""
    models = []
    for model in pair():
        twin = duplicate(model)
        shared = {t.data_ptr() for t in model.state_dict().values()} & {
            t.data_ptr() for t in twin.state_dict().values()
        }
        assert not shared and repr(twin) == repr(model)
        train(twin)
        models.append(twin)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), **CLOSE)
    x = batches(3)[2]
    torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x), **CLOSE)


def test_functional_call_of_a_network() -> None:
    ours, theirs = pair()
    x = batches(3)[2]
    results = []
    for model in (ours, theirs):
        before = copy.deepcopy(model.state_dict())
        state = {key: value + 1 for key, value in before.items()}
        results.append([torch.func.functional_call(model, state, x), state])
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(*results, **CLOSE)


def test_parameter_groups_by_class() -> None:
    """torchvision's split_normalization_params and weight-decay filters by isinstance find the same parameters."""
    names = []
    for model in pair():
        results = set()
        for name, module in model.named_modules():
            if not any(module.children()) and isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                results |= {f"{name}.{key}" for key, _ in module.named_parameters()}
        names.append(results)
    assert names[0] == names[1] and len(names[0]) == 6


# --------------------------------------------------------------------------------- functions that would drop the ReLU


def timm_convert_sync_batchnorm() -> Callable[[nn.Module], nn.Module]:
    def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
        result = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            result = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum)
            result.weight, result.bias = module.weight, module.bias
        for name, child in module.named_children():
            result.add_module(name, convert_sync_batchnorm(child))
        return result

    return convert_sync_batchnorm


def timm_freeze_batch_norm_2d() -> Callable[[nn.Module], nn.Module]:
    def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.BatchNorm2d):
            frozen = nn.BatchNorm2d(module.num_features).eval().requires_grad_(False)
            frozen.weight.data, frozen.eps = module.weight.data.clone(), module.eps
            return frozen
        for name, child in module.named_children():
            module.add_module(name, freeze_batch_norm_2d(child))
        return module

    return freeze_batch_norm_2d


class FrozenBatchNorm2d(nn.Module):
    """Represents detectron2's class."""

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        for child in module.children():
            if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                return cls().register_buffer("weight", torch.ones(child.num_features))
        return module


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Represents the function of ultralytics."""
    conv.weight.data *= (bn.weight / (bn.running_var + bn.eps).sqrt()).view(-1, 1, 1, 1)
    return conv


def replace_batch_norm_of_transformers(model: nn.Module) -> nn.Module:
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    detr.replace_batch_norm(model)
    return model


SYNC = "call bnkern.nn.convert_sync_batchnorm instead"
SEPARATE = "set its act to None and put an nn.ReLU after it, or undo bnkern.convert with bnkern.revert, before"
REFUSED = {
    "torch convert_sync_batchnorm": (nn.SyncBatchNorm.convert_sync_batchnorm, SYNC),
    "torch fuse_conv_bn_eval": (lambda model: fuse_conv_bn_eval(*model), SEPARATE),
    "torch to_mkldnn": (mkldnn.to_mkldnn, SEPARATE),
    "timm convert_sync_batchnorm": (timm_convert_sync_batchnorm(), SYNC),
    "timm freeze_batch_norm_2d": (timm_freeze_batch_norm_2d(), SEPARATE),
    "detectron2 convert_frozen_batchnorm": (FrozenBatchNorm2d.convert_frozen_batchnorm, SEPARATE),
    "ultralytics fuse_conv_and_bn": (lambda model: fuse_conv_and_bn(*model), SEPARATE),
    "transformers replace_batch_norm": (replace_batch_norm_of_transformers, SEPARATE),
}


@pytest.mark.parametrize(("function", "advice"), REFUSED.values(), ids=REFUSED)
def test_refuses_to_lose_the_activation(function: Callable[[nn.Module], nn.Module], advice: str) -> None:
    """A TypeError names the function and the correct replacement, and the model still computes the same."""
    model = conv_and_norm()
    expected = model(X)
    with pytest.raises(TypeError, match=r"would drop the activation of a BatchNorm2d\(act='relu'\)") as caught:
        function(model)
    assert str(caught.value).endswith(advice)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", REBUILDERS)
def test_every_listed_name_is_refused(name: str) -> None:
    """A function with that name that reads a hyperparameter is refused, in every module that defines it."""
    code = unlisted.__code__.replace(co_name=name.rpartition(".")[2], co_qualname=name)
    with pytest.raises(TypeError, match=f"{re.escape(name)} would drop the activation"):
        types.FunctionType(code, {"nn": nn})(bnkern.nn.BatchNorm2d(8, act="relu"))


def test_refuses_to_fold_into_a_linear_layer() -> None:
    linear, norm = nn.Linear(3, 8).eval(), bnkern.nn.BatchNorm1d(8, act="relu").eval()
    with pytest.raises(TypeError, match=r"fuse_linear_bn_eval would drop the activation of a BatchNorm1d"):
        fuse_linear_bn_eval(linear, norm)
    norm.act = None
    x = torch.randn(5, 3)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, norm)(x), norm(linear(x)))


def test_a_refused_conversion_leaves_the_function_as_it_was() -> None:
    """torch's converter replaces modules one by one. Those before the refused one are converted and correct."""
    model = nn.Sequential(*conv_and_norm(act=None), nn.Conv2d(8, 8, 1), bnkern.nn.BatchNorm2d(8, act="relu")).eval()
    expected = model(X)
    with pytest.raises(TypeError, match="would drop the activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm and type(model[3]) is bnkern.nn.BatchNorm2d
    torch.testing.assert_close(model(X), expected)


def test_refuses_synchronized_ones_and_converted_models() -> None:
    """bnkern's SyncBatchNorm is protected too, and so are modules fused by bnkern.convert, until they are reverted."""
    with pytest.raises(TypeError, match=r"a SyncBatchNorm\(act='relu'\): call bnkern.nn.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(bnkern.nn.SyncBatchNorm(8, act="relu"))
    model = bnkern.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    assert model[1].act == "relu"
    expected = model(X)
    with pytest.raises(TypeError, match="would drop the activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(bnkern.revert(model))
    assert type(model[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(model(X), expected)


def test_torch_conversion_without_an_activation() -> None:
    """Without ``act`` torch's converter is correct. Its class takes no residual and raises an error for one."""
    model = conv_and_norm(act=None)
    expected, conv_output = model(X), model[0](X)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(TypeError, match=r"forward\(\) takes 2 positional arguments but 3 were given"):
        model[1](conv_output, conv_output)
    with pytest.raises(TypeError, match="unexpected keyword argument 'residual'"):
        model[1](conv_output, residual=conv_output)


@pytest.mark.parametrize("conv", [nn.Conv2d, bnkern.nn.Conv2d], ids=["torch Conv2d", "bnkern Conv2d"])
def test_folding_without_an_activation(conv: type[nn.Conv2d]) -> None:
    model = conv_and_norm(act=None, conv=conv)
    folded = fuse_conv_bn_eval(*model)
    assert type(folded) is conv
    torch.testing.assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)
    if torch.backends.mkldnn.is_available():
        twin = mkldnn.to_mkldnn(copy.deepcopy(model))
        torch.testing.assert_close(twin(X.to_mkldnn()).to_dense(), model(X), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ readers that are not listed


def unlisted(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    return nn.GroupNorm(2, norm.num_features, norm.eps)


def test_unlisted_readers_are_warned() -> None:
    """The warning names the attribute, and its location is the line that reads it."""
    norm = bnkern.nn.BatchNorm2d(8, eps=0.25, act="relu")
    with pytest.warns(UserWarning, match=r"unlisted reads (eps|num_features) of a BatchNorm2d\(act='relu'\)") as caught:
        group_norm = unlisted(norm)
    assert [str(w.message).split()[2] for w in caught] == ["num_features", "eps"]
    assert {w.filename for w in caught} == {__file__}
    assert (group_norm.num_channels, group_norm.eps) == (8, 0.25)
    with pytest.warns(UserWarning, match="<lambda> reads num_features"):
        (lambda module: nn.GroupNorm(2, module.num_features))(norm)


class Subclass(bnkern.nn.BatchNorm2d):
    def shrunk(self) -> float:
        return self.eps / self.num_features


def write_eps(norm: nn.BatchNorm2d, eps: float) -> None:
    norm.eps = eps


def test_readers_that_are_not_warned() -> None:
    """Methods of the module, writes, code that reads all attributes, and modules without ``act`` cause no warning."""
    norm = Subclass(8, eps=0.25, act="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm.shrunk() == 0.25 / 8
        write_eps(norm, 0.5)
        assert operator.attrgetter("eps")(norm) == vars(norm)["eps"] == 0.5
        assert dict(inspect.getmembers(norm))["num_features"] == 8
        assert "8, eps=0.5" in repr(norm)
        norm.act = None
        assert unlisted(norm).num_channels == 8
    with pytest.raises(ValueError, match="eps"):
        bnkern.nn.BatchNorm2d(8, eps=-1.0, act="relu")(torch.randn(4, 8, 2, 2))


def test_compiled_code_that_reads_hyperparameters() -> None:
    norm = bnkern.nn.BatchNorm2d(8, eps=0.25, act="relu").eval()
    x = torch.randn(2, 8, 3, 3)
    compiled = torch.compile(lambda x: norm(x) * norm.eps, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x) * 0.25)
    norm.eps = 0.5
    torch.testing.assert_close(compiled(x), norm(x) * 0.5)
