"""Chains of convolutions and batch norms: modules, against the same modules called one by one."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnkern
import bnkern.nn.chain as fused
from bnkern import probes
from bnkern.backends import cpu
from bnkern.nn import Chain, ChainLink, ConvBNAct, run_chain
from bnkern.train.resnet import ResNet
from tests.support.conv_norm import last


@pytest.fixture(autouse=True)
def any_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules require vector instructions, but the kernels run on every machine."""
    monkeypatch.setattr(cpu._native, "isa", lambda: "avx512")


def is_fused(y: Tensor) -> bool:
    seen, functions = set(), [y.grad_fn]
    while functions:
        function = functions.pop()
        if function is not None and function not in seen:
            seen.add(function)
            functions += [f for f, _ in function.next_functions]
    return any(type(f).__name__ == "_ChainBackward" for f in seen)


class Block(nn.Module):
    """Two convolutions with a residual, at half the resolution and with a projection if ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvBNAct(inputs, outputs, stride=stride)
        self.second = ConvBNAct(outputs, outputs)
        self.shortcut = ConvBNAct(inputs, outputs, 1, stride, act=None) if stride > 1 else nn.Identity()

    def chain_links(self) -> list[ChainLink] | None:
        if not isinstance(self.shortcut, nn.Identity):
            return None
        return [
            ChainLink(self.first.conv, self.first.norm),
            ChainLink(self.second.conv, self.second.norm, residual=0),
        ]

    def start_chain(self, x: Tensor) -> tuple[Tensor, list[ChainLink]]:
        return self.first(x), [ChainLink(self.second.conv, self.second.norm, self.shortcut(x))]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), self.shortcut(x))


def network() -> Chain:
    torch.manual_seed(0)
    layers = [ConvBNAct(16, 16), Block(16, 16), Block(16, 16), Block(16, 32, 2), Block(32, 32), nn.Identity()]
    return Chain(*layers, ConvBNAct(32, 64, act=None)).to(memory_format=torch.channels_last)


def images(n: int = 6) -> Tensor:
    return last(torch.randn(n, 16, 32, 32, generator=torch.Generator().manual_seed(1)))


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(last(torch.linspace(-1, 1, y.numel()).view(y.shape)))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return y, gradients | {"x": x.grad, "y": y.detach()} | dict(model.named_buffers())


def one_by_one(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels_for", lambda x: None)
        return run(model, x)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("n", [4, 5, 16])
def test_bits_of_the_modules_one_by_one(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, gradients, running statistics and counters."""
    model = network()
    other = copy.deepcopy(model)
    for _ in range(2):
        y, results = run(model, images(n))
        other_y, expected = one_by_one(other, images(n), monkeypatch)
        assert is_fused(y) and not is_fused(other_y)
        equal(results, expected)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_options_of_the_norms(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Chain(
        ConvBNAct(16, 32, momentum=momentum, eps=0.1), ConvBNAct(32, 16, act=None, momentum=momentum), ConvBNAct(16, 16)
    ).to(memory_format=torch.channels_last)
    model[0].norm = bnkern.nn.BatchNorm2d(32, affine=False, momentum=momentum, act="relu")
    model[2].norm = bnkern.nn.BatchNorm2d(16, track_running_stats=False)
    other = copy.deepcopy(model)
    for _ in range(2):
        y, results = run(model, images())
        equal(results, one_by_one(other, images(), monkeypatch)[1])
    assert is_fused(y)


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_with_a_bias(training: bool) -> None:
    """Against torch's modules in float64: output, gradients, the running statistics. The gradient of the bias is 0."""
    torch.manual_seed(0)
    options = {"act": None}  # no value is near 0, where rounding changes the mask of a ReLU
    model = Chain(
        ConvBNAct(16, 32, **options), ConvBNAct(32, 16, momentum=None, **options), ConvBNAct(16, 16, **options)
    )
    for part, channels in zip(model, ((16, 32), (32, 16), (16, 16)), strict=True):
        part.conv = nn.Conv2d(*channels, 3, padding=1)
        nn.init.normal_(part.conv.bias)
    model.to(memory_format=torch.channels_last)
    run(model, images())
    model.train(training)
    truth = copy.deepcopy(model).double()
    y, results = run(model, images())
    other_y, expected = run(truth, images().double())
    assert is_fused(y) and not is_fused(other_y)
    for name, actual in results.items():
        if training and name.endswith("conv.bias"):
            assert not actual.any() and expected[name].abs().max() < 1e-9
        else:
            assert (actual - expected[name]).abs().max() <= 2e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize(("earlier", "lengths"), [(1, [2, 1, 1]), (2, [1, 1, 1, 1])])
def test_only_some_links_are_served(earlier: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of three channels, one with a hook, one of another class, and residuals from within one chain."""
    torch.manual_seed(0)
    parts = [ConvBNAct(*channels) for channels in ((3, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 16))]
    parts = [part.to(memory_format=torch.channels_last) for part in parts]
    parts[4].norm.register_forward_hook(lambda module, args, y: None)
    links = [ChainLink(part.conv, part.norm) for part in parts]
    links[3] = links[3]._replace(residual=earlier)
    links[5] = links[5]._replace(residual=3)  # value 3 ends a chain, and then value 2 may end one too
    links.append(ChainLink(nn.Sequential(parts[1].conv), parts[1].norm))
    sizes, results = [], []
    found = fused.chain
    monkeypatch.setattr(fused, "chain", lambda x, links, kernels: sizes.append(len(links)) or found(x, links, kernels))
    for serves in (True, False):
        with monkeypatch.context() as patch:
            if not serves:
                patch.setattr(fused, "kernels_for", lambda x: None)
            y = run_chain(images()[:, :3].contiguous(memory_format=torch.channels_last), links)
        results.append([y, *torch.autograd.grad(y.square().sum(), [p for part in parts for p in part.parameters()])])
    assert sizes == lengths
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_skipped_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    bnkern.nn.skip_nonfinite(model)
    other = copy.deepcopy(model)
    bad = images()
    bad[0, 0, 0, 0] = torch.inf
    for x in (images(), bad):
        run(model, x)
        one_by_one(other, x, monkeypatch)
        equal(dict(model.named_buffers()), dict(other.named_buffers()))
    assert all(m.num_batches_skipped == 1 for m in model.modules() if isinstance(m, bnkern.nn.BatchNorm2d))


def test_only_some_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some norms and a convolution are frozen."""
    model = network()
    for part in (model[0].norm, model[1].second.norm, model[2].first.conv):
        part.requires_grad_(False)
    y = model(images())
    assert is_fused(y)
    y.sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels_for", lambda x: None)
        model(images()).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (expected[name] is None) == (not p.requires_grad)
        assert p.grad is None or torch.equal(p.grad, expected[name]), name


def _eval(model: nn.Module) -> None:
    model.eval()


def _partly_frozen(model: nn.Module) -> None:
    """Some norms in eval mode between others in training, and frozen parameters."""
    bnkern.nn.freeze_statistics(model[1])
    model[2].second.norm.eval().requires_grad_(False)
    model[2].first.conv.requires_grad_(False)


@pytest.mark.parametrize("prepare", [_eval, bnkern.nn.freeze_statistics, _partly_frozen])
def test_running_statistics(prepare: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval mode and with frozen statistics: output, gradients and buffers have the bits of the modules."""
    model = network()
    run(model, images())  # so that the running statistics are not 0 and 1
    prepare(model)
    other = copy.deepcopy(model)
    y, results = run(model, images())
    other_y, expected = one_by_one(other, images(), monkeypatch)
    assert is_fused(y) and not is_fused(other_y)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(results.pop(name) is expected.pop(name) is None for name in frozen)
    equal(results, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(mode: Callable, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and values that no later link needs are freed: the peak is a part of all values."""
    model = network().train(training)
    other, calls = copy.deepcopy(model), []
    kernels = fused.kernels_for(images())
    monkeypatch.setattr(kernels, "conv_norm_forward", _counted(kernels.conv_norm_forward, calls))
    with mode():
        y = model(images())
    assert y.grad_fn is None and len(calls) == 9
    expected = other(images())
    assert torch.equal(y, expected)
    equal(dict(model.named_buffers()), dict(other.named_buffers()))
    living = [reference() is not None for call in calls[:9] for reference in call]
    assert not any(living[:-1])


def _counted(function: Callable, calls: list) -> Callable:
    """``function``, which appends weak references to the tensors of each call's results."""

    def counted(*args: object) -> tuple:
        results = function(*args)
        calls.append([weakref.ref(t) for t in results[:3] if t is not None])
        return results

    return counted


def test_second_derivatives_in_eval_mode() -> None:
    """Against torch's modules in float64."""
    torch.manual_seed(0)
    model = Chain(*(ConvBNAct(16, 16, act=None) for _ in range(3))).to(memory_format=torch.channels_last)
    run(model, images())
    model.eval()
    _compare_second_derivatives(model)


def test_residuals_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is used twice, the chain's input, and two other tensors."""
    torch.manual_seed(0)
    parts = [ConvBNAct(16, 16).to(memory_format=torch.channels_last) for _ in range(5)]
    results = []
    for serves in (True, False):
        x, first, second = (images(6).mul(k).requires_grad_() for k in (1, 2, 3))
        links = [
            ChainLink(part.conv, part.norm, residual)
            for part, residual in zip(parts, [None, 0, 1, first, 1], strict=True)
        ]
        links.append(ChainLink(parts[0].conv, parts[1].norm, second))
        with monkeypatch.context() as patch:
            if not serves:
                patch.setattr(fused, "kernels_for", lambda x: None)
            y = run_chain(x, links)
        assert is_fused(y) is serves
        parameters = [p for part in parts for p in part.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, first, second, *parameters], allow_unused=True)])
    for actual, expected in zip(*results, strict=True):
        # A convolution that is used twice has two gradients, which autograd adds in the order of the functions.
        assert actual is expected is None or torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives() -> None:
    """Against torch's modules in float64."""
    torch.manual_seed(0)
    model = Chain(*(ConvBNAct(16, 16, act=None) for _ in range(3))).to(memory_format=torch.channels_last)
    _compare_second_derivatives(model)


def _compare_second_derivatives(model: Chain) -> None:
    truth = copy.deepcopy(model).double()
    results = []
    for module, x in ((model, images()), (truth, images().double())):
        x = x.requires_grad_()
        y = module(x)
        assert is_fused(y) is (module is model)
        (first,) = torch.autograd.grad(y.sigmoid().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, module[0].conv.weight]))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


NOT_FUSED = {
    "hooks": lambda model, x: ([m.register_forward_hook(lambda *_: None) for m in model.modules()] and model, x),
    "contiguous": lambda model, x: (model.to(memory_format=torch.contiguous_format), x.contiguous()),
    "few tiles": lambda model, x: (model, last(x[:1, :, :8, :8])),
    "float64": lambda model, x: (model.double(), x.double()),
    "other class": lambda model, x: (_with_subclass(model), x),
}


def _with_subclass(model: nn.Module) -> nn.Module:
    class Norm(bnkern.nn.BatchNorm2d):
        pass

    for module in model.modules():
        if type(module) is bnkern.nn.BatchNorm2d:
            module.__class__ = Norm
    return model


@pytest.mark.parametrize("case", NOT_FUSED)
def test_calls_that_are_not_fused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NOT_FUSED[case](network(), images())
    y = model(x)
    assert not is_fused(y)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels_for", lambda x: None)
        assert torch.equal(y, model(x))


def test_contexts_that_are_not_fused() -> None:
    model, x = network(), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(model(x))
    with bnkern.use_backend("reference"):
        assert not is_fused(model(x))
    graph = torch.fx.symbolic_trace(model)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) > 10
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def test_hooks_and_probes_get_the_values_between() -> None:
    """A hook or a probe on one block stops the fusion of that block only, and changes no bit."""
    model = network()
    expected = copy.deepcopy(model)(images())
    found = []
    handle = model[1].second.norm.register_forward_hook(lambda module, args, y: found.append(y))
    y = model(images())
    assert is_fused(y) and torch.equal(y, expected) and found[0].shape == (6, 16, 32, 32)
    handle.remove()
    module_handle = model[2].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    assert torch.equal(model(images()), expected) and found[1].shape == (6, 16, 32, 32)
    module_handle.remove()


QUANTITIES = ["activation_moments", "gradient_channel_signs", "affine_gradient_signs", "norm_gradient_noise"]


def test_a_recorded_step_is_fused_and_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ResNet(8).to(memory_format=torch.channels_last)
    x = last(torch.randn(8, 3, 32, 32))
    recorded = copy.deepcopy(model)
    separate, found = copy.deepcopy(model), []
    model(x).square().sum().backward()
    for network, serves in ((recorded, True), (separate, False)):
        with monkeypatch.context() as patch, probes.record(network, QUANTITIES, out=tmp_path / str(serves)) as recorder:
            if not serves:
                patch.setattr(fused, "kernels_for", lambda x: None)
            y = network(x)
            assert is_fused(y) is serves
            y.square().sum().backward()
            recorder.step()
        found.append(probes.load(tmp_path / str(serves)))
    for one, other in zip(model.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for quantity in QUANTITIES:
        for layer in found[0][quantity]:
            for name, values in found[0][quantity][layer].items():
                expected = torch.as_tensor(found[1][quantity][layer][name])
                torch.testing.assert_close(torch.as_tensor(values), expected, rtol=1e-4, atol=1e-3)


def test_samples_of_large_images_are_not_recorded_in_chains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain(ConvBNAct(16, 16), ConvBNAct(16, 16)).to(memory_format=torch.channels_last)
    x = last(torch.randn(2, 16, 48, 48))
    expected = copy.deepcopy(model)(x)
    with probes.record(model, ["norm_gradient_noise"], probes.every(2), tmp_path / "probes") as recorder:
        for fuses in (False, True):
            y = model(x)
            y.sum().backward()
            recorder.step()
            assert is_fused(y) is fuses
            if not fuses:
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_retained_graph_and_accumulation() -> None:
    model, x = network(), images()
    y = model(x)
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    y.sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_changed_operands_are_an_error() -> None:
    model, x = network(), images()
    y = model(x)
    with torch.no_grad():
        model[0].conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint() -> None:
    """The recomputation updates no running statistics."""
    model = network()
    other = copy.deepcopy(model)
    run(model, images())
    run(nn.Sequential(other), images())
    x = images().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(other, x, use_reentrant=False)
    y.sum().backward()
    model(images()).sum().backward()
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_state_dict_of_conv_bn_act() -> None:
    module = ConvBNAct(16, 32, 3, 2)
    theirs = nn.Sequential()
    theirs.conv, theirs.norm = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
    theirs.load_state_dict(module.state_dict())
    x = images()
    torch.testing.assert_close(module(x), theirs(x).relu())
    assert module(x, torch.ones(6, 32, 16, 16)).min() >= 0 and "relu" in repr(module)


def test_the_resnet_is_fused() -> None:
    torch.manual_seed(0)
    model = ResNet(20).to(memory_format=torch.channels_last)
    y = model(last(torch.randn(16, 3, 32, 32)))
    functions, counted = [y.grad_fn], set()
    while functions:
        function = functions.pop()
        if function is not None and function not in counted:
            counted.add(function)
            functions += [f for f, _ in function.next_functions]
    names = [type(f).__name__ for f in counted]
    assert names.count("_ChainBackward") == 3 and names.count("_BatchNormBackward") == 5
