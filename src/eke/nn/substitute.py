"""What stands in for softmax attention inside a model that was converted.

A converted module keeps its class, its parameters and their names; its class gets a subclass whose `forward` runs with
one function exchanged: `scaled_dot_product_attention` goes to the module's own child `linear`, a `HybridAttention`.
(torch's parametrizations work the same way.) `MultiheadAttention`, which calls fused kernels, gets a `forward` of its
own. While attention is transferred, the child gives the softmax's outputs and learns beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .hybrid_attention import HybridAttention, HybridState, MapName, MapRule
from .softmax_sites import AttentionSite, MaskReader, seen_by_heads, seen_keys

CHILD = "linear"
"""Name of the child that a converted module gets."""


class Asked(NamedTuple):
    """A call of attention: queries, keys, values (batch, heads, length, dim), and what may be seen."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    scale: float | None


Lesson = Callable[["Substitute", Asked, Tensor], Tensor | None]
"""`lesson(substitute, asked, outputs)`: called with what the softmax answers; what it returns goes on in its place."""


class Remembers(Protocol):
    """Where a sequence's state is kept from call to call."""

    state: HybridState | None


class Substitute(HybridAttention):
    """Takes the calls of softmax attention in one module.

    Args:
        site: Where it stands.
        reader: Of masks, shared by the model's layers.
        window: See `HybridAttention`.
        feature_map: See `HybridAttention`.
    """

    def __init__(self, site: AttentionSite, reader: MaskReader, *, window: int, feature_map: MapName | MapRule) -> None:
        # Another sequence's keys stand at no distance from the queries.
        self.beside = site.beside
        super().__init__(site.heads, site.dim, window=window if self.beside else 0, feature_map=feature_map)
        self.causal = site.causal
        self._reader = reader
        self.lesson: Lesson | None = None
        self.kept: Remembers | None = None

    def widen_(self, window: int) -> int:
        """Set the window, which stays 0 for attention to another sequence.

        Args:
            window: Positions on either side.

        Returns:
            The window that it has now.
        """
        return super().widen_(window) if self.beside else 0

    def instead(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        real: Tensor | None = None,
    ) -> Tensor:
        """Attend as `scaled_dot_product_attention` is asked to.

        Args:
            query: (batch, heads, queries, dim).
            key: (batch, key heads, keys, dim).
            value: (batch, key heads, keys, values).
            attn_mask: Padding, the past, or both.
            dropout_p: Not used: there are no single weights to drop.
            is_causal: Whether positions see the past alone.
            scale: Of the scores.
            enable_gqa: Whether heads share keys; seen from the shapes.
            real: Which keys are real, (batch, keys), besides the mask.

        Returns:
            (batch, heads, queries, values).

        Raises:
            ValueError: if the mask is one that linear attention cannot have, or not of the kind it was converted for.
        """
        kept, self.kept = self.kept, None
        packed = query.shape
        if query.shape[1] != self.heads and query.shape[1] * query.shape[2] == self.heads:
            query = query.reshape(query.shape[0], self.heads, 1, query.shape[3])  # heads that share keys, side by side
        queries, keys = query.shape[2], key.shape[2]
        # Of a batch whose samples have one real key each, a mask of pairs leaves open which kind it is.
        pairs = attn_mask is not None and attn_mask.shape[-2] == queries
        kind, found = self._mask(attn_mask, queries, keys, is_causal or (self.causal and (queries == 1 or pairs)))
        if queries > 1 and kind != self.causal:
            words = {True: "the past alone", False: "all positions"}
            raise ValueError(
                f"This attention was converted to see {words[self.causal]} and is now asked to see {words[kind]}: "
                "convert the model as it is used."
            )
        if found is not None:
            found = found.expand(query.shape[0], -1)
            real = found if real is None else real & found
        groups = self.heads // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if self.lesson is not None:
            asked = Asked(query, key, value, real, scale)
            out = self._softmax(asked, attn_mask, is_causal)
            answer = self.lesson(self, asked, out)
            out = out if answer is None else answer
        else:
            state = None if kept is None else kept.state
            out, state = self(query, key, value, causal=self.causal, real=real, scale=scale, state=state)
            if kept is not None:
                kept.state = state
        return out.reshape(*packed[:3], value.shape[3])

    def real(self, padding: Tensor, queries: int, keys: int) -> Tensor | None:
        """Return which keys are real, (batch, keys), by a mask (batch, 1, 1, keys).

        Args:
            padding: The mask, bool or added to the scores.
            queries: Positions that ask.
            keys: Keys.
        """
        return self._mask(padding, queries, keys, self.causal)[1]

    def _softmax(self, asked: Asked, mask: Tensor | None, causal: bool) -> Tensor:
        """Return what softmax attention gives."""
        q, k, v, real, scale = asked
        if mask is None and real is not None:
            mask, causal = real[:, None, None], False
            if self.causal:
                mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

    def _mask(self, mask: Tensor | None, queries: int, keys: int, causal: bool) -> tuple[bool, Tensor | None]:
        if mask is not None and mask.shape[-1] > keys and self.causal:
            mask = mask[..., -keys:]  # of earlier keys, which the state holds
            if queries == 1:
                return causal, mask.reshape(mask.shape[0], -1, keys)[:, -1] if mask.dtype == torch.bool else None
        try:
            return self._reader(mask, queries, keys, causal=causal)
        except ValueError as error:
            raise ValueError(f"Converted attention cannot do this: {error}.") from error


class _Instead(TorchFunctionMode):
    """Sends softmax attention to a substitute.

    Args:
        substitute: It.
    """

    def __init__(self, substitute: Substitute) -> None:
        super().__init__()
        self._substitute = substitute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._substitute.instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def substitutes(model: nn.Module) -> dict[str, Substitute]:
    """Return the substitutes of a converted model by the names of the modules that hold them."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Substitute))
    return {name.rpartition(".")[0]: module for name, module in found}


def converted_from(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module had before it was converted, None if it was not.

    Args:
        module: Any.
    """
    if not isinstance(module._modules.get(CHILD), Substitute):
        return None
    kind = type(module).__mro__[1]
    return kind if type(module) is _converted(kind) else None


@functools.cache
def _converted(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module's class whose attention is its child's."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Instead(getattr(self, CHILD)):
            return kind.forward(self, *args, **kwargs)

    own = _multihead_forward if kind is nn.MultiheadAttention else forward
    return type(f"Linear{kind.__name__}", (kind,), {"forward": own, "__module__": kind.__module__})


def substitute_(module: nn.Module, substitute: Substitute) -> None:
    """Make a module call a substitute in the place of softmax attention, in place.

    Args:
        module: It.
        substitute: Becomes its child, on the module's device and in its type, float32 for shorter ones.

    Raises:
        ValueError: if it has something of the child's name.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"{type(module).__name__} has a {CHILD!r} of its own: it cannot be converted.")
    like = next(module.parameters(), torch.empty(0))
    substitute.to(like.device, torch.promote_types(like.dtype, torch.float32)).train(module.training)
    module.add_module(CHILD, substitute)
    module.__class__ = _converted(type(module))  # type: ignore[arg-type]


def _multihead_forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    *,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Return outputs and None for weights, which do not exist; arguments as those of `MultiheadAttention`."""
    batched = query.ndim == 3
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    separate: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    weights = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else separate
    q, k, v = (
        F.linear(x, w, b).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases)
    )
    substitute: Substitute = getattr(self, CHILD)
    real = None if key_padding_mask is None else substitute.real(seen_keys(key_padding_mask), q.shape[2], k.shape[2])
    mask = None if is_causal else seen_by_heads(attn_mask, self.num_heads)
    out = self.out_proj(substitute.instead(q, k, v, mask, is_causal=is_causal, real=real).transpose(1, 2).flatten(2))
    if not batched:
        return out.squeeze(0), None
    return (out if self.batch_first else out.transpose(0, 1)), None
