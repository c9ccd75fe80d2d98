"""All blocks of a token as one native call, and whether that call still is what the blocks do.

Attention that `linearize` converted is taken along as `ops.decode.Hybrid`: causal, with a feature map that the step
knows (elu, ReLU, T2R, Hedgehog).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..ops.decode import Decoder, Hybrid, Map
from .feature_maps import T2R, Hedgehog
from .hybrid_attention import _Elu
from .substitute import CHILD, Substitute

_MAPS: dict[type[nn.Module], Any] = {_Elu: "elu", nn.ReLU: "relu", T2R: "t2r", Hedgehog: "hedgehog"}
PARTS: frozenset[type[nn.Module]] = frozenset({Substitute, *_MAPS})
"""Classes of modules that converted attention may hold."""


class FusedStep:
    """A `Decoder` on the parameters of blocks, and whether it still is what the blocks do.

    Args:
        decoder: The step.
        modules: All modules that it stands for.
    """

    def __init__(self, decoder: Decoder, modules: Sequence[nn.Module]) -> None:
        self.decoder, self._modules = decoder, tuple(modules)
        self._parts: list[tuple[dict[str, Any], str, object]] = [
            (parts, name, part)
            for module in modules
            for parts in (module._parameters, module._modules, module._buffers)
            for name, part in parts.items()
        ]
        self._windows = [(module, module.window) for module in modules if isinstance(module, Substitute)]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Return None for a copy of a model, which has parameters of its own and makes its own step."""
        return type(None), ()

    def current(self) -> bool:
        """Return whether no parameter, module or window was replaced since, and nobody wants to see a call."""
        if not all(parts.get(name) is part for parts, name, part in self._parts):
            return False
        if any(part.window != window or part.lesson is not None for part, window in self._windows):
            return False
        return not any(map(watched, self._modules))


def watched(module: nn.Module) -> bool:
    """Return whether a call of a module is more than its class's forward: hooks, or a forward of its own.

    Args:
        module: Any.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def described_hybrid(attention: nn.Module, heads: int, size: int) -> Hybrid | None:
    """Return a converted attention as a step knows it.

    Args:
        attention: What holds a substitute.
        heads: That it should have.
        size: Of a head.

    Returns:
        The description; None for attention to both sides, other sizes, other feature maps, or while it is taught.
    """
    part = attention._modules.get(CHILD)
    if type(part) is not Substitute or not part.causal or part.lesson is not None:
        return None
    maps = part.query_map, part.key_map
    if (part.heads, part.dim) != (heads, size) or any(type(f) not in _MAPS for f in maps):
        return None
    query_map, key_map = (
        Map(_MAPS[type(f)], f._parameters.get("weight"), f._parameters.get("bias")) for f in maps
    )  # fmt: skip
    if query_map.name != key_map.name or query_map.features(size) != key_map.features(size):
        return None
    return Hybrid(query_map, key_map, part.window, part.balance)
