"""Fuses, block by block, the patterns BN -> ReLU and BN -> add -> ReLU in the forward of each block."""

from collections import Counter

import torch
from torch import fx, nn

from .block import AbsorbedReLU, Guard, Recipe, block_class, has_hooks, norm_relu, note_of
from .chains import join_chains, obstacles
from .match import Match, Patterns, path_of
from .reach import has_forward, reached_in_source, reached_in_trace
from .trace import Untraceable, parameters, trace


def fuse_all(model: nn.Module, fuse_conv: bool = False) -> None:
    """Goes through the modules that hold batch norms, outer modules first, because a block may fuse the batch norm at
    the end of a module that it calls."""
    holders = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    entered: set[nn.Module] = set()  # modules whose forward is part of the recipe of another
    reached: set[nn.Module] = set()  # modules that a forward calls by a path through another module
    views: dict[str, dict[str, str] | str] = {}
    for name, module in list(model.named_modules()):
        is_block = not is_norm(module) and has_forward(module)
        if is_block and any(is_norm(m) for m in module.modules()) and module not in entered:
            fusion = _Fusion(module, holders, reached, fuse_conv)
            entered |= fusion.apply()
            reached |= fusion.reaches
            views[name] = fusion.view
    for name, module in model.named_modules():
        if is_norm(module) and module.act is None and not note_of(module).why:
            note_of(module).why = _shared(module, holders, reached) or _follower(name, views)


def _shared(module: nn.Module, holders: Counter[int], reached: set[nn.Module]) -> str:
    """Returns the reason why several forwards may call a batch norm, or ""."""
    if holders[id(module)] > 1:
        return f"the model holds it in {holders[id(module)]} places"
    return "it is called from outside the module that holds it" if module in reached else ""


def _follower(name: str, views: dict[str, dict[str, str] | str]) -> str:
    """Returns the operation after a batch norm, in its block, or in an outer one if the block returns the result."""
    above = name
    while above:
        above = above.rpartition(".")[0]
        view = views.get(above)
        if isinstance(view, str):
            return view
        follower = view and view.get(name.removeprefix(f"{above}."))
        if follower:
            return f"{follower} follows"
        if follower == "":
            name = above
    return "no ReLU follows"


def is_norm(module: nn.Module) -> bool:
    """Whether this is a batch norm that :func:`bnkern.convert` may fuse."""
    return "_conversion" in vars(module)


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else."""
    return type(module).__call__ is nn.Module.__call__ and "forward" not in vars(module)


class _Fusion:
    """The fusion of one block. ``apply`` finds the patterns in its forward and fuses them."""

    def __init__(
        self, block: nn.Module, holders: Counter[int], reached: set[nn.Module], fuse_conv: bool = False
    ) -> None:
        self.block, self.holders, self.reached, self.fuse_conv = block, holders, reached, fuse_conv
        self.name = type(block).__name__
        self.reaches: set[nn.Module] = set()  # the modules that this forward adds to ``reached``
        self.barred: set[str] = set()  # submodules that must be called and not inlined
        self.view: dict[str, str] | str = {}  # submodule -> the operation that uses its result, "" if it is returned

    def apply(self) -> set[nn.Module]:
        """Fuses the patterns. Returns the modules that are inlined in the block's recipe and no longer called."""
        try:
            graph, constants, patterns, inline = self._analyse()
        except Untraceable as reason:
            self.view = f"{self.name}.forward {reason}"
            self.reaches = reached_in_source(self.block)
            return set()
        self.view = {node.target: self._followers(node) for node in graph.nodes if node.op == "call_module"}
        replaced = []
        for match in patterns.matches:
            bn = self._module(match.bn)
            hooked = [n.target for n in (match.bn, match.relu) if n.op == "call_module" and has_hooks(self._module(n))]
            if hooked:
                self._set_reason(bn, f"{hooked[0]} has a hook")
            elif self._absorbs(match, graph, patterns):
                self._module(match.relu).__class__ = AbsorbedReLU
                self._fused(bn, "batch norm + ReLU")
            elif not self._replaceable():
                self._set_reason(bn, f"{self.name} does not run the forward of its class unchanged")
            else:
                replaced.append(match)
        for path, why in patterns.why.items():
            self._set_reason(self.block.get_submodule(path), why)
        if self.fuse_conv:
            for path, why in obstacles(graph, self.block.get_submodule).items():
                note_of(self.block.get_submodule(path)).why_no_chain = why
        if not replaced and not (self.fuse_conv and self._replaceable()):
            return set()
        try:
            recipe, chained = self._recipe(graph, constants, patterns, replaced, inline)
        except Exception as error:  # torch.fx does not accept the graph; the block keeps its own forward
            for match in replaced:
                self._set_reason(self._module(match.bn), f"{self.name}.forward could not be replaced: {error}")
            return set()
        if not replaced and not chained:
            return set()
        for match in replaced:
            self._fused(self._module(match.bn), "batch norm + ReLU" if match.add is None else "batch norm + add + ReLU")
        for path in chained:
            note = note_of(self.block.get_submodule(path))
            note.outcome = f"convolution + {note.outcome}"
        self.block._recipe = recipe  # type: ignore[assignment]
        self.block.__class__ = block_class(type(self.block))  # type: ignore[arg-type]  # a class is hashable
        return {self.block.get_submodule(path) for path in inline}

    def _module(self, node: fx.Node) -> nn.Module:
        return self.block.get_submodule(path_of(node))

    # ---------------------------------------------------------------------------------------------- analysis

    def _analyse(self) -> tuple[fx.Graph, dict, Patterns, frozenset[str]]:
        """Returns the trace and its patterns, with as few submodules inlined as the patterns need."""
        inline: frozenset[str] = frozenset()
        graph, constants, patterns = self._patterns(inline)
        self.reaches = reached_in_trace(self.block, graph)
        while patterns.enter:
            path = patterns.enter[0]
            try:
                graph, constants, patterns = self._patterns(inline | {path})
                inline |= {path}
            except Untraceable:
                self.barred.add(path)
                graph, constants, patterns = self._patterns(inline)
        needed = frozenset(p for p in inline if any(path_of(m.bn).startswith(f"{p}.") for m in patterns.matches))
        if needed != inline:
            self.barred |= inline
            graph, constants, patterns = self._patterns(needed)
        # An inlined forward is not analysed by itself later.
        self.reaches |= reached_in_trace(self.block, graph, needed)
        return graph, constants, patterns, needed

    def _patterns(self, inline: frozenset[str]) -> tuple[fx.Graph, dict, Patterns]:
        graph, constants = trace(self.block, inline)
        patterns = Patterns(graph, self.block.get_submodule, self._is_free_norm, self._can_enter)
        return graph, constants, patterns

    def _is_free_norm(self, module: nn.Module) -> bool:
        free = is_norm(module) and module.act is None and module not in self.reached
        return free and self.holders[id(module)] == 1

    def _can_enter(self, path: str) -> bool:
        """Whether a submodule may be inlined: only this block calls it, it is not one of torch's wrappers, which do
        more than a trace shows, and it has a batch norm that can be fused."""
        module = self.block.get_submodule(path)
        return (
            path not in self.barred
            and not is_norm(module)
            and any(self._is_free_norm(m) for m in module.modules())
            and (type(module) is nn.Sequential or not type(module).__module__.startswith("torch."))
            and self.holders[id(module)] == 1
            and not has_hooks(module)
            and has_plain_forward(module)
        )

    def _absorbs(self, match: Match, graph: fx.Graph, patterns: Patterns) -> bool:
        """Whether the ReLU is a module that is used only here, so that it can become an AbsorbedReLU."""
        if match.add is not None or match.relu.op != "call_module":
            return False
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        relu = self._module(match.relu)
        if calls.count(match.relu.target) > 1 or self.holders[id(relu)] > 1:
            return False
        if relu in self.reached or patterns.holder_is_called(match.relu):
            return False
        if not parameters(type(self.block))[1]:
            return True
        # The pattern must also exist if the forward gets its optional arguments.
        path = path_of(match.bn).split(".")
        try:
            inline = frozenset(".".join(path[:k]) for k in range(1, len(path)))
            graph, _ = trace(self.block, inline, options=True)
        except Untraceable:
            return False
        others = Patterns(graph, self.block.get_submodule, self._is_free_norm, self._can_enter).matches
        return any((m.bn.target, m.relu.target) == (match.bn.target, match.relu.target) for m in others)

    def _replaceable(self) -> bool:
        return has_plain_forward(self.block) and not isinstance(self.block, (fx.GraphModule, torch.jit.ScriptModule))

    # ------------------------------------------------------------------------------------------------- edits

    def _fused(self, bn: nn.Module, outcome: str) -> None:
        bn.act = "relu"  # type: ignore[assignment]
        note_of(bn).outcome, note_of(bn).why = outcome, ""

    def _recipe(
        self, graph: fx.Graph, constants: dict, patterns: Patterns, matches: list[Match], inline: frozenset[str]
    ) -> tuple[Recipe, set[str]]:
        """Makes the block's forward with one call for each match, and for each chain of convolutions if they are fused.

        It changes ``graph``, but not the modules. Returns also the paths of the batch norms in chains.
        """
        erased = set()
        for match in matches:
            last = match.bn if match.add is None else match.add
            addition = () if match.add is None else (match.residual, patterns.in_place(match.add))
            with graph.inserting_before(last):
                bn = graph.get_attr(path_of(match.bn))
                joined = graph.call_function(norm_relu, (bn, match.bn.args[0], *addition))
            match.relu.replace_all_uses_with(joined)
            # Remove the nodes that are not needed any more, from the ReLU backwards, each once it has no user left.
            for node in reversed(graph.nodes):
                if not node.users and (node in (match.relu, match.add, match.bn) or patterns.is_identity(node)):
                    graph.erase_node(node)
                    if node.op == "call_module":
                        erased.add(node.target)
        chained: set[str] = set()
        if self.fuse_conv:
            chained, uncalled = join_chains(graph, self.block.get_submodule)
            # Convolutions and batch norms are called by the chain if they have hooks. ReLUs are not.
            erased |= {path for path in uncalled if type(self.block.get_submodule(path)) is AbsorbedReLU}
        graph.lint()
        guards = [
            Guard(path, type(module), is_norm(module))
            for path in sorted(erased.union(inline))
            for module in [self.block.get_submodule(path)]
        ]
        return Recipe(graph, parameters(type(self.block))[0], constants, guards), chained

    # ---------------------------------------------------------------------------------------------- reasons

    def _set_reason(self, module: nn.Module, why: str) -> None:
        if is_norm(module) and module.act is None:
            note_of(module).why = why

    def _followers(self, node: fx.Node) -> str:
        for user in node.users:
            if user.op == "call_module":
                return type(self._module(user)).__name__
            if user.op != "output":
                return getattr(user.target, "__name__", str(user.target))
        return ""
