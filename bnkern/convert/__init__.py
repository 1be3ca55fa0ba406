"""``model = bnkern.convert(model)`` makes an existing network use bnkern's kernels and changes nothing else."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from .. import nn as fused
from .block import AbsorbedReLU, Note, block_class
from .fuse import fuse_all

# torch's batch norms and bnkern's. Subclasses of other libraries are not converted.
_REPLACEMENTS = {
    getattr(nn, name): getattr(fused, name) for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
}


class Layer(NamedTuple):
    """One batch norm: its name in the model, the outcome, and the reason if it is not fused."""

    name: str
    outcome: str
    why: str


class Summary(tuple[Layer, ...]):
    """The outcome of :func:`convert` for each batch norm. It prints as a table."""

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self), default=0)
        lines = [f"{layer.name:{width}}  {layer.outcome}{layer.why and ': ' + layer.why}" for layer in self]
        counts = Counter(layer.outcome for layer in self)
        total = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        return "\n".join([*lines, f"{len(self)} batch norms: {total}" if self else "no batch norms"])


def convert(model: nn.Module, fuse: bool = True, fuse_conv: bool = False) -> nn.Module:
    """Makes the batch norms of ``model`` use bnkern's kernels, in place, and returns the model.

    Every ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` becomes bnkern's. It is the same module object
    with another class, so parameters, buffers, names, hooks, mode, device, dtype and state_dict stay. With ``fuse``
    the same pass also computes a ReLU that follows a batch norm, and an addition between the two:

        relu(bn(x))             nn.ReLU or F.relu, torch.relu, x.relu_() ..., in one forward or in nested Sequentials
        relu(bn(x) + residual)  also out += residual, out.add_(residual), residual + bn(x), with a bn on either side

    An nn.ReLU that always follows its batch norm stays under its name and returns its input. If a forward calls the
    ReLU as a function, or adds, the forward of that one block is replaced by its torch.fx trace with the calls joined.
    This requires that only its tensor arguments decide what it does. The assumptions of the trace are checked at every
    call. A block that was changed since then runs its own forward again, with a warning.

    Cases that are not certain stay as they were: batch norms with hooks, shared ones, subclasses of other libraries,
    results that are used elsewhere too, forwards that cannot be traced. ``bnkern.convert.summary(model)`` lists the
    outcome for each batch norm, with the reason. A residual that torch would broadcast or promote is added by torch.

    Args:
        model: any module, on any device. It is changed in place. A converted model is reverted first, so two calls
            have the same effect as one.
        fuse: False exchanges the batch norms and nothing else.
        fuse_conv: True also joins 3 x 3 convolutions of stride and padding 1 to the batch norms before and
            behind them, within one forward (:func:`bnkern.nn.run_chain`). On the CPU, in float32 and channels_last,
            such a chain uses Winograd's form. The results differ from torch's by rounding. The summary
            says "convolution + batch norm ..." for the batch norms in chains, and for the others why they are in none.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ValueError: fuse_conv is True and fuse is False.
        RuntimeError: Other code has changed the classes of converted modules since; see :func:`revert`.
    """
    if fuse_conv and not fuse:
        raise ValueError("convert: fuse_conv=True requires fuse=True")
    revert(model)
    for module in model.modules():
        note = Note(type(module), "" if fuse else "fuse=False")
        if type(module) in _REPLACEMENTS:
            _replace_class(module)
            module._conversion = note  # type: ignore[assignment]
        elif type(module) in _REPLACEMENTS.values() and module.act is None:
            module._conversion = note
    if fuse:
        fuse_all(model, fuse_conv)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place, and returns the model. The modules have their former classes again.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        RuntimeError: The class of a converted module was changed since, for example by parametrize or fully_shard. The
            message names the module. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    converted = {name: m for name, m in model.named_modules() if "_conversion" in vars(m) or "_recipe" in vars(m)}
    for name, module in converted.items():
        note = vars(module).get("_conversion")
        expected = _REPLACEMENTS.get(note.was, note.was) if note else block_class(module._base)
        if type(module) is not expected:
            raise RuntimeError(
                f"convert: {name or 'the model'} is a {type(module).__name__} now; undo first what has changed its "
                "class since the conversion"
            )
    for module in converted.values():
        note = vars(module).pop("_conversion", None)
        if note is None:
            module.__class__ = module._base
            del module._recipe
        elif note.was in _REPLACEMENTS:
            module.__class__ = note.was
            del module.act
        else:
            module.act = None
    for module in model.modules():
        if type(module) is AbsorbedReLU:
            module.__class__ = nn.ReLU  # type: ignore[assignment]
    return model


def summary(model: nn.Module) -> Summary:
    """Every batch norm of a model in the order of its modules, with the outcome of :func:`convert` and the reason."""
    layers = []
    for name, module in model.named_modules():
        note = vars(module).get("_conversion")
        if note is not None:
            why = note.why
            if note.separate_adds:
                why = f"torch added the residual in {note.separate_adds} calls, to broadcast or promote it"
            layers.append(Layer(name, note.outcome, "; ".join(filter(None, [why, note.why_no_chain]))))
        elif isinstance(module, torch.jit.ScriptModule):
            if module.original_name in [cls.__name__ for cls in _REPLACEMENTS]:
                layers.append(Layer(name, "left alone", "it is part of a torch.jit module"))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            layers.append(Layer(name, "left alone", _why_not_converted(module)))
    return Summary(layers)


convert.summary = summary  # type: ignore[attr-defined]


def _why_not_converted(module: nn.Module) -> str:
    cls = type(module)
    if cls in _REPLACEMENTS:
        return "not converted"
    if cls in _REPLACEMENTS.values():
        return f"bnkern's, with act={module.act!r}"
    return f"its class is {cls.__module__}.{cls.__qualname__}"


def _replace_class(bn: nn.Module) -> None:
    replacement = _REPLACEMENTS[type(bn)]
    for name, value in vars(replacement(1, device="meta")).items():
        vars(bn).setdefault(name, value)  # the attributes that only bnkern's constructor sets
    bn.__class__ = replacement
