"""One training step that runs completely on the device: batch, forward, loss, backward, metrics, update.

The host reads nothing back. On a GPU it therefore runs ahead of the device, and the step can be recorded once as a CUDA
graph and replayed. The values that change from step to step are in tensors whose memory stays the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .cifar10 import Batches
from .config import Config

LIMIT = 1e3  # a loss above it after step 0 is a divergence, as in the paper
WARM_UP = 3  # steps before a CUDA graph is recorded, which torch requires; their effects are undone


class Step:
    """A call trains on the batch with the number ``index``.

    The update is SGD with momentum: v = momentum v + (gradient + weight_decay p), p = p - lr v. It uses the kernel of
    torch.optim.SGD, which updates many parameters in one launch. Without momentum there are no velocities v. After the
    first loss that is above :data:`LIMIT` or not finite, further steps change neither parameters nor velocities nor
    ``before``. They still update the running statistics of batch norm.

    Args:
        model: The network: ``network``, or its wrapper for compilation or several processes.
        network: The plain module, whose parameters are trained.
        batches: The training batches, on the network's device.
        config: The settings of the run.
        probe: Called with the loss after each backward.

    Attributes:
        lr: float32 scalar, the learning rate, which the host sets.
        index: int64 scalar, the number of the next batch in its epoch.
        taken: int64 scalar, the number of steps so far.
        diverged: int64 scalar, the step whose loss was too large, or -1.
        ring: float64 [log_every, 2]. Row ``step % log_every`` has the mean loss and the number of right answers of a
            step, over all processes.
        before: float [number of parameters], all parameters in order, before the last update.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        batches: Batches,
        config: Config,
        probe: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._model, self._network, self._batches, self._config, self._probe = model, network, batches, config, probe
        self._parameters: list[Tensor] = list(network.parameters())
        device = batches.device
        options: dict[str, Any] = {"dtype": batches.dtype, "device": device, "memory_format": batches.memory_format}
        self._images = torch.empty(batches.shape, **options)
        self._labels = torch.empty(batches.shape[:1], dtype=torch.int64, device=device)
        self._velocity = [torch.zeros_like(parameter) for parameter in self._parameters if config.momentum]
        self._stop = torch.zeros((), device=device)  # 1 after a divergence, for the argument found_inf of the update
        self.lr = torch.zeros((), device=device)
        self.index, self.taken = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.diverged = torch.full((), -1, device=device)
        self.ring = torch.zeros(config.log_every, 2, dtype=torch.float64, device=device)
        self.before = self._flat()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph:
            self._graph.replay()
        else:
            self._run()

    def record(self) -> None:
        """Records the step as a CUDA graph, which later calls replay. The state is not changed."""
        state = [*self.state_dict().values(), *self._network.state_dict().values()]
        saved = [t.clone() for t in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.index.zero_()  # the next index could be past the end of the epoch
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph
        for t, value in zip(state, saved, strict=True):
            t.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on, except the network: the tensors themselves, by name."""
        velocity = {f"velocity.{i}": v for i, v in enumerate(self._velocity)}
        names = ("lr", "index", "taken", "diverged", "ring", "before")
        return {name: getattr(self, name) for name in names} | {"stop": self._stop} | velocity

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies the values of a :meth:`state_dict` into the tensors of this step."""
        for name, t in self.state_dict().items():
            t.copy_(state[name])

    def before_by_name(self) -> dict[str, Tensor]:
        """Returns the values in ``before`` by the names of the parameters."""
        parts = self.before.split([parameter.numel() for parameter in self._parameters])
        named = zip(self._network.named_parameters(), parts, strict=True)
        return {name: part.view(parameter.shape) for (name, parameter), part in named}

    def _run(self) -> None:
        self._batches.fill(self.index, self._images, self._labels)
        for parameter in self._parameters:
            parameter.grad = None
        with autocast(self._config, self._images.device):
            logits = self._model(self._images)
        loss = loss_of(logits, self._labels)
        loss.backward()
        if self._probe:
            self._probe(loss)
        with torch.no_grad():
            self._measure(loss, logits)
            self._update()

    def _measure(self, loss: Tensor, logits: Tensor) -> None:
        metrics = torch.stack([loss.double(), (logits.argmax(1) == self._labels).sum().double()])
        if dist.is_initialized():
            dist.all_reduce(metrics)  # all processes must stop at the same step
            metrics[0] /= dist.get_world_size()
        self.ring.index_copy_(0, (self.taken % len(self.ring)).view(1), metrics.view(1, 2))
        bad = ~metrics[0].isfinite() | ((metrics[0] > LIMIT) & (self.taken > 0))
        self.diverged.copy_(torch.where(bad & (self.diverged < 0), self.taken, self.diverged))
        self._stop.copy_(self.diverged >= 0)

    def _update(self) -> None:
        torch.where(self._stop > 0, self.before, self._flat(), out=self.before)
        grads: list[Tensor] = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "the loss must depend on every parameter"
            assert _laid_out_alike(parameter, parameter.grad), "the kernel of the update ignores strides"
            grads.append(parameter.grad)
        torch._fused_sgd_(
            self._parameters,
            grads,
            self._velocity,
            lr=self.lr,
            momentum=self._config.momentum,
            weight_decay=self._config.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # a velocity of zero has the same effect as a first step
            found_inf=self._stop,
        )
        self.taken += 1
        self.index += 1

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters])


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy, in float32 if the logits are bfloat16."""
    logits = logits.float() if logits.dtype is torch.bfloat16 else logits
    return F.cross_entropy(logits, labels, reduction=reduction)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or any(
        a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f)
        for f in (torch.contiguous_format, torch.channels_last)
        if a.dim() == 4 or f is torch.contiguous_format
    )
