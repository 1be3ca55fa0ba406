"""Finds the modules that a forward calls through another module: ``self.body.relu(x)`` besides ``self.body(x)``.

Such a module must not be fused with its neighbours, because fusion would not change all of its calls.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import fx, nn


def has_forward(module: nn.Module) -> bool:
    """Whether the module has a Python forward. An nn.ModuleList has none, and torch.jit modules run compiled code."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def reached_in_trace(block: nn.Module, graph: fx.Graph, inlined: frozenset[str] = frozenset()) -> set[nn.Module]:
    """Returns the modules that a traced forward calls by a path through another module with a forward.

    The forwards of the modules at the paths ``inlined`` are part of the graph, so their children are not counted.
    """
    paths = [node.target.split(".") for node in graph.nodes if node.op == "call_module"]
    modules = {_find(block, path) for path in paths if _through_forward(block, path, inlined)}
    return {module for module in modules if module is not None}


def reached_in_source(block: nn.Module) -> set[nn.Module]:
    """Returns the same for a forward that cannot be traced, from the source of all methods of the block's class.

    ``self.body.relu`` and ``self.body[1]`` name one module. If ``self.body`` is not called but used in another way
    (iterated over, indexed by a variable, assigned), all its children may be called one by one. Code without source and
    names that are computed at run time are not found.
    """
    modules = set()
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
                modules.add(module)
            parent = parents[node]
            called = isinstance(parent, ast.Call) and parent.func is node
            indexed = isinstance(parent, ast.Subscript) and _path(parent, arguments[0].arg) is None
            if has_forward(module) and not called and (indexed or not isinstance(parent, _HARMLESS)):
                modules.update(module.children())
    return modules


# self.body.training, self.body[0] (which is a path of its own), self.body is not None
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
    """Returns the names from ``owner`` down to this expression, or None if it is not such a path."""
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
    modules = (_find(block, prefix) for prefix in prefixes if ".".join(prefix) not in inlined)
    return any(module is not None and has_forward(module) for module in modules)
