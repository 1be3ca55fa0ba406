"""Random networks for the tests of conversion: the source of each forward is drawn statement by statement.

Every value is [N, C, H, W], so that any statement may follow any other. The draw favours the forms that are fused,
batch norm -> (add) -> ReLU, and inserts what makes fusion difficult: values that are used twice, views, changes in
place, submodules that return their input, and batch norms at the end of a submodule. Not every forward has a backward,
because torch refuses some changes in place. The test detects this.
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

C = 3
SHAPE = (2, C, 3, 3)

RELU = [
    "F.relu({a})",
    "F.relu({a}, inplace=True)",
    "F.relu({a}, True)",
    "F.relu_({a})",
    "torch.relu({a})",
    "torch.relu_({a})",
    "{a}.relu()",
    "{a}.relu_()",
    "self.relu({a})",
    "self.relu_in_place({a})",
    "F.relu(input={a})",
]
OTHER_RELU = ["F.relu6({a})", "{a}.clamp(min=0)", "torch.maximum({a}, {a} * 0)"]
ADD = [
    "{a} + {b}",
    "{b} + {a}",
    "torch.add({a}, {b})",
    "{a}.add({b})",
    "{a}.add_({b})",
    "torch.add({b}, other={a})",
    "{a} + {b}[:1]",
    "{a} + {b}.mean((2, 3), keepdim=True)",
]
OTHER_ADD = [
    "torch.add({a}, {b}, alpha=0.5)",
    "{a} + 0.25",
    "{a} - {b}",
    "sum([{a}, {b}])",
    "torch.stack([{a}, {b}]).sum(0)",
    "torch.cat([{a}, {b}], 1)[:, 1:4]",
    "torch.cat([{a}, {b}], 1).chunk(2, 1)[1]",
    "self.wide(torch.cat([{a}, {b}], 1))",
]
SAME_MEMORY = [
    "{a}",
    "{a}[:]",
    "{a}.view_as({a})",
    "{a}.transpose(2, 3)",
    "{a}.flatten(2).unflatten(2, (3, 3))",
    "{a}.flip(0)",
    "{a}.detach()",
    "{a}.contiguous()",
    "self.identity({a})",
    "self.passes({a})",
    "F.dropout({a}, 0.0)",
]
IN_PLACE = [
    "{a} += {b}",
    "{a}.add_({b})",
    "{a}.mul_(0.5)",
    "{a}.relu_()",
    "F.relu({a}, inplace=True)",
    "self.relu_in_place({a})",
    "self.halves({a})",
    "{a}[:, :2].neg_()",
    "{a}.copy_({b})",
    "{a} *= {b}",
]
MODULES = ["self.halves({a})", "self.pool({a})", "self.tail({a})", "self.tail2({a})", "self.act({a})", "{a} * 0.5"]


class Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


@dataclass
class Forward:
    """The source of a forward, and of the forwards of its submodules ``body`` and ``body2``."""

    source: str
    bodies: dict[str, "Forward"] = field(default_factory=dict)

    @property
    def children(self) -> list[str]:
        """Paths of the batch norms and ReLUs that a forward above this one might call directly."""
        paths = (".bn4", ".relu", ".relu_in_place", ".tail[1]", ".act[0]", ".act[1]")
        return [path for path in paths if f"self{path.split('[')[0]}(" in self.source]

    def __repr__(self) -> str:
        return "\n".join([self.source, *(f"# self.{name}:\n{body!r}" for name, body in self.bodies.items())])

    def build(self) -> nn.Module:
        """A float64 network with random parameters and running statistics, which are the same for every call."""
        torch.manual_seed(0)
        network = self._module()
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if "running" in name or tensor.dim() == 1:
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
        return network.double()

    def _module(self) -> nn.Module:
        scope = {"torch": torch, "F": F}
        exec(self.source, scope)
        # A large eps, because a batch norm of nearly constant values would multiply roundings by 1 / sqrt(eps).
        children = {f"bn{k}": nn.BatchNorm2d(C, eps=0.1) for k in range(5)}
        children |= {f"conv{k}": nn.Conv2d(C, C, 3, padding=1) for k in range(3)}
        children |= {
            "wide": nn.Conv2d(2 * C, C, 1),
            "relu": nn.ReLU(),
            "relu_in_place": nn.ReLU(inplace=True),
            "act": nn.Sequential(nn.BatchNorm2d(C, eps=0.1), nn.ReLU(inplace=True)),
            "tail": nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, eps=0.1)),
            "tail2": nn.Sequential(nn.Sequential(nn.BatchNorm2d(C, eps=0.1)), nn.Identity()),
            "identity": nn.Identity(),
            "passes": Passes(),
            "halves": Halves(),
            "pool": nn.AvgPool2d(3, 1, 1),
        }
        children |= {name: body._module() for name, body in self.bodies.items()}
        network = type("Drawn", (nn.Module,), {"forward": scope["forward"]})()
        for name, child in children.items():
            if name in self.source:
                network.add_module(name, child)
        return network


def forwards() -> st.SearchStrategy[Forward]:
    """Drawn from a seed.

    If hypothesis drew statement by statement, it would prefer short forwards, which test little.
    """
    return st.integers(0, 2**63 - 1).map(lambda seed: _forward(random.Random(seed)))


def _forward(rng: random.Random, depth: int = 2) -> Forward:
    inputs = ["x", "z"] if depth == 2 else ["x"]
    bodies = {}
    for name in ("body", "body2")[: rng.randint(0, depth)]:
        bodies[name] = _forward(rng, depth - 1)
    values, lines = list(inputs), []
    norms = [f"self.bn{k}({{a}})" for k in range(5)]
    # Submodules, and calls of their children.
    inner = [f"self.{name}{path}({{a}})" for name in bodies for path in ("", *bodies[name].children)]

    def value(besides: str = "") -> str:
        """Usually one of the last three values, and usually not ``besides``."""
        choices = ([v for v in values if v != besides] if rng.randint(0, 7) else None) or values
        return rng.choice(choices[-3:] if rng.randint(0, 3) else choices)

    def assign(form: str, a: str) -> str:
        name = f"v{len(lines)}"
        lines.append(f"{name} = " + form.format(a=a, b=value(besides=a)))
        values.append(name)
        return name

    def interlude() -> None:
        """Usually nothing, otherwise a statement in between that may prevent fusion."""
        kind = rng.randint(0, 8)
        if kind > 6:
            lines.append(rng.choice(IN_PLACE).format(a=value(), b=value()))
        elif kind == 6:
            assign(rng.choice(SAME_MEMORY), value())

    def norm_add_relu() -> None:
        a = value()
        if rng.random() < 0.5:
            a = assign(f"self.conv{rng.randint(0, 2)}({{a}})", a)
            interlude()
        last = rng.randint(0, 4)
        if last == 0:
            a = assign(rng.choice(["self.tail({a})", "self.tail2({a})"]), a)
        elif last == 1 and bodies:
            a = assign(rng.choice(inner), a)
        else:
            a = assign(norms.pop() if norms else "self.bn0({a})", a)
        interlude()
        if rng.randint(0, 2):
            a = assign(rng.choice(ADD), a)
            interlude()
        assign(rng.choice(RELU), a)

    def anything() -> None:
        kind = rng.randint(0, 6)
        forms = [RELU, ADD, OTHER_RELU, OTHER_ADD, SAME_MEMORY, MODULES, IN_PLACE][kind]
        if forms is IN_PLACE:
            lines.append(rng.choice(forms).format(a=value(), b=value()))
        else:
            assign(rng.choice(forms + inner * (forms is MODULES)), value())

    for _ in range(rng.randint(*((3, 6) if depth == 2 else (1, 2)))):
        (norm_add_relu if rng.randint(0, 2) else anything)()
    if depth < 2:
        lines.append(f"return {values[-1]}")
    else:
        others = [value() for _ in range(rng.randint(0, 2))]
        result = ", ".join([values[-1], *others])
        lines.append(
            f"return {{'out': {values[-1]}, 'more': [{result}]}}" if rng.random() < 0.5 else f"return {result}"
        )
    return Forward("\n    ".join([f"def forward(self, {', '.join(inputs)}):", *lines]), bodies)
