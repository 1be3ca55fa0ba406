"""One training step that runs completely on the device: batch, forward, loss, backward, metrics, update.

The host reads nothing back. On a GPU it therefore runs ahead of the device, and the step can be recorded once as a CUDA
graph and replayed. The values that change from step to step are in tensors whose memory stays the same.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .cifar10 import Batches
from .config import Config
from .sgd import Sgd

LIMIT = 1e3  # a loss above it after step 0 is a divergence, as in the paper
WARM_UP = 3  # steps before a CUDA graph is recorded, which torch requires; their effects are undone


class Step:
    """A call trains on the batch with the number ``index``.

    The update is :class:`.sgd.Sgd`, one kernel for all parameters, which become views of one tensor. After the first
    loss that is above :data:`LIMIT` or not finite, further steps change neither parameters nor velocities nor the
    parameters before the last update. They still update the running statistics of batch norm.

    Args:
        model: The network: ``network``, or its wrapper for compilation or several processes.
        network: The plain module, whose parameters are trained.
        batches: The training batches, on the network's device.
        config: The settings of the run.
        observers: Called with the loss after each backward.

    Attributes:
        lr: float32 scalar, the learning rate, which the host sets.
        index: int64 scalar, the number of the next batch in its epoch.
        taken: int64 scalar, the number of steps so far.
        diverged: int64 scalar, the step whose loss was too large, or -1.
        ring: float64 [log_every, 2]. Row ``step % log_every`` has the mean loss and the number of right answers of a
            step, over all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        batches: Batches,
        config: Config,
        observers: Iterable[Callable[[Tensor], None]] = (),
    ) -> None:
        self._model, self._network, self._batches, self._config = model, network, batches, config
        self._observers = list(observers)
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        shadowed = config.precision == "bf16" and not wrapped
        self._sgd = Sgd(network, config.momentum, config.weight_decay, shadowed)
        device = batches.device
        options: dict[str, Any] = {"dtype": batches.dtype, "device": device, "memory_format": batches.memory_format}
        self._images = torch.empty(batches.shape, **options)
        self._labels = torch.empty(batches.shape[:1], dtype=torch.int64, device=device)
        self._stop = torch.zeros((), device=device)  # 1 after a divergence
        self.lr = torch.zeros((), device=device)
        self.index, self.taken = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.diverged = torch.full((), -1, device=device)
        self.ring = torch.zeros(config.log_every, 2, dtype=torch.float64, device=device)
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
        self._sgd.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on, except the network: the tensors themselves, by name."""
        names = ("lr", "index", "taken", "diverged", "ring")
        state = {name: getattr(self, name) for name in names} | {"stop": self._stop}
        for name, flat in (("before", self._sgd.before), ("velocity", self._sgd.velocity)):
            parts = [] if flat is None else self._sgd.by_name(flat).values()
            state |= {f"{name}.{i}": part for i, part in enumerate(parts)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies the values of a :meth:`state_dict` into the tensors of this step. Load the network's before it."""
        if "before" in state:  # written by an earlier version: all parameters in one tensor
            before = self.before_by_name().values()
            parts = state["before"].split([t.numel() for t in before])
            whole = zip(parts, before, strict=True)
            state = state | {f"before.{i}": part.view(t.shape) for i, (part, t) in enumerate(whole)}
        for name, t in self.state_dict().items():
            t.copy_(state[name])
        self._sgd.refresh()

    def before_by_name(self) -> dict[str, Tensor]:
        """Returns the parameters before the last update, by their names."""
        return self._sgd.by_name(self._sgd.before)

    def velocity_by_name(self) -> dict[str, Tensor]:
        """Returns the velocities of the parameters by their names. There are none without momentum."""
        return {} if self._sgd.velocity is None else self._sgd.by_name(self._sgd.velocity)

    def _run(self) -> None:
        self._batches.fill(self.index, self._images, self._labels)
        self._sgd.zero_grad()
        with autocast(self._config, self._images.device), self._sgd.shadows():
            logits = self._model(self._images)
        loss = loss_of(logits, self._labels)
        loss.backward()
        for observe in self._observers:
            observe(loss)
        with torch.no_grad():
            self._measure(loss, logits)
            self._sgd(self.lr, self._stop)
            self.taken += 1
            self.index += 1

    def _measure(self, loss: Tensor, logits: Tensor) -> None:
        metrics = torch.stack([loss.double(), (logits.argmax(1) == self._labels).sum().double()])
        if dist.is_initialized():
            dist.all_reduce(metrics)  # all processes must stop at the same step
            metrics[0] /= dist.get_world_size()
        self.ring.index_copy_(0, (self.taken % len(self.ring)).view(1), metrics.view(1, 2))
        bad = ~metrics[0].isfinite() | ((metrics[0] > LIMIT) & (self.taken > 0))
        self.diverged.copy_(torch.where(bad & (self.diverged < 0), self.taken, self.diverged))
        self._stop.copy_(self.diverged >= 0)


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy, in float32 if the logits are bfloat16."""
    logits = logits.float() if logits.dtype is torch.bfloat16 else logits
    return F.cross_entropy(logits, labels, reduction=reduction)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
