"""The context of a call of batch norm: plain eager mode, or a trace, mode or transform that must record the call.

torch has no public functions for most of these checks. All private names of torch that they need are in this file.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, fx

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain_eager() -> bool:
    """Whether no compilation, export, trace, dispatch or function mode, transform or forward-mode level is active.

    Under torch.jit.trace the result of a call that is not recorded becomes a constant of the graph.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_recomputed() -> bool:
    """Whether the call is part of a backward pass, where torch.utils.checkpoint repeats a forward.

    Both kinds of checkpoint, with and without reentrant autograd, run the forward again while the autograd engine
    works. A compiler makes its own recomputation, and does not repeat updates of buffers.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_recorded() -> bool:
    """Whether the call is recorded in a graph. Its inputs may require gradients later even if they do not now."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_plain(t: Tensor) -> bool:
    """Whether the memory of ``t`` has its values. False for subclasses, lazy negation, and zeros without storage."""
    return type(t) in PLAIN and not t.is_neg() and not t._is_zerotensor()


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a backend may be called directly with these tensors, without an operator.

    Only plain tensors on a real device have an address.
    """
    return is_plain_eager() and all(t is None or (is_plain(t) and t.device.type != "meta") for t in tensors)


def is_transformed() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap) or forward-mode differentiation must transform the call.

    They can only transform plain torch, because they do not use an operator's registered backward.
    """
    if torch.compiler.is_compiling():
        return False
    level = torch._C._functorch.peek_interpreter_stack()
    inside = level is not None and level.key() != torch._C._functorch.TransformType.Functionalize
    return inside or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, by torch.func.jvp or by dual tensors."""
    functorch = torch._C._functorch
    return torch.autograd.forward_ad._current_level >= 0 or any(
        level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ()
    )


def is_mapped(t: Tensor) -> bool:
    """Whether vmap maps over ``t``, at any of its levels."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` represents several tensors: a gradient that vmap or ``is_grads_batched`` maps over."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)


def unwrapped(t: OptionalTensor) -> OptionalTensor:
    """The tensor in ``t`` if ``t`` is a wrapper of a transform that has ended, otherwise ``t`` itself."""
    return None if t is None else torch._C._functorch.unwrap_if_dead(t)


def grad_needed(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of the tensors requires a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def fx_node(function: Callable, x: object, args: tuple, kwargs: dict) -> fx.Proxy | None:
    """The call ``function(x, *args, **kwargs)`` as one node if ``x`` comes from torch.fx.symbolic_trace, else None."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", function, (x, *args), kwargs)
    return None
