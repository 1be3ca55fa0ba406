"""Which modules a forward reaches through another module: ``self.body.relu(x)`` beside or instead of ``self.body(x)``.

What such a module computes may not be given to its neighbours, since not all callers would see the change.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import fx, nn


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called: an nn.ModuleList cannot. Modules of torch.jit run code of their own."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def reached_in_trace(block: nn.Module, graph: fx.Graph, inlined: frozenset[str] = frozenset()) -> set[nn.Module]:
    """The modules that a traced forward calls by a path through another module with a forward.

    The forwards of the modules at the paths ``inlined`` are part of the graph, so that their own children are not
    reached through them.
    """
    paths = [node.target.split(".") for node in graph.nodes if node.op == "call_module"]
    found = {_find(block, path) for path in paths if _through_forward(block, path, inlined)}
    return {module for module in found if module is not None}


def reached_in_source(block: nn.Module) -> set[nn.Module]:
    """The same for a forward that cannot be traced, from the source of all methods of the block's class.

    ``self.body.relu`` and ``self.body[1]`` name one module. Where ``self.body`` is used otherwise than by calling it
    (iterated over, indexed by a variable, assigned), its children may be called one by one. Of code without a source,
    and of names that are looked up while it runs, nothing is known.
    """
    found = set()
    for tree in _methods(type(block)):
        arguments = tree.args.posonlyargs + tree.args.args
        if not arguments:
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in parents:
            path = _path(node, arguments[0].arg)
            module = _find(block, path) if path else None
            if path is None or module is None:
                continue
            if _through_forward(block, path):
                found.add(module)
            parent = parents[node]
            called = isinstance(parent, ast.Call) and parent.func is node
            indexed = isinstance(parent, ast.Subscript) and _path(parent, arguments[0].arg) is None
            if has_forward(module) and not called and (indexed or not isinstance(parent, _HARMLESS)):
                found.update(module.children())
    return found


# self.body.training, self.body[0] (seen as a path of its own), self.body is not None
_HARMLESS = (ast.Attribute, ast.Subscript, ast.Compare)


def _methods(cls: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for function in vars(base).values():
            if inspect.isfunction(function):
                try:
                    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
                except (OSError, SyntaxError):  # no source, or a lambda in the middle of an expression
                    continue
                if isinstance(tree, ast.FunctionDef) and tree.name != "__init__":
                    yield tree


def _path(node: ast.AST, owner: str) -> list[str] | None:
    """The names from ``owner`` down to this expression, or None where it is no such path."""
    names: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.insert(0, str(node.slice.value))
        else:
            return None
        node = node.value
    return names if node.id == owner else None


def _find(block: nn.Module, path: list[str]) -> nn.Module | None:
    module = block
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _through_forward(block: nn.Module, path: list[str], inlined: frozenset[str] = frozenset()) -> bool:
    prefixes = [path[:k] for k in range(1, len(path))]
    found = (_find(block, prefix) for prefix in prefixes if ".".join(prefix) not in inlined)
    return any(module is not None and has_forward(module) for module in found)
