"""FullyShardedDataParallel, mixed precision under either FSDP, and statistics averaged over ranks, over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import bnkern
from tests.nn.sync_nets import Net, net, random_batches, train
from tests.support.ranks import Ranks, rank_parts

POLICIES = {
    "one unit": None,
    "each torch BatchNorm2d": {nn.BatchNorm2d, nn.Conv2d},
    "each bnkern BatchNorm2d": {bnkern.nn.BatchNorm2d},
}


def train_fully_sharded(batches: list[tuple[Tensor, Tensor]], policy: str, group: dist.ProcessGroup) -> dict:
    classes = POLICIES[policy]
    model = FullyShardedDataParallel(
        net(),
        process_group=group,
        auto_wrap_policy=classes and ModuleWrapPolicy(classes),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    wrapped = sum(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    assert (wrapped > 1) == bool(classes)
    outputs = train(model, batches, 1.0)["outputs"]
    with FullyShardedDataParallel.summon_full_params(model):
        return {"outputs": outputs, "state": {k: v.clone() for k, v in model.module.state_dict().items()}}


@pytest.mark.parametrize("policy", POLICIES)
def test_fully_sharded_data_parallel(ranks: Ranks, policy: str) -> None:
    """The first FSDP: outputs and parameters equal those of plain networks whose gradients are averaged by the test."""
    parts = random_batches((3, 5))
    results = ranks.run(train_fully_sharded, [(batches, policy) for batches in parts])
    models = [net() for _ in parts]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in models]
    for k, step in enumerate(zip(*parts, strict=True)):
        for model, result, (x, target) in zip(models, results, step, strict=True):
            y = model(x)
            torch.testing.assert_close(result["outputs"][2 * k], y, rtol=1e-10, atol=1e-10)
            model.zero_grad()
            (y - target).square().sum().backward()
        for ps in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in ps) / len(ps)
            for p in ps:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    for model, result in zip(models, results, strict=True):
        state = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in result["state"].items()}
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-10, atol=1e-10)


class ByKeyword(Net):
    """The same network, which passes the residual by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.last(self.conv(x), residual=x).mean((2, 3)))


def without_head(kind: type[Net]) -> Net:
    """In float32, and without torch's batch norm, whose CPU kernel does not take a bfloat16 weight with float32
    buffers.
    """
    torch.manual_seed(0)
    model = kind().float()
    model.head = nn.Identity()
    return model


def mixed_precision(x: Tensor, kind: type[Net], wrapper: str, group: dist.ProcessGroup) -> tuple:
    """The dtypes at the first batch norm, and the output or the text of the error."""
    model, recorded = without_head(kind), []
    model.first.register_forward_hook(
        lambda norm, args, y: recorded.extend((args[0].dtype, norm.weight.dtype, y.dtype))
    )
    if wrapper == "fully_shard":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        model = fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), mp_policy=policy)
    else:
        model = FullyShardedDataParallel(
            model,
            process_group=group,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(torch.bfloat16, torch.bfloat16, torch.float32),
            auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d}) if wrapper == "FSDP with a policy" else None,
        )
    try:
        y = model(x)
    except TypeError as error:
        return recorded, str(error)
    y.float().square().sum().backward()
    return recorded, y.detach()


@pytest.mark.parametrize("kind", [Net, ByKeyword], ids=["positional", "keyword"])
@pytest.mark.parametrize("wrapper", ["fully_shard", "FSDP", "FSDP with a policy"])
def test_mixed_precision(ranks: Ranks, wrapper: str, kind: type[Net]) -> None:
    """FSDP with a policy keeps batch norms in float32 and casts only positional arguments. Mixed dtypes are refused."""
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    parts = [part for (part,) in rank_parts([x], (4, 4))]
    results = ranks.run(mixed_precision, [(part, kind, wrapper) for part in parts])
    for part, (recorded, y) in zip(parts, results, strict=True):
        if wrapper == "FSDP with a policy" and kind is ByKeyword:
            assert y == "batch_norm: residual must have the dtype of input, torch.float32, got torch.bfloat16"
            continue
        assert recorded == [torch.float32 if wrapper == "FSDP with a policy" else torch.bfloat16] * 3
        expected = without_head(Net)(part)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


def converted_after_sharding(convert: str, group: dist.ProcessGroup) -> str:
    model = net()
    fully_shard(model.first, mesh=DeviceMesh.from_group(group, "cpu"))
    package = {"ours": bnkern.nn, "torch's": nn.SyncBatchNorm}[convert]
    with pytest.raises((TypeError, ValueError)) as caught:
        package.convert_sync_batchnorm(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        ("ours", "convert_sync_batchnorm: first (FSDPBatchNorm2d) must not be sharded; call fully_shard afterwards"),
        ("torch's", "of a FSDPBatchNorm2d(act='relu'): call bnkern.nn.convert_sync_batchnorm instead"),
    ],
)
def test_conversion_after_fully_shard_is_refused(ranks: Ranks, convert: str, message: str) -> None:
    for text in ranks.run(converted_after_sharding, [(convert,)] * 2):
        assert text.endswith(message)


def averaged_statistics(x: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """timm's distribute_bn with reduce: finds buffers by name and averages them in place."""
    model = net()
    model(x)
    for name, buffer in model.named_buffers():
        if "running_mean" in name or "running_var" in name:
            dist.all_reduce(buffer, group=group)
            buffer /= float(dist.get_world_size(group))
    return {"y": model.eval()(x).detach(), "state": copy.deepcopy(model.state_dict())}


def test_statistics_averaged_over_ranks(ranks: Ranks) -> None:
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3)).double()
    parts = [part for (part,) in rank_parts([x], (5, 3))]
    results = ranks.run(averaged_statistics, [(part,) for part in parts])
    models = [net() for _ in parts]
    for model, part in zip(models, parts, strict=True):
        model(part)
    states = [model.state_dict() for model in models]
    mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0] if "running" in key}
    for model, part, result in zip(models, parts, results, strict=True):
        model.load_state_dict(mean, strict=False)
        torch.testing.assert_close(result["state"], dict(model.state_dict()), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["y"], model.eval()(part), rtol=1e-12, atol=1e-12)
