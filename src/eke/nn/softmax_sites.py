"""Attention sites: the modules in which a model calls softmax attention, found by watching one batch run.

A site is the innermost module whose `forward` calls `torch.nn.functional.scaled_dot_product_attention`, or a
`torch.nn.MultiheadAttention`. So attention is found in Hugging Face models, timm's, torch's own and hand-written ones
alike, whatever else they do to queries and keys (rotations, norms, shared key heads). Masks are read: padding, the
past alone, or both can be had linearly; biases and other masks cannot, and the site says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._types import Batch

Forward = Callable[[nn.Module, Batch], Any]
"""`forward(model, batch)`: runs the model on a batch."""

_KIND = ("heads", "dim", "causal", "beside")
"""What all calls of a module must have in common."""
_LABELS = ("labels", "label", "targets", "target")
_MASKED = -1e4
"""What is added to scores at most where a float mask leaves a key out."""


@dataclass(frozen=True)
class AttentionSite:
    """A module that calls softmax attention.

    Args:
        name: Of the module.
        heads: Heads of queries.
        dim: Size of queries and keys a head.
        causal: Whether positions see the past alone.
        queries: Positions of the batch that was watched.
        keys: Keys that they saw.
        reason: Why it cannot be converted; None where it can.
        across: Whether keys are known to be of another sequence: `MultiheadAttention` is given both.
    """

    name: str
    heads: int
    dim: int
    causal: bool
    queries: int
    keys: int
    reason: str | None = None
    across: bool = False

    @property
    def beside(self) -> bool:
        """Whether keys stand at the positions of the queries, as far as can be seen."""
        return self.queries == self.keys and not self.across


def call_on(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: a tensor, a dictionary (labels left out), or (inputs, targets).

    Args:
        model: Any module.
        batch: The batch.

    Returns:
        What the model returns.

    Raises:
        TypeError: if the batch has another form.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name not in _LABELS})
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs = batch[0]
        return call_on(model, inputs) if isinstance(inputs, Tensor | Mapping) else model(*inputs)
    raise TypeError(
        f"A batch is a tensor, a dictionary or (inputs, targets), got {type(batch).__name__}: say how the model is "
        "called with forward=."
    )


class MaskReader:
    """Reads masks of attention; the last one, which all layers share, is read once."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._asked: tuple[Any, ...] = ()
        self._found: tuple[bool, Tensor | None] = (False, None)

    def __call__(self, mask: Tensor | None, queries: int, keys: int, *, causal: bool) -> tuple[bool, Tensor | None]:
        """Say what a mask means.

        Args:
            mask: As `scaled_dot_product_attention` takes it.
            queries: Positions that ask.
            keys: Keys of the mask.
            causal: What holds where the mask leaves it open (a single query).

        Returns:
            Whether positions see the past alone, and which keys are real (batch or 1, keys), None for all.

        Raises:
            ValueError: if it is neither padding nor the past.
        """  # noqa: DOC502
        if mask is None:
            return causal, None
        asked = (None if mask.is_inference() else mask._version, queries, keys, causal)
        if self._mask is None or self._mask() is not mask or self._asked != asked:
            self._found = read_mask(mask, queries, keys, causal=causal)
            self._mask, self._asked = weakref.ref(mask), asked
        return self._found

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskReader:
        new = memo[id(self)] = MaskReader()
        return new


def read_mask(mask: Tensor, queries: int, keys: int, *, causal: bool) -> tuple[bool, Tensor | None]:
    """Say what a mask means; see `MaskReader`.

    Args:
        mask: (..., queries or 1, keys), bool (True: seen) or added to the scores.
        queries: Positions that ask.
        keys: Keys.
        causal: What holds where the mask leaves it open: a single query, a single key that is real.

    Returns:
        Whether positions see the past alone, and which keys are real.

    Raises:
        ValueError: if it is neither padding nor the past.
    """
    shape = tuple(mask.shape)
    if mask.ndim < 2 or mask.ndim > 4 or shape[-1] != keys or shape[-2] not in (1, queries):
        raise ValueError(f"the mask {shape} is not one of {queries} queries and {keys} keys")
    allowed = mask if mask.dtype == torch.bool else mask > _MASKED
    if mask.dtype != torch.bool and bool((mask.masked_fill(~allowed, 0) != 0).any()):
        raise ValueError("a bias is added to its scores, which linear attention cannot do")
    allowed = allowed.reshape((1,) * (4 - mask.ndim) + shape)
    if allowed.shape[1] > 1 and not bool((allowed == allowed[:, :1]).all()):
        raise ValueError("its heads have different masks")
    allowed = allowed[:, 0]
    real = allowed.any(1)
    if allowed.shape[1] == 1:
        return causal, real
    past = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    # What positions see that are not real themselves does not matter.
    asks = real[:, keys - queries :, None] if queries <= keys else real.new_ones(1, queries, 1)
    for kind in (causal, not causal):
        wanted = real[:, None] & past if kind else real[:, None]
        if bool(((allowed == wanted) | ~asks).all()):
            return kind, real
    raise ValueError("its mask is neither padding nor the past: other pairs of positions are left out")


class _Watch(TorchFunctionMode):
    """Notes every call of softmax attention and the module that makes it.

    Args:
        note: Called with the function and its arguments.
    """

    def __init__(self, note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            self._note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def attention_sites(model: nn.Module, batch: Batch, *, forward: Forward = call_on) -> tuple[AttentionSite, ...]:
    """Find the modules that call softmax attention.

    Args:
        model: Any module; not changed. Attention must run through `scaled_dot_product_attention`: Hugging Face models
            with `attn_implementation="sdpa"`, timm's with fused attention.
        batch: A batch to watch.
        forward: Runs the model on it.

    Returns:
        One site a module, in the order of their first calls; a module with several kinds of calls has a reason not to
        be converted.
    """
    stack: list[str] = []
    found: dict[str, AttentionSite] = {}
    modules = dict(model.named_modules())

    def note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = stack[-1] if stack else ""
        site = _described(name, modules[name], func, args, kwargs)
        known = found.get(name)
        if known is not None and any(getattr(known, x) != getattr(site, x) for x in _KIND):
            site = replace(known, reason="it attends in several ways, which one substitute cannot")
        found[name] = site if known is None or known.reason is None else known

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(leave) for module in modules.values()]
    flags = {module: module.training for module in modules.values()}
    try:
        model.eval()
        with torch.no_grad(), _Watch(note):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags.items():
            module.training = training
    return tuple(found.values())


def _described(name: str, module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionSite:
    """Return the site of one call."""
    if func is F.multi_head_attention_forward:
        return _multihead(name, module, args, kwargs)
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
    q, k, mask = given["query"], given["key"], given.get("attn_mask")
    queries, keys = q.shape[-2], k.shape[-2]
    site = AttentionSite(
        name, q.shape[-3] if q.ndim == 4 else 0, q.shape[-1], bool(given.get("is_causal")), queries, keys
    )
    if not name:
        return replace(site, reason="the model calls it itself, in no module of its own")
    if q.ndim != 4:
        return replace(site, reason=f"its queries are {tuple(q.shape)}, not (batch, heads, length, dim)")
    return _with_mask(site, mask)


def _with_mask(site: AttentionSite, mask: Tensor | None) -> AttentionSite:
    try:
        causal = site.causal
        if mask is not None:
            either = causal or mask.shape[-2] > 1  # masks of pairs are made for the past, padding alone needs none
            causal, _ = read_mask(mask, site.queries, site.keys, causal=either)
    except ValueError as error:
        return replace(site, reason=str(error))
    return replace(site, causal=causal)


def _multihead(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionSite:
    """Return the site of a MultiheadAttention."""
    query, key, value, width, heads = args[:5]
    hint = bool(kwargs.get("is_causal"))
    # Queries and keys may come from one sequence by different ways; keys and values that queries are not are another's.
    across = key is value and query is not key
    site = AttentionSite(name, heads, width // heads, hint, query.shape[0], key.shape[0], across=across)
    if type(module) is not nn.MultiheadAttention:
        return replace(site, reason=f"{type(module).__name__} is no torch.nn.MultiheadAttention itself")
    if module.bias_k is not None or module.add_zero_attn:
        return replace(site, reason="it adds keys of its own (add_bias_kv, add_zero_attn)")
    mask, padding = kwargs.get("attn_mask"), kwargs.get("key_padding_mask")
    site = _with_mask(site, None if hint else seen_by_heads(mask, heads))
    return site if padding is None or site.reason else _with_mask(site, seen_keys(padding))


def seen_keys(padding: Tensor) -> Tensor:
    """Return a `key_padding_mask` of MultiheadAttention, (batch, keys) or (keys,), as attention itself takes it."""
    padding = ~padding if padding.dtype == torch.bool else padding
    return padding.reshape(-1, 1, 1, padding.shape[-1])


def seen_by_heads(mask: Tensor | None, heads: int) -> Tensor | None:
    """Return an `attn_mask` of MultiheadAttention, whose True leaves out, as attention itself takes it."""
    if mask is None:
        return None
    mask = ~mask if mask.dtype == torch.bool else mask
    return mask.reshape(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
