"""Functions of torch and other libraries that replace, copy, fold or inspect batch norms: right, or a clear error.

Functions of libraries that are not installed are written out in a few lines that read and write what theirs do.
"""

import copy
import inspect
import io
import operator
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.fx.experimental import optimization
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import mkldnn

import bnkern

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """BN -> ReLU, BN -> add -> ReLU and a plain BN in float64; ``fused`` chooses bnkern's modules or torch's."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        kind, act = (bnkern.nn, {"act": "relu"}) if fused else (nn, {})
        self.fused = fused
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), kind.BatchNorm2d(8, **act)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), kind.BatchNorm2d(8, **act)
        self.head, self.norm3 = nn.Linear(8, 4), kind.BatchNorm1d(4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = x if self.fused else x.relu()
        y = self.conv2(x)
        y = self.norm2(y, x) if self.fused else (self.norm2(y) + x).relu()
        return self.norm3(self.head(y.mean((2, 3))))


def pair() -> tuple[Net, Net]:
    """Ours and torch's network in the same state, after two steps of training."""
    torch.manual_seed(0)
    networks = Net(True), Net(False)
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        train(network)
    return networks


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 5, 5, generator=generator).double() for _ in range(count)]


def train(model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    model.train()
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def conv_and_norm(act: str | None = "relu", conv: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """A convolution and a batch norm in eval, with statistics of their own."""
    torch.manual_seed(2)
    model = nn.Sequential(conv(3, 8, 3), bnkern.nn.BatchNorm2d(8, act=act))
    for value in model[1].state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------- functions that must work as on torch's


def lightning_weight_averaging(model: nn.Module) -> None:
    """Lightning's StochasticWeightAveraging: new tensors for the statistics, then one epoch of cumulative means."""
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
    """Batch norms in eval inside a network that trains, chosen by isinstance, as detection libraries do."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    for x in batches():
        model(x).square().mean().backward()


def precise_statistics(model: nn.Module) -> None:
    """fvcore's update_bn_stats: momentum 1, so that a batch's own statistics can be read, and their mean put back."""
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
    """TENT: batch statistics in eval too, and nothing but the affine parameters trained."""
    model.requires_grad_(False)
    for norm in norms_of(model):
        norm.requires_grad_(True)
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    train(model)


def initialization(model: nn.Module) -> None:
    """An init function under ``apply``, and the hyperparameters that YOLO sets."""

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
    """Afterwards gradients, state and outputs are those of torch's network that went through the same."""
    ours, theirs = pair()
    for model in (ours, theirs):
        function(model)
    assert sum(type(norm).__module__ == "bnkern.nn" for norm in norms_of(ours)) == 3
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)
    x = batches(4)[3]
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shifted_average(model: nn.Module) -> nn.Module:
    """timm's ModelEma: a copy whose whole state is averaged with the model's."""
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
        found = set()
        for name, module in model.named_modules():
            if not any(module.children()) and isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                found |= {f"{name}.{key}" for key, _ in module.named_parameters()}
        names.append(found)
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
    """Stands for detectron2's class."""

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        for child in module.children():
            if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                return cls().register_buffer("weight", torch.ones(child.num_features))
        return module


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Stands for ultralytics' function."""
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
    """A TypeError names the function and what to call instead, and the model still computes what it did."""
    model = conv_and_norm()
    expected = model(X)
    with pytest.raises(TypeError, match=r"would drop the activation of a BatchNorm2d\(act='relu'\)") as caught:
        function(model)
    assert str(caught.value).endswith(advice)
    assert torch.equal(model(X), expected)


def test_refuses_to_fold_into_a_linear_layer() -> None:
    linear, norm = nn.Linear(3, 8).eval(), bnkern.nn.BatchNorm1d(8, act="relu").eval()
    with pytest.raises(TypeError, match=r"fuse_linear_bn_eval would drop the activation of a BatchNorm1d"):
        fuse_linear_bn_eval(linear, norm)
    norm.act = None
    x = torch.randn(5, 3)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, norm)(x), norm(linear(x)))


def test_refuses_synchronized_ones_and_converted_models() -> None:
    """bnkern's SyncBatchNorm is guarded too, and so is what bnkern.convert fused, until it is reverted."""
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
    """Without ``act`` torch's converter is right, but its class takes no residual and says so."""
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
    """The warning names the attribute and is attributed to the line that reads it."""
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
    """Methods of the module, writers, code that reads all attributes, and modules without ``act``."""
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


# ----------------------------------------------------------------------------------- tracing, quantisation, fx's fusers


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_jit_trace(training: bool, frozen: bool) -> None:
    """The trace holds the calls: on another input it gives that input's result, gradients and statistics."""
    ours, _ = pair()
    ours.train(training).requires_grad_(not frozen)
    state = copy.deepcopy(ours.state_dict())
    first, second = batches()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(copy.deepcopy(ours), first, check_trace=False)
    traced.load_state_dict(state)
    x, y = second.clone().requires_grad_(), second.clone().requires_grad_()
    one, other = traced(x), ours(y)
    torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(traced.state_dict(), dict(ours.state_dict()), **CLOSE)
    one.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **CLOSE)


def test_jit_trace_of_the_other_modules() -> None:
    first, second = (torch.randn(2, 3, 6, 6) for _ in range(2))
    conv = bnkern.nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.Sequential(bnkern.nn.Activation(), conv, bnkern.nn.SyncBatchNorm(3, act="relu").eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, first.to(memory_format=torch.channels_last))
    second = second.to(memory_format=torch.channels_last)
    torch.testing.assert_close(traced(second), model(second))


def gradient(model: Callable[..., Tensor], x: Tensor, residual: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    model(x, residual).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_gradients_of_a_graph_that_was_exported_without(strict: bool) -> None:
    """The ReLU's mask is kept for a backward that the exported graph was not asked for when it was made."""
    norm = bnkern.nn.BatchNorm2d(4, act="relu").eval().requires_grad_(False)
    x, residual = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(4)).unbind(0)
    exported = torch.export.export(norm, (x, residual), strict=strict).module()
    torch.testing.assert_close(gradient(exported, x, residual), gradient(norm, x, residual))


def test_gradients_of_a_graph_without_a_mask_are_refused() -> None:
    norm = bnkern.nn.BatchNorm2d(4, act="relu").eval().requires_grad_(False)
    x, residual = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(4)).unbind(0)
    graph = make_fx(norm)(x, residual)
    assert torch.equal(graph(x, residual), norm(x, residual))
    with pytest.raises(RuntimeError, match="recorded where no gradient was needed and keeps no ReLU mask"):
        gradient(graph, x, residual)


class LeafTracer(fx.Tracer):
    """Records calls of bnkern's modules as calls of modules."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__ == "bnkern.nn" or super().is_leaf_module(module, name)


@pytest.mark.parametrize("act", [None, "relu"])
def test_fx_fuser_leaves_it_alone(act: str | None) -> None:
    """torch.fx.experimental.optimization compares exact classes, so that it folds torch's own batch norms only."""
    model = nn.Sequential(conv_and_norm(act), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    fused = optimization.fuse(fx.GraphModule(model, LeafTracer().trace(model)), no_trace=True)
    kinds = {type(module) for module in fused.modules()}
    assert bnkern.nn.BatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    torch.testing.assert_close(fused(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"], ["1", "2"]], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["fuse_modules", "fuse_modules_qat"])
def test_fuse_modules_refuses(names: list[str], training: bool) -> None:
    """torch.ao.quantization names the classes that it has no fuser for."""
    model = nn.Sequential(*conv_and_norm(), nn.ReLU()).train(training)
    fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
    with pytest.raises((AssertionError, NotImplementedError), match=r"bnkern\.nn\.BatchNorm2d"):
        fuse(model, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", [None, "relu"])
def test_eager_quantisation_refuses(act: str | None) -> None:
    """Conversion finds no quantised class and leaves the batch norm, which then refuses the quantised tensor."""
    model = nn.Sequential(quantization.QuantStub(), *conv_and_norm(act), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(model)
    prepared(X)
    converted = quantization.convert(prepared)
    with pytest.raises(TypeError, match=r"batch_norm: input must be float32, .*, got torch\.qu"):
        converted(X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", [None, "relu"])
def test_fx_quantisation_keeps_it_in_floating_point(act: str | None) -> None:
    """As a class that is not traced it stays a float module between quantised convolutions, with its activation."""
    model = nn.Sequential(*conv_and_norm(act), nn.Conv2d(8, 4, 1)).eval()
    custom = PrepareCustomConfig().set_non_traceable_module_classes([bnkern.nn.BatchNorm2d])
    mapping = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (X,), prepare_custom_config=custom)
    prepared(X)
    converted = quantize_fx.convert_fx(prepared)
    kept = converted.get_submodule("1")
    assert type(kept) is bnkern.nn.BatchNorm2d and kept.act == act
    expected = model(X)
    assert (converted(X) - expected).abs().max() < 0.05 * (expected.max() - expected.min())
