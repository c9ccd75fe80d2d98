"""Attention heads: which rows of the projections, columns of the output matrix and counts of a module are one head.

A module that counts heads (num_heads, num_attention_heads, ...) or their size (head_dim, ...) and has layers whose
outputs are whole heads is taken for an attention. Head h of size D is rows h D .. (h + 1) D of each projection (of a
fused one in each of its parts, part by part or head by head); with fewer heads of keys than of queries, a unit is a
head of keys and values with all its heads of queries. The matrix that reads the heads is found by marking them
(`taint`), wherever it stands. What counts heads afterwards are the module's own integers. All of it is a proposal;
`proof` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Axes, ChannelGroup, Member, NotCuttableError, axes_of, is_conv1d
from .taint import BOTH, MIXING, MixedError, follow, reading_members, split_by_source

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_q_heads", "nh")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size", "d_kv", "d_head")
LAYOUTS = ("by part", "by head")
"""How the heads may lie in a projection that makes queries, keys and values, the likeliest first."""


@dataclass(frozen=True)
class _Attention:
    """A module that looks like an attention.

    Args:
        name: Of the module.
        units: Heads that can go alone: those of the keys, or of the queries if all share the keys.
        queries: Heads of queries.
        keys: Heads of keys and values.
        size: Channels of a head.
        layers: Rows of each unit, (units, r), by name of a projection.
        counted: (layer, rows of it a head) that the numbers of heads of queries and of keys are read from.
    """

    name: str
    units: int
    queries: int
    keys: int
    size: int
    layers: Mapping[str, Tensor]
    counted: tuple[tuple[str, int], tuple[str, int]]


def counts_heads(module: nn.Module) -> bool:
    """Return whether a module has a number of heads or their size, as attentions do."""
    return not _integers(module).keys().isdisjoint((*_HEADS, *_SIZES))


def head_groups(
    model: nn.Module, call: Callable[[nn.Module], object], *, layout: str, without: Collection[str] = ()
) -> tuple[list[list[ChannelGroup]], list[tuple[str, str]]]:
    """Propose the heads of every attention, if its projections lie in one layout.

    Args:
        model: In evaluation mode.
        call: Runs the model on example inputs.
        layout: One of `LAYOUTS`; of the second only attentions with a fused projection are proposed.
        without: Names of attentions to leave out.

    Returns:
        For each attention the groups to be tried, in this order, of which one may hold; and (module, reason) where
        there is none.
    """  # noqa: DOC501
    order = _call_order(model, call)
    seen = []
    for name, module in model.named_modules():
        found = None if name in without else _recognised(model, name, module, order, layout)
        fused = found is not None and any(len(rows) * found.size < rows.numel() for rows in found.layers.values())
        if found is not None and (fused or layout == LAYOUTS[0]):
            seen.append(found)
    tries: list[list[ChannelGroup]] = []
    failures: list[tuple[str, str]] = []
    for attention, held in _followed(model, call, seen) if seen else ():
        try:
            if isinstance(held, MixedError):
                raise held
            readers = reading_members(model, held)
            if not any(member.axes.matrix for member in readers):
                raise MixedError("no matrix reads its heads")
            tries.append(_groups(model, attention, readers))
        except (MixedError, NotCuttableError) as error:
            failures.append((attention.name, str(error)))
    return tries, failures


def _followed(
    model: nn.Module, call: Callable[[nn.Module], object], seen: Sequence[_Attention]
) -> Iterable[tuple[_Attention, dict[str, Tensor] | MixedError]]:
    """Yield what holds the heads of each attention: all followed at once, one by one where that is not clear."""
    sources: dict[str, tuple[Tensor, Tensor]] = {}
    numbers, first = [], 0
    for attention in seen:
        numbers.append(torch.arange(first, first + attention.units))
        sources |= _sources(attention, numbers[-1])
        first += attention.units
    try:
        held = follow(model, call, sources)
    except MixedError:
        held = None
    for attention, units in zip(seen, numbers):
        here = split_by_source(held, units) if held is not None else {}
        readers = {name: unit for name, unit in here.items() if not bool((unit < -1).any())}
        if held is not None and readers:
            yield attention, readers
            continue
        try:
            yield attention, follow(model, call, _sources(attention, units - units[0]))
        except MixedError as error:
            yield attention, error


def _sources(attention: _Attention, numbers: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {layer: (numbers, rows) for layer, rows in attention.layers.items()}


def _call_order(model: nn.Module, call: Callable[[nn.Module], object]) -> dict[str, int]:
    """Return the position of each layer's last call in a forward pass."""
    order: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order[name] = len(order)

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if _is_matrix(m)]
    try:
        with torch.no_grad():
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _recognised(
    model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int], layout: str
) -> _Attention | None:
    """Return what looks like an attention's heads in a module, None if nothing does."""
    numbers = _integers(module)
    size = next((numbers[key] for key in _SIZES if key in numbers), 0)
    heads = next((numbers[key] for key in _HEADS if key in numbers), 0)
    widths = {
        f"{name}.{child}" if name else child: _width(layer)
        for child, layer in module.named_children()
        if _is_matrix(layer) and (f"{name}.{child}" if name else child) in order
    }
    layers = sorted(widths, key=lambda layer: order[layer])
    if not layers or not (size or heads):
        return None
    size = size or min(widths.values()) // heads
    if len(layers) > 3 or any(widths[layer] == 3 * heads * size for layer in layers[:-1]):
        layers = layers[:-1]  # what is called last reads the heads
    wide = [widths[layer] for layer in layers if size and widths[layer] % size == 0]
    if not wide:
        return None
    queries = heads or max(wide) // size
    fused = queries * size
    narrow = [width // size for width in wide if width < fused]
    keys = min(narrow, default=queries)
    if queries < 2 or queries % keys:
        return None
    units = keys if keys > 1 else queries
    rows = {
        layer: _rows(widths[layer] // size, units, (queries, keys), size, layout)
        for layer in layers
        if widths[layer] % size == 0
    }
    known = {layer: found for layer, found in rows.items() if found is not None}
    if not known:
        return None
    by_queries = next((layer for layer in known if widths[layer] >= fused), None)
    if by_queries is None:
        return None
    by_keys = next((layer for layer in known if widths[layer] == keys * size), by_queries)
    counted = tuple(
        (layer, len(known[layer][0]) * units // number) for layer, number in ((by_queries, queries), (by_keys, keys))
    )
    return _Attention(name, units, queries, keys, size, known, counted)  # type: ignore[arg-type]


def _rows(heads: int, units: int, counts: tuple[int, int], size: int, layout: str) -> Tensor | None:
    """Return the rows (units, r) of each unit in a projection of `heads` heads, None if they are no whole units."""
    queries, keys = counts
    inner = torch.arange(size)
    if heads % units:
        return None
    if heads in (queries, keys) or keys != queries:
        each = heads // units
        return torch.arange(units * each * size).view(units, each * size)
    parts = heads // units
    head, part = torch.arange(units)[:, None, None], torch.arange(parts)[:, None]
    first = part * units + head if layout == "by part" else head * parts + part
    return (first * size + inner).flatten(1)


def _groups(model: nn.Module, attention: _Attention, readers: Sequence[Member]) -> list[ChannelGroup]:
    """Return the group with the likeliest counts, and the one with all integers that fit."""
    module = model.get_submodule(attention.name)
    members = [
        Member.of(model.get_submodule(layer), layer, rows, axes_of(model.get_submodule(layer), "out"))
        for layer, rows in attention.layers.items()
    ]
    members += _own_members(module, attention)
    groups = []
    for every in (False, True):
        counts = _counts(module, attention, every=every)
        groups.append(ChannelGroup(attention.name, attention.units, (*members, *counts, *readers), unit="heads"))
    return groups


def _counts(module: nn.Module, attention: _Attention, *, every: bool) -> list[Member]:
    """Return the members that count what stays of the heads."""
    numbers = _integers(module)
    prefix = len(attention.name) + 1 if attention.name else 0
    found = []
    for which, (layer, rows) in enumerate(attention.counted):
        if which and attention.keys < attention.units:
            continue  # all queries share the keys, which stay
        child = layer[prefix:]
        dim = 1 if is_conv1d(module.get_submodule(child)) else 0
        heads = attention.keys if which else attention.queries
        counts = []
        for key, value in numbers.items():
            of_keys = "kv" in key or "key_value" in key
            names_heads = "head" in key and "dim" not in key and "size" not in key
            if names_heads and value == heads and not key.endswith("groups") and of_keys == bool(which):
                counts.append((key, f"{child}.weight", dim, rows))
            elif not which and value == attention.queries * attention.size and (every or _counts_channels(key)):
                counts.append((key, f"{child}.weight", dim, rows // attention.size))
            elif not which and attention.keys == 1 and key.endswith("groups") and value == attention.queries:
                counts.append((key, f"{child}.weight", dim, rows))
        if counts:
            axes = Axes("out", ((f"{child}.weight", dim),), tuple(counts))
            found.append(Member.of(module, attention.name, attention.layers[layer], axes))
    return found


def _counts_channels(key: str) -> bool:
    return any(word in key for word in ("all_head", "attn_dim", "inner_dim", "split_size", "attention_dim"))


def _own_members(module: nn.Module, attention: _Attention) -> list[Member]:
    """Return parameters inside the attention with one entry a head, or one a channel of a head (biases, scales)."""
    found = []
    each = attention.queries // attention.units
    for name, inner in module.named_modules():
        full = ".".join(part for part in (attention.name, name) if part)
        if isinstance(inner, (*BOTH, *MIXING, nn.modules.conv._ConvNd)) or full in attention.layers:
            continue
        if _is_matrix(inner):
            if "." in name and _width(inner) == attention.queries:  # a small network that makes a bias for each head
                rows = torch.arange(attention.queries).view(attention.units, each)
                found.append(Member.of(inner, full, rows, axes_of(inner, "out")))
            continue
        heads = [
            key for key, value in _integers(inner).items() if name and "head" in key and value == attention.queries
        ]
        for key, tensor in {**inner._parameters, **inner._buffers}.items():
            if tensor is None:
                continue
            table = isinstance(inner, nn.Embedding)
            dims = [d for d, size in enumerate(tensor.shape) if size == attention.queries and not (table and d == 0)]
            wide = [d for d, size in enumerate(tensor.shape) if size == attention.queries * attention.size]
            for places, width in ((dims, each), (wide, each * attention.size)):
                if places and (len(places) == 1 or places[0] + 1 < tensor.dim()):
                    dim = places[-1] if table else places[0]
                    rows = torch.arange(attention.units * width).view(attention.units, width)
                    counted = [("embedding_dim", key, dim, 1)] if table else []
                    counted += [(name_, key, dim, width // each) for name_ in heads]
                    found.append(Member.of(inner, full, rows, Axes("both", ((key, dim),), tuple(counted))))
                    break
    return found


def _integers(module: nn.Module) -> dict[str, int]:
    return {key: value for key, value in vars(module).items() if type(value) is int and value > 0}


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _width(module: nn.Module) -> int:
    return int(module.nf if is_conv1d(module) else module.out_features)  # type: ignore[arg-type]
