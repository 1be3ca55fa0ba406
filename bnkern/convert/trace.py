"""Traces the forward of a module to a torch.fx graph, or raises :class:`Untraceable` with the reason.

fx records one run with proxies for the tensors. The graph is valid for other runs only if its operations depend on
nothing but the tensors. This module therefore refuses everything else that fx would record as a constant: the mode,
gradient and autocast contexts, random numbers, attributes that may change, new tensors, and tests of types that a proxy
cannot answer. The traced modules are shallow copies, and the model itself is not changed.
"""

import inspect
import operator
import random
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

# Types of attributes that a trace may read. Their values are compared whenever the result of the trace runs.
_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)
_PLAIN += (types.FunctionType, types.BuiltinFunctionType)
# The attributes of a module that torch itself reads.
_INTERNAL = (set(dir(nn.Module)) | set(vars(nn.Module()))) - {"training"}


class Untraceable(Exception):
    """The message is the reason and continues the name of a forward, for example "reads self.training"."""


class Trace(NamedTuple):
    """The ``graph`` of a forward, and ``constants``, the attributes that it reads: (module's path, name) -> value."""

    graph: fx.Graph
    constants: dict[tuple[str, str], Any]


def parameters(cls: type[nn.Module]) -> tuple[list[str], list[str]]:
    """Returns the names of the required and of the optional arguments of a forward, without *args and **kwargs."""
    named = [
        p for p in inspect.signature(cls.forward).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    required = [p.name for p in named[1:] if p.default is p.empty]
    return required, [p.name for p in named[1:] if p.default is not p.empty]


def trace(block: nn.Module, inline: frozenset[str], options: bool = False) -> Trace:
    """Traces the forward of ``block``. The submodules at the paths ``inline`` are traced too, all others are called.

    Optional arguments have their defaults, or with ``options`` are passed too. The traces in train and eval mode, with
    and without gradients, and with and without autocast must be equal.
    """
    traces = [
        _trace(block, inline, options, training, grad, autocast)
        for training, grad, autocast in ((True, True, False), (False, True, False), (True, False, True))
    ]
    first, *others = (_text(t.graph) for t in traces)
    if any(other != first for other in others):
        raise Untraceable("does something else in eval mode, without gradients or under autocast")
    return traces[0]


def _text(graph: fx.Graph) -> str:
    return "\n".join(f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)


def _trace(
    block: nn.Module, inline: frozenset[str], options: bool, training: bool, grad: bool, autocast: bool
) -> Trace:
    constants: dict[tuple[str, str], Any] = {}
    required, optional = parameters(type(block))
    names = required + optional if options else required
    # Modules that are only called are not copied. A forward may read their mode, so it is set, and restored at the end.
    modes = [(m, m.training) for m in block.modules()]
    seeds = random.getstate(), torch.get_rng_state()
    try:
        for module, _ in modes:
            module.training = training
        root = _shadow(block, "", inline, constants)
        type(root).forward = _with_arguments(type(block), names)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            graph = _Tracer(inline).trace(root)
        if (random.getstate(), torch.get_rng_state().tolist()) != (seeds[0], seeds[1].tolist()):
            raise Untraceable("draws random numbers")
    except Untraceable:
        raise
    except Exception as error:  # a forward may raise anything if it gets proxies
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Untraceable(f"cannot be traced: {line}") from error
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(seeds[0])
        torch.set_rng_state(seeds[1])
    return Trace(graph, constants)


def _with_arguments(cls: type[nn.Module], names: list[str]) -> Any:
    """Returns a forward with exactly these arguments, passed on by name. fx reads the arguments from its code."""
    if not all(name.isidentifier() for name in names):
        raise Untraceable("has arguments with names that are not identifiers")
    scope: dict[str, Any] = {"forward_of": cls.forward}
    passed = ", ".join(f"{name}={name}" for name in names)
    exec(f"def forward({', '.join(['self', *names])}): return forward_of(self, {passed})", scope)
    return scope["forward"]


def _shadow(module: nn.Module, path: str, inline: frozenset[str], constants: dict[tuple[str, str], Any]) -> nn.Module:
    """Returns a shallow copy that stores which plain attributes are read, and refuses what a trace cannot represent."""
    base = type(module)

    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = base.__getattribute__(self, name)
        if name in _INTERNAL or name.startswith("__"):
            return value
        if name == "training":
            raise Untraceable("reads self.training")
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
            constants[path, name] = value
        elif name in vars(self) and not isinstance(value, (nn.Module, torch.Tensor)):
            raise Untraceable(f"reads self.{name}, a {type(value).__name__}, which may change")
        return value

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        raise Untraceable(f"sets self.{name}")

    copy = object.__new__(base)
    vars(copy).update(vars(module))
    vars(copy)["_modules"] = {
        name: _shadow(child, child_path, inline, constants) if child is not None and child_path in inline else child
        for name, child in module._modules.items()
        for child_path in [f"{path}.{name}".lstrip(".")]
    }
    copy.__class__ = type(base.__name__, (base,), {"__getattribute__": __getattribute__, "__setattr__": __setattr__})
    return copy


class _Tracer(fx.Tracer):
    def __init__(self, inline: frozenset[str]) -> None:
        super().__init__()
        self.inline = inline
        self.contexts = _contexts()

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return qualified_name not in self.inline

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise Untraceable("enters a context (no_grad, autocast, checkpoint or similar)")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _TensorProxy:
            return a.node
        if isinstance(a, torch.Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise Untraceable("makes a new tensor")
        return super().create_arg(a)


class _TensorProxy(fx.Proxy):
    """A proxy for a tensor for which ``isinstance(x, torch.Tensor)`` is true, unlike for the proxies of fx."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.node.op == "call_module":
            module = self.tracer.root.get_submodule(self.node.target)  # type: ignore[attr-defined]  # a _Tracer's
            if not type(module).__module__.startswith(("torch.nn.", "bnkern.")):
                raise Untraceable(f"tests the type of the result of {self.node.target}")
        return torch.Tensor


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# fx's proxies do not have ``x += y`` and similar operators. Python would use ``x = x + y``, which does not change x.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_TensorProxy, f"__{_name}__", _in_place(_name))


def _contexts() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
