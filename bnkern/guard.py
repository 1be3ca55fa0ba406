"""Raises an error or warns where other code rebuilds a batch norm from its attributes and so drops its activation.

``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, ``torch.nn.utils.fusion.fuse_conv_bn_eval`` and similar functions
read ``num_features`` or ``eps`` of every batch norm and build a plain module from the values. If the batch norm also
computes a ReLU, the ReLU is lost. Only these reads show that a module is being rebuilt, and other code has good reasons
to read the same attributes. The consequence therefore depends on the function that reads.
"""

import sys
import warnings
from types import FrameType

import torch

_SEPARATE = "set its act to None and put an nn.ReLU after it, or undo bnkern.convert with bnkern.revert, before"

# Functions, by name or qualified name, that rebuild or fold a batch norm and do nothing else with it. Third-party
# functions are listed by name alone, since libraries move them between modules and users copy them.
REBUILDERS = {
    "convert_sync_batchnorm": "call bnkern.nn.convert_sync_batchnorm instead",  # torch.nn.SyncBatchNorm, timm
    "convert_syncbn_model": "call bnkern.nn.convert_sync_batchnorm instead",  # apex
    "fuse_conv_bn_eval": _SEPARATE,  # torch.nn.utils.fusion
    "fuse_linear_bn_eval": _SEPARATE,
    "MkldnnBatchNorm.__init__": _SEPARATE,  # torch.utils.mkldnn.to_mkldnn
    "fuse_conv_and_bn": _SEPARATE,  # ultralytics
    "_fuse_conv_bn": _SEPARATE,  # mmcv, mmengine
    "freeze_batch_norm_2d": _SEPARATE,  # timm
    "convert_splitbn_model": _SEPARATE,
    "convert_frozen_batchnorm": _SEPARATE,  # detectron2
    "replace_batch_norm": _SEPARATE,  # transformers: DETR and its relatives
    "_batchnorm_to_groupnorm": _SEPARATE,  # opacus
}


class Hyperparameter:
    """A number that describes a batch norm, stored under its own name in the module's ``__dict__`` as torch stores it.

    If ``act`` of the module is set, a read in a function of :data:`REBUILDERS` raises a TypeError. A read in other code
    that names the attribute gives a warning, except in methods of the module and in this package. Code that goes
    through all attributes (``inspect.getmembers``, debuggers, torch.jit) does not name it and gets no warning.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: torch.nn.Module | None, owner: type | None = None) -> object:
        if module is None:
            return self
        if module.__dict__.get("act") is not None and not torch.compiler.is_compiling():
            _check_reader(module, self.name, sys._getframe(1))
        return module.__dict__[self.name]

    def __set__(self, module: torch.nn.Module, value: object) -> None:
        module.__dict__[self.name] = value


def _check_reader(module: torch.nn.Module, name: str, reader: FrameType) -> None:
    code, kind = reader.f_code, f"{type(module).__name__}(act={module.act!r})"
    advice = REBUILDERS.get(code.co_qualname) or REBUILDERS.get(code.co_name)
    if advice:
        raise TypeError(f"{code.co_qualname} would drop the activation of a {kind}: {advice}")
    package = reader.f_globals.get("__name__", "").partition(".")[0]
    if name in code.co_names and package != __package__ and reader.f_locals.get("self") is not module:
        warnings.warn(
            f"{code.co_qualname} reads {name} of a {kind}. Code that builds another module from it, or folds it into a "
            f"convolution, drops the activation: {_SEPARATE}. To read the value alone use vars(module)[{name!r}]",
            stacklevel=3,
        )
