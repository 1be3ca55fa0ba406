"""The training loop on the host: it runs :mod:`.step`, writes metrics and checkpoints, evaluates, and ends the run."""

import inspect
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import bnkern.nn
from bnkern.probes import FlightRecorder, truncate

from . import checkpoint
from .cifar10 import Batches, Cifar10, Split, split_validation
from .config import Config, learning_rate
from .resnet import ResNet
from .runlog import Metrics, Outcome, differing, environment, finished, outcome, put_aside, write_json
from .step import Step, autocast, loss_of

EVALUATION = 500  # images in one forward pass of an evaluation
IMPROVEMENT = 1e-4  # relative decrease of the loss that the plateau rule counts as an improvement

# The forward does not broadcast buffers, because batch norm over all ranks keeps them equal. Up to torch 2.12 the
# argument is called broadcast_buffers. From 2.13 on that name is deprecated.
_NAMES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNCS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"
NO_BUFFERS: dict[str, Any] = {_SYNCS: False}

# Makes a recorder for (network, folder, first step). The loop calls its methods step(loss) and flush(wait=True).
Probes = Callable[[nn.Module, Path, int], AbstractContextManager]


class Stopped(Exception):
    """Raised by the ``watch`` of :func:`train` to end a run before its last step. The run can be continued."""


def train(
    config: Config,
    folder: Path,
    data: Cifar10,
    device: torch.device | str = "cpu",
    *,
    probes: Probes | None = None,
    before_step: Callable[[nn.Module, int], None] | None = None,
    watch: Callable[[int], None] | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    flight_steps: int = 0,
) -> Outcome:
    """Does the run, or the rest of it, and writes the files that :mod:`.runlog` describes into ``folder``.

    A loss that is not finite, or above 1e3 after step 0, ends the run. This is a result, not an error: ``diverged.pt``
    (for :func:`.checkpoint.read`) then has

    - ``step``, and ``rng``, the state of torch's generator,
    - the parameters by name ``before`` and ``after`` the last update, which is that of step - 1,
    - its ``lr`` and (with momentum) ``velocity``, so that after = before - lr * velocity,
    - ``batches``: epoch, index, images and labels of step - 1 ("update") and of ``step`` ("shown").

    In several processes (torch.distributed initialised) each process makes its share of every batch. Batch norm runs
    over all of them, gradients are averaged, and only the process of rank 0 writes files.

    Args:
        config: the run.
        folder: of this run alone. If it has this run, unfinished, the run continues from its last checkpoint. A
            finished run is left as it is.
        data: the images. Their ``source`` must be the config's ``data``.
        device: where to train.
        probes: called in every process with the network, ``folder / "probes"`` and the step to start from; a context
            manager, as ``bnkern.probes.record`` makes it with ``first_step`` and ``append``. Where it decides on the
            device (``on_device``), the step is recorded as a graph together with it.
        before_step: called in every process with the network and the number of the next step, before each step and
            outside of its graph. It must leave parameters, gradients and buffers as they are.
        watch: called in every process with the number of finished steps, at every line of metrics except the last. If
            it raises :class:`Stopped`, the run first writes a checkpoint from which it continues with the same bits.
        resume: if False, an existing run is put aside and the run starts again.
        tensorboard: mirror the metrics in ``folder / "tensorboard"``.
        flight_steps: the number of steps that a flight recorder keeps (``bnkern.probes.flight_recorder``), or 0 for
            none. It writes its report into ``folder / "flight"`` if the run diverges, or ends by an exception. A run
            that continues from step N writes it into ``folder / "flight-from-N"``.

    Returns:
        How the run ended. On ranks other than 0: 0 steps, and None in the other fields.

    Raises:
        ValueError: The folder has another run, the data are not those of the config, or the config does not fit the
            number of processes.
        CheckpointError: There are checkpoints and none can be used.
        RuntimeError: ``tensorboard`` is set and TensorBoard is not installed.
        Stopped: ``watch`` has raised it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if data.source != config.data:
        raise ValueError(f"the run needs data={config.data!r}, but {data.source!r} was loaded")
    if world > 1 and config.kernels == "torch" and config.norm in ("batch", "final"):
        raise ValueError('kernels="torch" has no batch norm over several processes; use kernels="bnkern"')
    done, state = _open(folder, config, resume) if rank == 0 else (None, None)
    if world > 1:
        box = [done, state]
        dist.broadcast_object_list(box)  # the other processes may not share a file system with this one
        done, state = box  # type: ignore[assignment]  # a list's elements have one type
    if not done:
        device = torch.device(device)
        with numerics(config, device), ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            torch.manual_seed(config.seed)
            _Run(config, folder, data, device, probes, state, tensorboard, flight_steps, stack).train(
                before_step, watch
            )
    return outcome(folder) if rank == 0 else Outcome(0, None, None, None, None)


def _open(folder: Path, config: Config, resume: bool) -> tuple[bool, dict | None]:
    """Returns whether the run is finished, and the checkpoint from which it continues, or None."""
    if (folder / "config.json").exists():
        if not resume:
            put_aside(folder)
        elif finished(folder, config.to_dict()):
            return True, None
        elif names := differing(folder, config.to_dict()):
            raise ValueError(f"{folder} has another run (other {', '.join(names)}): use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    return False, checkpoint.load(folder / "checkpoint.pt", config.to_dict())


@dataclass
class _Host:
    """The state of a run on the host. A checkpoint contains it."""

    done: int = 0  # steps that are finished
    lr: float = 0.0  # of the last of these steps
    loss: float = 0.0  # sum over the steps of the epoch so far
    right: float = 0.0  # number of right answers in the epoch so far
    lowered: int = 0  # number of drops of the learning rate by the plateau rule
    best: float = float("inf")  # lowest loss of an epoch, for the plateau rule
    waited: int = 0  # epochs without improvement
    seconds: float = 0.0


class _Run:
    """One run in one process."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: Cifar10,
        device: torch.device,
        probes: Probes | None,
        state: dict | None,
        tensorboard: bool,
        flight_steps: int,
        stack: ExitStack,
    ) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.config, self.folder, self.device = config, folder, device
        self.data = data.to(device)
        self.network = build(config, device)
        if self.world > 1 and config.norm in ("batch", "final"):
            self.network = bnkern.nn.convert_sync_batchnorm(self.network)  # type: ignore[assignment]  # in place
        train, self.validation = self.data.train, None
        if config.validation:
            train, self.validation = split_validation(train, config.validation, 0)
        if len(train.labels) < config.batch:
            raise ValueError(f"a batch of {config.batch} is more than the {len(train.labels)} training images")
        self.host = _Host(**state["host"]) if state else _Host()
        self.split = train
        self.batches = batches_of(config, train, self.data, self.rank, self.world)
        self.steps = config.epochs * len(self.batches)

        self.recorder = None
        if probes:
            if state and self.rank == 0:
                truncate(folder / "probes", self.host.done)
            self.recorder = stack.enter_context(probes(self.network, folder / "probes", self.host.done))
        self.flight = _flight_recorder(self.network, flight_steps, folder, self.host.done, stack)
        model: nn.Module = self.network
        if config.compile:
            model = torch.compile(self.network)  # type: ignore[assignment]  # a module of a module
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model, **NO_BUFFERS)
        observers = [one.step for one in (self.recorder, self.flight) if one]
        self.step = Step(model, self.network, self.batches, config, observers)
        if state:
            self.restore(state)
        self.metrics: Metrics | None = None
        if self.rank == 0:
            self.metrics = Metrics(folder, self.host.done, tensorboard)
            stack.callback(self.metrics.close)

    def train(self, before_step: Callable[[nn.Module, int], None] | None, watch: Callable[[int], None] | None) -> None:
        config, host, step, per_epoch = self.config, self.host, self.step, len(self.batches)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        env = environment(self.device, config.kernels) | {"processes": self.world}
        if self.rank == 0:
            write_json(self.folder / "env.json", {"started": started, "seconds": None} | env)
        self.bar = tqdm(
            total=self.steps,
            initial=host.done,
            desc=config.title,
            unit="step",
            disable=self.rank > 0 or not sys.stderr.isatty(),
        )
        if host.done and self.rank == 0:
            self.say(f"{config.title}: continuing from step {host.done} of {self.steps}")
        self.resumed_at = self.looked = host.done  # looked: the step up to which the metrics were read
        self.rates: list[float] = []  # learning rates of the steps since then
        self.clock = self.epoch_clock = time.perf_counter()
        before = host.seconds - self.clock
        current = None
        for taken in range(host.done, self.steps):
            epoch, index = divmod(taken, per_epoch)
            if index == 0 or current is None:
                self.batches.start(epoch)
                step.index.fill_(index)
            rate = learning_rate(config, taken, self.steps, host.lowered)
            if rate != current:
                step.lr.fill_(rate)
                if current is None and self.recordable():
                    step.record()
                    for recorder in (self.recorder, self.flight):
                        if recorder:
                            recorder.rewind(host.done)  # discard the records of the warm-up steps
                current = rate
            self.rates.append(rate)
            if before_step:
                before_step(self.network, taken)
            step()
            host.done = taken + 1
            self.bar.update()
            ends = index == per_epoch - 1
            saves = config.checkpoint_every and host.done % config.checkpoint_every == 0
            if ends or saves or host.done % config.log_every == 0:
                diverged = self.look(epoch)
                if self.recorder and self.device.type == "cuda":
                    self.recorder.flush()  # a replayed graph cannot flush
                host.seconds = before + time.perf_counter()
                if diverged:
                    break
                if ends:
                    self.end_epoch(epoch)
                if ends or saves:
                    self.save()
                if watch and host.done < self.steps:
                    try:
                        watch(host.done)
                    except Stopped:
                        self.save()
                        raise
                self.clock = time.perf_counter()
        self.bar.close()
        if self.metrics is not None:  # on rank 0
            write_json(
                self.folder / "env.json", {"started": started, "seconds": round(before + time.perf_counter(), 2)} | env
            )
            self.metrics.sync()
            checkpoint.replace(self.folder / "DONE", b"")

    def recordable(self) -> bool:
        """Whether the step can be a CUDA graph: it runs on one GPU, and no part of it decides on the host."""
        decides_on_host = self.recorder is not None and not getattr(self.recorder, "on_device", False)
        return self.config.graph and self.device.type == "cuda" and self.world == 1 and not decides_on_host

    def look(self, epoch: int) -> bool:
        """Reads the metrics that are on the device and writes them. Returns whether the run has diverged."""
        ring, diverged = self.step.ring.tolist(), int(self.step.diverged.item())
        seconds = time.perf_counter() - self.clock
        end = self.host.done if diverged < 0 else diverged
        new_rows = [ring[taken % len(ring)] for taken in range(self.looked, end)]
        if new_rows:
            loss, right = (sum(column) for column in zip(*new_rows, strict=True))
            self.host.loss += loss
            self.host.right += right
            self.write(
                "train",
                end,
                epoch=epoch,
                loss=loss / len(new_rows),
                accuracy=right / len(new_rows) / self.config.batch,
                lr=self.rates[len(new_rows) - 1],
                images_per_second=round((self.host.done - self.looked) * self.config.batch / seconds, 1),
                diverged=False,
            )
        rates = [self.host.lr, *self.rates]  # the first one belongs to the step before those in self.rates
        if diverged >= 0:
            loss = ring[diverged % len(ring)][0]
            self.write("diverged", diverged, epoch=epoch, loss=loss, lr=rates[len(new_rows)], diverged=True)
            self.keep_divergence(diverged, rates[len(new_rows)])
            if self.rank == 0:
                self.say(f"{self.config.title}: diverged at step {diverged} with a loss of {loss:.4g}")
            if self.flight:
                report = self.flight.poll(wait=True) or self.flight.write(f"a loss of {loss:.4g}")
                self.say(f"{self.config.title}: {report.sentence} Report: {self.flight.folder}")
            return True
        self.bar.set_postfix(loss=f"{loss / len(new_rows):.3f}", refresh=False)
        self.host.lr = rates[-1]
        self.looked, self.rates = self.host.done, []
        return False

    def end_epoch(self, epoch: int) -> None:
        """Evaluates, writes the line of the epoch, and applies the plateau rule."""
        config, host, images = self.config, self.host, len(self.batches) * self.config.batch
        row = {"epoch": epoch, "train_loss": host.loss / len(self.batches), "train_accuracy": host.right / images}
        host.loss = host.right = 0.0
        seconds = time.perf_counter() - self.epoch_clock  # in a resumed epoch only the time since resuming
        if (epoch + 1) % config.evaluate_every == 0 or host.done == self.steps:
            row["test_loss"], row["test_accuracy"] = self.evaluate(self.data.test)
        if self.validation and (config.plateau or "test_loss" in row):
            row["validation_loss"], row["validation_accuracy"] = self.evaluate(self.validation)
        self.write("epoch", host.done, **row, seconds=round(seconds, 3))
        self.epoch_clock = time.perf_counter()
        if self.rank == 0:
            shares = ", ".join(
                f"{name.removesuffix('_accuracy')} {100 * value:.2f} %"
                for name, value in row.items()
                if name.endswith("accuracy")
            )
            rate = f"{images / seconds:.0f} images/s" if host.done - self.resumed_at >= len(self.batches) else ""
            text = f"epoch {epoch + 1}/{config.epochs}: loss {row['train_loss']:.4f}, {shares}"
            self.say(f"{config.title}: {text}{', ' * bool(rate)}{rate}")
        if config.plateau:
            loss = row["validation_loss" if self.validation else "train_loss"]
            if loss < host.best * (1 - IMPROVEMENT):
                host.best, host.waited = loss, 0
            else:
                host.waited += 1
                if host.waited > config.plateau:
                    host.lowered, host.waited = host.lowered + 1, 0

    def evaluate(self, split: Split) -> tuple[float, float]:
        """Returns mean loss and accuracy in eval mode. Each process evaluates its share of the images."""
        network = self.network.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for start in range(self.rank * EVALUATION, len(split.labels), self.world * EVALUATION):
                images = self.data.normalise(split.images[start : start + EVALUATION]).to(_dtype(self.config))
                labels = split.labels[start : start + EVALUATION]
                with autocast(self.config, self.device):
                    logits = network(images.contiguous(memory_format=_format(self.config)))
                totals[0] += loss_of(logits, labels, "sum")
                totals[1] += (logits.argmax(1) == labels).sum()
        network.train()
        if self.world > 1:
            dist.all_reduce(totals)
        loss, right = (totals / len(split.labels)).tolist()
        return loss, right

    def save(self) -> None:
        if self.recorder:
            self.recorder.flush(wait=True)  # in all processes, because rank 0 collects and writes the records
        if self.metrics is None:  # not on rank 0
            return
        self.metrics.sync()
        state = {
            "config": self.config.to_dict(),
            "host": asdict(self.host),
            "network": self.network.state_dict(),
            "step": self.step.state_dict(),
            "rng": _rng(self.device),
            "threads": torch.get_num_threads(),
        }
        checkpoint.save(self.folder / "checkpoint.pt", state)

    def restore(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.step.load_state_dict(state["step"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        if self.config.deterministic and state["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run had {state['threads']} threads and has {torch.get_num_threads()} now: torch's own "
                "kernels may add in another order, and then the bits differ from those of an uninterrupted run",
                RuntimeWarning,
                stacklevel=2,
            )

    def keep_divergence(self, step: int, lr: float) -> None:
        """Writes ``diverged.pt``: see :func:`train`."""
        if self.rank:
            return
        batches = batches_of(self.config, self.split, self.data)
        divergence_batches = {}
        for name, taken in (("update", step - 1), ("shown", step)):
            if taken >= 0:
                epoch, index = divmod(taken, len(batches))
                images, labels = batches.at(epoch, index)
                divergence_batches[name] = {"epoch": epoch, "index": index, "images": images, "labels": labels}
        state = {
            "config": self.config.to_dict(),
            "step": step,
            "before": {name: t.clone() for name, t in self.step.before_by_name().items()},
            "after": {name: t.detach() for name, t in self.network.named_parameters()},
            "velocity": self.step.velocity_by_name(),
            "lr": lr,
            "batches": divergence_batches,
            "rng": _rng(self.device),
        }
        checkpoint.write(self.folder / "diverged.pt", state)

    def write(self, event: str, step: int, **values: object) -> None:
        if self.metrics:
            self.metrics.append(event, step, **values)

    def say(self, text: str) -> None:
        """Prints a line, on a terminal above the progress bar."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)


def _flight_recorder(
    network: nn.Module, steps: int, folder: Path, first_step: int, stack: ExitStack
) -> FlightRecorder | None:
    """Returns a flight recorder of so many steps, which ``stack`` closes, or None. To be stopped is not an error."""
    if not steps:
        return None
    out = folder / (f"flight-from-{first_step}" if first_step else "flight")
    if out.exists():  # of an attempt that failed after the same checkpoint
        shutil.rmtree(out)
    flight = FlightRecorder(network, steps, out, {}, "warn", first_step)

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        flight.close(None if isinstance(error, Stopped) else error)

    stack.push(close)
    return flight


def batches_of(config: Config, split: Split, data: Cifar10, rank: int = 0, world: int = 1) -> Batches:
    """Returns a rank's share of the batches of ``split``, on its device, normalised by the statistics of ``data``."""
    return Batches(
        split,
        config.batch,
        config.seed,
        data.mean,
        data.std,
        augment=config.augment,
        dtype=torch.bfloat16 if config.precision == "bf16" else _dtype(config),
        memory_format=_format(config),
        rank=rank,
        world=world,
    )


def build(config: Config, device: torch.device | str = "cpu") -> ResNet:
    """Returns the network of a run. Its parameters are drawn on the CPU from torch's global generator."""
    network = ResNet(config.depth, config.norm, config.shortcut, config.kernels, init=config.init)
    return network.to(device, _dtype(config)).to(memory_format=_format(config))  # type: ignore[call-overload]


@contextmanager
def numerics(config: Config, device: torch.device) -> Iterator[None]:
    """Sets torch's global switches for the precision and determinism of the config, and restores them afterwards."""
    cudnn, algorithms = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
            cudnn.allow_tf32 = config.precision == "tf32"
            cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before[0])
            cudnn.allow_tf32, cudnn.benchmark = before[1:]


def _dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.precision == "fp64" else torch.float32


def _format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _rng(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
