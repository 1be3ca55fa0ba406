"""How torch.fx records the modules: a call of a module is one node, as for those of torch.nn."""

import torch
from torch import fx


def fx_leaf(module: torch.nn.Module, input: object, *others: object, **keywords: object) -> fx.Proxy | None:
    """Returns the call of ``module`` as one node if torch.fx is tracing, as it does for modules of torch.nn, else None.

    The result is also None if the module is the root of the trace, because the trace then goes into its forward.
    """
    if not isinstance(input, fx.Proxy) or not isinstance(input.tracer, fx.Tracer) or module is input.tracer.root:
        return None
    args = (input, *(other for other in others if other is not None))
    keywords = {name: value for name, value in keywords.items() if value is not None}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), args, keywords)
