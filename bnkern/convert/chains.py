"""Joins the 3 x 3 convolutions and batch norms of a block's graph to calls of :func:`conv_chain`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import fx, nn

from .block import AbsorbedReLU, conv_chain, has_hooks, norm_relu
from .match import path_of


class _Part(NamedTuple):
    """A convolution, the batch norm behind it, and the last node of the two, whose value the graph uses."""

    conv: fx.Node
    norm: fx.Node
    last: fx.Node

    @property
    def residual(self) -> fx.Node | None:
        return self.norm.args[2] if self.norm.target is norm_relu and len(self.norm.args) > 2 else None  # type: ignore[return-value]


def obstacles(graph: fx.Graph, module: Callable[[str], nn.Module]) -> dict[str, str]:
    """The reason why a batch norm of ``graph`` is in no chain, by its path, for those without a chain."""
    found = {}
    for node in graph.nodes:
        norm, args = node, node.args
        if node.op == "call_function" and node.target is norm_relu:
            norm, args = node.args[0], node.args[1:]
        elif node.op != "call_module" or not isinstance(module(path_of(node)), nn.modules.batchnorm._BatchNorm):
            continue
        if "_conversion" in vars(module(path_of(norm))) and isinstance(args[0], fx.Node):
            found[path_of(norm)] = _obstacle(args[0], module)
    return {path: why for path, why in found.items() if why}


def _obstacle(source: fx.Node, module: Callable[[str], nn.Module]) -> str:
    conv = module(path_of(source)) if source.op == "call_module" else None
    if not isinstance(conv, nn.Conv2d):
        return "it does not follow a Conv2d in the same forward"
    size = " x ".join(map(str, conv.kernel_size))
    if len(source.users) > 1:
        return "the convolution's output is used elsewhere too"
    if conv.kernel_size != (3, 3):
        return f"the convolution is {size}"
    if conv.stride != (1, 1):
        return f"the convolution has stride {conv.stride[0]}"
    if (conv.padding, conv.dilation, conv.groups, conv.padding_mode) != ((1, 1), (1, 1), 1, "zeros"):
        return "the convolution has groups, a dilation, or another padding than 1"
    if conv.in_channels % 16 or conv.out_channels % 16:
        return f"{conv.in_channels} to {conv.out_channels} channels are not multiples of 16"
    return ""


def join_chains(graph: fx.Graph, module: Callable[[str], nn.Module]) -> tuple[set[str], set[str]]:
    """Replaces sequences of convolutions and batch norms in ``graph``.

    ``module`` returns a submodule by its path. Returns the paths of the batch norms in chains, and those of modules
    that the graph does not call any more: convolutions, batch norms and absorbed ReLUs.
    """
    parts = {part.conv: part for node in graph.nodes if (part := _part(node, module)) is not None}
    chains: list[list[_Part]] = []
    for node in graph.nodes:
        part = parts.get(node)
        if part is None:
            continue
        chain = chains[-1] if chains else []
        if chain and _continues(chain, part):
            chain.append(part)
        else:
            chains.append([part])
    norms, erased = set(), set()
    for chain in chains:
        norms |= {_norm_path(part) for part in chain}
        erased |= _replace(graph, chain)
    return norms, erased


def _part(conv: fx.Node, module: Callable[[str], nn.Module]) -> _Part | None:
    if conv.op != "call_module" or _obstacle(conv, module):
        return None
    (norm,) = conv.users
    if norm.op == "call_function" and norm.target is norm_relu and norm.args[1] is conv:
        return _Part(conv, norm, norm)
    if norm.op != "call_module" or type(module(path_of(norm))).__name__ != "BatchNorm2d" or norm.args != (conv,):
        return None
    last = norm
    while len(last.users) == 1:
        (user,) = last.users
        passes = user.op == "call_module" and type(module(path_of(user))) is AbsorbedReLU
        if not passes or has_hooks(module(path_of(user))):
            break
        last = user
    return _Part(conv, norm, last)


def _continues(chain: list[_Part], part: _Part) -> bool:
    """Whether the part can be joined to the chain: nothing else uses the chain's last value, and every use of its other
    values is in the chain."""
    last = chain[-1].last
    if part.conv.args != (last,):
        return False
    values = [earlier.last for earlier in chain]
    if part.residual is not None and part.residual not in values and part.residual is not chain[0].conv.args[0]:
        return False  # a residual from elsewhere may be computed after the chain has begun
    nodes = {p.conv for p in chain} | {p.norm for p in chain} | {part.conv, part.norm}
    return all(user in nodes for value in values for user in value.users)


def _norm_path(part: _Part) -> str:
    if part.norm.op == "call_module":
        return path_of(part.norm)
    return part.norm.args[0].target  # type: ignore[union-attr, return-value]


def _replace(graph: fx.Graph, chain: list[_Part]) -> set[str]:
    values = [chain[0].conv.args[0], *(part.last for part in chain)]
    with graph.inserting_before(chain[-1].norm):
        steps: list[tuple] = []
        for part in chain:
            relu = part.norm.target is norm_relu
            residual = part.residual
            steps.append(
                (
                    graph.get_attr(path_of(part.conv)),
                    graph.get_attr(_norm_path(part)),
                    values.index(residual) if residual in values[: len(steps) + 1] else residual,
                    relu or part.last is not part.norm,
                    bool(relu and len(part.norm.args) > 3 and part.norm.args[3]),
                )
            )
        joined = graph.call_function(conv_chain, (values[0], *steps))
    chain[-1].last.replace_all_uses_with(joined)
    erased = set()
    for node in reversed(graph.nodes):
        inside = any(node in (part.conv, part.norm, part.last) for part in chain)
        absorbed = node.op == "call_module" and any(node.args and node.args[0] is part.norm for part in chain)
        if not node.users and (inside or absorbed or node.op == "get_attr"):
            graph.erase_node(node)
            if node.op == "call_module":
                erased.add(path_of(node))
    return erased
