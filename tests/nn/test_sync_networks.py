"""Whole networks with SyncBatchNorm, and with plain batch norms, under DDP and FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bnkern
from tests.nn.sync_nets import Net, net, random_batches, train
from tests.support.ranks import Ranks, rank_parts


def train_rank(batches: list[tuple[Tensor, Tensor]], weight: float, compiled: bool, group) -> dict:
    model = bnkern.nn.convert_sync_batchnorm(net(), group)
    assert sum(type(m) is bnkern.nn.SyncBatchNorm for m in model.modules()) == 3
    model = DistributedDataParallel(model, process_group=group)
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    # DDP averages the gradients of the ranks, and the gradient of the joint loss is their sum.
    result = train(model, batches, weight * dist.get_world_size(group))
    result["state"] = {k.removeprefix("_orig_mod.").removeprefix("module."): v for k, v in result["state"].items()}
    return result


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("split", [(4, 4), (6, 2), (5, 0, 3)], ids=str)
def test_network_under_ddp(ranks: Ranks, split: tuple[int, ...], compiled: bool) -> None:
    """After three steps of DDP the results are those of one process with the joint batch: 1e-10 in float64.

    DDP broadcasts the buffers by default.
    """
    if compiled and 0 in split:
        pytest.skip("an empty convolution cannot be compiled")
    parts = random_batches(split)
    arguments = [(batches, 1 / 8, compiled) for batches in parts]
    results = ranks.run(train_rank, arguments)
    joint = [tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)]
    joint = train(net(), joint, 1 / 8)
    assert results[0]["state"].keys() == joint["state"].keys()
    for name, value in joint["state"].items():
        for result in results:
            torch.testing.assert_close(result["state"][name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(result["state"][name], results[0]["state"][name])
    for k, expected in enumerate(joint["outputs"]):
        scale = 1 if k % 2 == 0 else len(split)  # the input's gradient is that of the loss that was given to DDP
        joined = torch.cat([r["outputs"][k] for r in results]) / scale
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10)


def two_forwards(x: Tensor, group) -> list[Tensor]:
    """Two calls before one backward, as in a siamese network. DDP broadcasts the buffers before each of them."""
    model = bnkern.nn.convert_sync_batchnorm(net(), group)
    model = DistributedDataParallel(model, process_group=group)
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    return [p.grad for p in model.parameters()]


def test_two_forwards_under_ddp(ranks: Ranks) -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2)).double()
    results = ranks.run(two_forwards, [(part,) for (part,) in rank_parts([x], (3, 5))])
    model = net()
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    for k, p in enumerate(model.parameters()):
        for grads in results:
            torch.testing.assert_close(2 * grads[k], p.grad, rtol=1e-10, atol=1e-10)


def fully_sharded(model: Net, group: dist.ProcessGroup) -> nn.Module:
    """FSDP2: each rank holds a part of every parameter, also of batch norms."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in (model.first, model.last, model.head, model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model.first.weight, DTensor)
    return model


def train_wrapped(batches: list[tuple[Tensor, Tensor]], wrapper: str, sync: bool, group) -> dict[str, Tensor]:
    model = bnkern.nn.convert_sync_batchnorm(net(), group) if sync else net()
    model = DistributedDataParallel(model, process_group=group) if wrapper == "ddp" else fully_sharded(model, group)
    state = train(model, batches, 1.0)["state"]
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_plain_batch_norms_in_wrappers(ranks: Ranks, wrapper: str) -> None:
    """Each rank normalises its own batch, gradients are averaged, and DDP copies the buffers of rank 0 before each
    step.
    """
    parts = random_batches((3, 5))
    results = ranks.run(train_wrapped, [(batches, wrapper, False) for batches in parts])
    models = [net() for _ in parts]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in models]
    for step_batches in zip(*parts, strict=True):
        if wrapper == "ddp":
            models[1].load_state_dict(models[0].state_dict())
        for model, (x, target) in zip(models, step_batches, strict=True):
            model.zero_grad()
            (model(x) - target).square().sum().backward()
        for ps in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in ps) / len(ps)
            for p in ps:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    for model, state in zip(models, results, strict=True):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)


def test_synchronized_network_under_fsdp(ranks: Ranks) -> None:
    """The results are those of one process with the joint batch, whose gradient FSDP divides by the number of ranks."""
    parts = random_batches((4, 4))
    results = ranks.run(train_wrapped, [(batches, "fsdp", True) for batches in parts])
    joint = [tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)]
    model = net()
    train(model, joint, 1 / 2)
    for name, value in model.state_dict().items():
        for state in results:
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)
