"""Finds BN -> ReLU and BN -> add -> ReLU in the graph of a block."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .block import has_hooks

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD = (operator.add, operator.iadd, torch.add)


class Match(NamedTuple):
    """The nodes of one pattern: ``relu(bn)``, or ``relu(add)`` where ``add.args[side]`` is the output of bn.

    The residual is read from ``add`` only when it is needed. It may be the ReLU of another match, and fusing that match
    replaces the node.
    """

    bn: fx.Node
    relu: fx.Node
    add: fx.Node | None = None
    side: int = 0

    @property
    def residual(self) -> fx.Node:
        assert self.add is not None, "a match without addition has no residual"
        residual = self.add.args[1 - self.side]
        assert isinstance(residual, fx.Node)
        return residual


def path_of(node: fx.Node) -> str:
    """Returns the path of the module that the node calls."""
    return node.target  # type: ignore[return-value]  # a path, because the node calls a module


class Patterns:
    """Finds the patterns in one graph, and the reasons why batch norms are in none.

    Args:
        graph: A trace. Uses of x after a statement like ``x.add_(y)`` are replaced by the result of the statement.
        module: Returns a submodule by its path.
        is_norm: Whether a module is a batch norm of bnkern that may be fused.
        can_enter: Whether a called module may be inlined.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: Callable[[str], nn.Module],
        is_norm: Callable[[nn.Module], bool],
        can_enter: Callable[[str], bool],
    ) -> None:
        self.graph, self.module, self.is_norm, self.can_enter = graph, module, is_norm, can_enter
        self.matches: list[Match] = []
        self.enter: list[str] = []  # modules whose last operation decides whether there is a pattern
        self.why: dict[str, str] = {}  # path of a batch norm -> why it is not fused with the ReLU after it
        self._chain_in_place()
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if self._is_relu(node):
                self._match(node)

    # ------------------------------------------------------------------------------------------ kinds of nodes

    def called(self, node: object) -> nn.Module | None:
        return self.module(path_of(node)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def is_identity(self, node: object) -> bool:
        """Whether the node calls an nn.Identity without hooks. Such a call can be removed without an effect."""
        module = self.called(node)
        return (
            isinstance(node, fx.Node) and type(module) is nn.Identity and len(node.args) == 1 and not has_hooks(module)
        )

    def holder_is_called(self, node: fx.Node) -> bool:
        """Whether a module that holds the called one is itself called, and may call it a second time."""
        called = {n.target for n in self.graph.nodes if n.op == "call_module"}
        path = path_of(node).split(".")
        return any(".".join(path[:k]) in called for k in range(1, len(path)))

    def _is_relu(self, node: fx.Node) -> bool:
        if type(self.called(node)) is nn.ReLU:
            return True
        return (node.op == "call_function" and node.target in _RELU) or (
            node.op == "call_method" and node.target in ("relu", "relu_")
        )

    def _is_add(self, node: object) -> bool:
        """Whether the node is a + b of two values, without a scale (alpha=) or a tensor for the result (out=)."""
        if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 2:
            return False
        named = (node.op == "call_function" and node.target in _ADD) or (
            node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__", "__radd__")
        )
        return named and all(isinstance(arg, fx.Node) for arg in node.args)

    def in_place(self, node: fx.Node) -> bool:
        """Whether the node changes its first argument and returns it."""
        if node.op == "call_method":
            return node.target in ("add_", "relu_", "__iadd__")
        if node.op == "call_module":
            module = self.called(node)
            return type(module) is nn.ReLU and module.inplace
        if node.target is F.relu:
            return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))
        return node.target in (operator.iadd, torch.relu_, F.relu_)

    def _chain_in_place(self) -> None:
        """Replaces uses of x after ``x.add_(y)`` by the result of that statement."""
        tensors: set[fx.Node] = set()
        order = {node: k for k, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            source = node.args[0] if node.args else None
            if node.op == "call_module" or self._is_relu(node) or (self._is_add(node) and source in tensors):
                tensors.add(node)
            if node in tensors and isinstance(source, fx.Node) and source in tensors and self.in_place(node):
                later = [user for user in source.users if order[user] > order[node]]
                for user in later:
                    user.replace_input_with(source, node)

    # ----------------------------------------------------------------------------------------------- patterns

    def _used_once(self, node: object) -> fx.Node | None:
        """Returns the node, or the one before its nn.Identity nodes, if each has only one user, else None."""
        while isinstance(node, fx.Node) and len(node.users) == 1:
            if not self.is_identity(node):
                return node
            node = node.args[0]
        return None

    def _is_norm(self, node: fx.Node | None) -> bool:
        module = self.called(node)
        if node is None or module is None or not self.is_norm(module):
            return False
        return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs

    def _refuse(self, node: object, why: str) -> None:
        """Stores the reason for the batch norm that ``node`` calls, if any, behind nn.Identity nodes too."""
        while isinstance(node, fx.Node) and self.is_identity(node):
            node = node.args[0]
        module = self.called(node)
        if isinstance(node, fx.Node) and module is not None and self.is_norm(module):
            self.why[path_of(node)] = why

    def _match(self, relu: fx.Node) -> None:
        if not relu.args:
            return
        source = self._used_once(relu.args[0])
        if source is None:
            self._refuse(relu.args[0], "its output is used by others than the ReLU")
        elif self._is_norm(source):
            self._add_match(Match(source, relu))
        elif self._is_add(source):
            self._match_sum(source, relu)
        elif source.op == "call_module" and self.can_enter(path_of(source)):
            self.enter.append(path_of(source))

    def _match_sum(self, add: fx.Node, relu: fx.Node) -> None:
        left, right = add.args
        sides = [0, 1]
        if self.in_place(add):  # left is overwritten, and the write may be removed only if left has no other user
            sides = [0]
            if self._is_norm(self._used_once(right)) and not self._is_norm(self._used_once(left)):
                self._refuse(right, "it is added in place to a tensor that may be used elsewhere")
        for side in sides:
            source = None if left is right else self._used_once(add.args[side])
            if source is None:
                self._refuse(add.args[side], "its output is used by others than the addition")
            elif self._is_norm(source):
                if self._undisturbed(source, add):
                    return self._add_match(Match(source, relu, add, side))
                self._refuse(source, "something in between may change its input in place")
            elif source.op == "call_module" and self.can_enter(path_of(source)):
                self.enter.append(path_of(source))
                return None  # inline it first; the other side is tried if that gives no match
        return None

    def _add_match(self, match: Match) -> None:
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == match.bn.target]
        if len(calls) > 1:
            self._refuse(match.bn, "it is called more than once")
        elif self.holder_is_called(match.bn):
            self._refuse(match.bn, "it is called from outside the module that holds it")
        else:
            self.matches.append(match)

    def _undisturbed(self, bn: fx.Node, until: fx.Node) -> bool:
        """Whether bn may be computed as late as ``until``, because no node before it can change its input in place.

        The result of a convolution or linear layer that only bn uses cannot be changed by other nodes.
        """
        producer = bn.args[0]
        private = (nn.modules.conv._ConvNd, nn.Linear)
        if isinstance(producer, fx.Node) and len(producer.users) == 1 and isinstance(self.called(producer), private):
            return True
        between = [node for node in self.graph.nodes if self.order[bn] < self.order[node] < self.order[until]]
        return all(isinstance(self.called(node), (*private, nn.Identity)) or self._is_norm(node) for node in between)
