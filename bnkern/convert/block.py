"""The parts of a converted model besides :mod:`bnkern.nn`: absorbed ReLUs, blocks with a recipe as their forward, and
the fused call in a recipe.

All of it is state of instances. The class of a module is replaced by a subclass of the same name, so that
``isinstance``, names, hooks, parameters and state_dict do not change. :func:`bnkern.revert` restores the class.
"""

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..nn.chain import ChainLink, run_links
from ..nn.leaf import fx_leaf


class Note:
    """The conversion of one batch norm: its former class ``was``, the ``outcome``, ``why`` it is not fused with a ReLU,
    and ``why_no_chain``, which is set if convolutions were to be fused.
    """

    why_no_chain = ""

    def __init__(self, was: type[nn.Module], why: str) -> None:
        self.was, self.outcome, self.why = was, "batch norm", why
        self.separate_adds = 0  # number of calls in which torch computed the addition


def note_of(module: nn.Module) -> Note:
    """Returns the note of a batch norm that :func:`bnkern.convert` handles."""
    return module._conversion  # type: ignore[return-value]


class AbsorbedReLU(nn.ReLU):
    """An nn.ReLU that the batch norm before it computes. It returns its input."""

    def forward(self, input: Tensor) -> Tensor:
        node = fx_leaf(self, input)
        return input if node is None else node  # type: ignore[return-value]  # a Proxy stands for the result

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "computed by the batch norm before it"]))


def norm_relu(bn: nn.Module, x: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
    """Computes ``relu(bn(x) + residual)`` in one call. Where torch would broadcast or promote, torch adds the residual.

    ``in_place`` means that the model has ``out += residual``, which rounds to the dtype of out. ``bn.act`` is "relu",
    unless bnkern.revert was called on a model after torch.fx had traced it.
    """
    if isinstance(x, fx.Proxy):
        module = x.tracer.create_proxy("get_attr", x.tracer.path_of_module(bn), (), {})
        return x.tracer.create_proxy("call_function", norm_relu, (module, x, residual, in_place), {})
    fused = getattr(bn, "act", None) == "relu"
    if residual is None:
        return bn(x) if fused else torch.relu(bn(x))
    recorded = torch.jit.is_tracing()  # torch.jit would record comparisons of shapes as constants, with a warning
    if fused and not recorded and _alike(x, residual):
        return bn(x, residual)
    if fused and not recorded and not torch.compiler.is_compiling():
        note_of(bn).separate_adds += 1
    y = (without_act(bn) if fused else bn)(x)
    return torch.relu(y.add_(residual) if in_place else y + residual)


class Step(NamedTuple):
    """One step of :func:`conv_chain`: ``norm(conv(value))``, or ``relu(norm(conv(value)) + residual)``."""

    conv: nn.Module
    norm: nn.Module
    residual: Tensor | int | None = None  # a tensor, or the number of an earlier value; value 0 is the chain's input
    relu: bool = False
    in_place: bool = False  # see norm_relu


def conv_chain(x: Tensor, *steps: tuple) -> Tensor:
    """Computes the steps one after the other, by the kernels of :func:`bnkern.nn.run_chain` where they serve them."""
    links = [Step(*step) for step in steps]

    def call(k: int, value: Tensor, residual: Tensor | None) -> Tensor:
        link, r = links[k], links[k].conv(value)
        return norm_relu(link.norm, r, residual, link.in_place) if link.relu else link.norm(r)

    if all(link.norm.act == ("relu" if link.relu else None) for link in links):
        return run_links(x, [ChainLink(link.conv, link.norm, link.residual) for link in links], call)
    values = [x]
    for k, link in enumerate(links):
        residual = values[link.residual] if isinstance(link.residual, int) else link.residual
        values.append(call(k, values[-1], residual))
    return values[-1]


def without_act(bn: nn.Module) -> nn.Module:
    """Returns the batch norm without its activation. Hooks, parameters and buffers are shared."""
    copy = object.__new__(type(bn))
    vars(copy).update(vars(bn), act=None)
    return copy


def _alike(x: Tensor, residual: Any) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.layout is torch.strided
    )


# ---------------------------------------------------------------------------------------------------- recipes


class Guard(NamedTuple):
    """A module that must still have this class. A batch norm must also have its act. Other modules must have no hooks,
    because they are no longer called.
    """

    path: str
    cls: type[nn.Module]
    is_norm: bool


class Recipe:
    """The code of a forward that was traced and fused, and the conditions under which it is valid.

    Args:
        graph: The operations, with paths of the block's submodules.
        names: The required arguments of the forward. Each must be a tensor.
        constants: The attributes that the trace has read, (path, name) -> value.
        guards: The modules that are inlined or no longer called, and the fused batch norms.
    """

    def __init__(
        self, graph: fx.Graph, names: list[str], constants: dict[tuple[str, str], Any], guards: list[Guard]
    ) -> None:
        code = graph.python_code("self")
        self.source, self.globals = code.src, code.globals
        self.names, self.guards = tuple(names), tuple(guards)
        self.constants = tuple((path, name, value) for (path, name), value in constants.items())
        self.code = self._compile()

    def _compile(self) -> Callable[..., Tensor]:
        scope = dict(self.globals)
        exec(compile(self.source, "<forward made by bnkern.convert>", "exec"), scope)
        return scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        # Functions are pickled by name. Modules cannot be pickled, and the code is compiled again.
        state = {key: value for key, value in vars(self).items() if key != "code"}
        state["globals"] = {
            key: (value.__name__ if isinstance(value, types.ModuleType) else value, isinstance(value, types.ModuleType))
            for key, value in self.globals.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.globals = {
            key: importlib.import_module(value) if is_module else value
            for key, (value, is_module) in state["globals"].items()
        }
        self.code = self._compile()

    def objection(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Returns the reason why the recipe is not valid for this call, or None."""
        if len(args) + len(kwargs) != len(self.names) or any(name not in self.names for name in kwargs):
            return "it was called with optional arguments"
        for value in (*args, *kwargs.values()):
            if not isinstance(value, (Tensor, fx.Proxy)):
                return "it was called with an argument that is not a tensor"
        for path, cls, is_norm in self.guards:
            module = _find(block, path)
            if type(module) is not cls or (is_norm and module.act is None):
                return f"{path} is another module than when it was converted"
            if not is_norm and has_hooks(module):
                return f"a hook was placed on {path}, which is not called"
        for path, name, value in self.constants:
            if getattr(_find(block, path), name) != value:
                return f"{path + '.' if path else ''}{name} was {value!r} when it was converted"
        return None


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks for its forward or its backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _find(block: nn.Module, path: str) -> nn.Module | None:
    module = block
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


class Block:
    """A base class of blocks whose forward is a recipe. A recipe that is no longer valid is dropped for good."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:  # type: ignore[override]
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, (cls, *args), *rest = reduced
        return (_new, (cls._base, *args), *rest)


def _run(block: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recipe: Recipe | None = block._recipe  # type: ignore[assignment]
    if recipe is not None:
        objection = recipe.objection(block, args, kwargs)
        if objection is None:
            return recipe.code(block, *args, **kwargs)
        give_up(block, objection)
    return original(block, *args, **kwargs)


def give_up(block: nn.Module, why: str) -> None:
    """Restores the block's own forward and its batch norms without activation, and warns once."""
    warnings.warn(
        f"bnkern.convert: {type(block).__name__} runs its own forward again, not the fused one: {why}. "
        "Call bnkern.convert again when the model is as you want it.",
        stacklevel=4,
    )
    recipe: Recipe = block._recipe  # type: ignore[assignment]
    block._recipe = None  # type: ignore[assignment]
    for path, _, is_norm in recipe.guards:
        module = _find(block, path)
        if is_norm and module is not None and hasattr(module, "_conversion"):
            module.act = None  # type: ignore[assignment]
            note_of(module).outcome, note_of(module).why = "batch norm", why


@functools.cache
def block_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of ``cls``, with the same name, whose forward runs the recipe of the instance."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, cls.forward, args, kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (Block, cls), {"forward": forward, "_base": cls, **named})


def _new(cls: type[nn.Module], *args: Any) -> nn.Module:
    cls = block_class(cls)  # type: ignore[arg-type]  # a class is hashable
    return cls.__new__(cls, *args)
