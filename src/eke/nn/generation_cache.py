"""What a language model of transformers remembers while it generates: a state for linear attention, room for keys.

Layers for the `DynamicCache` of transformers: `RecurrentLayer` keeps S and the sum of keys of linear attention (its
`LinearAttentionLayer` with two states) and counts positions; `RoomLayer` keeps keys and values in memory that doubles
when it is full, in the place of a copy of everything for each token; `hf_cache.RecurrentLayer` keeps the state of
converted attention. `save_state` and `load_state` write a cache to a
safetensors file; `snapshot` copies one, for a prefix that is continued several times.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import MissingExtraError, require
from ..ops.decode import KeyValues
from .hf_cache import RecurrentLayer, hybrid_layer
from .hybrid_attention import HybridState
from .substitute import Substitute

_LINEAR, _KEPT = ("memory", "sum"), ("keys", "values")
_FIRST = 64
"""Positions that keys get room for at the beginning."""


@functools.cache
def _library() -> Any:
    """Return the module of transformers that the layers are built on.

    Raises:
        MissingExtraError: if transformers is missing or older than its states for linear attention.
    """
    library = require("transformers.cache_utils", extra="hf", purpose="A cache for generation")
    if not hasattr(library, "LinearAttentionLayer"):
        version = require("transformers", extra="hf", purpose="A cache for generation").__version__
        raise MissingExtraError(
            f"A cache for generation needs a transformers with states for linear attention (5.23 has them), found "
            f"{version}. Install it with: pip install --upgrade 'eke[hf]'."
        )
    return library


class _Sequences:
    """Changes of the batch, for layers that say how each of their tensors is changed."""

    _each: Callable[[Callable[[Tensor], Tensor]], None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take what these beams keep."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._each(lambda x: x[indices])


@functools.cache
def recurrent_layer() -> Any:
    """Return the class of layers that keep the state of linear attention."""
    library = _library()

    class RecurrentLayer(_Sequences, library.LinearAttentionLayer, library.CacheLayerMixin):  # type: ignore[misc, name-defined]
        """S (batch, heads, D, M), the sum of keys (batch, heads, D), and how many positions they stand for."""

        is_compileable = False  # it counts positions
        supports_early_init = False
        keys = values = None

        def __init__(self) -> None:
            library.LinearAttentionLayer.__init__(self, number_of_states=2)
            self.recurrent_states: dict[int, Any]
            self.has_previous_state: dict[int, bool]
            self.cumulative_length, self.is_initialized = 0, False

        def state(self) -> tuple[Tensor, Tensor] | None:
            """Return S and the sum of keys, None before the first position."""
            return (self.recurrent_states[0], self.recurrent_states[1]) if self.cumulative_length else None

        def put(self, state: tuple[Tensor, Tensor], positions: int) -> None:
            """Keep a state and count its positions."""
            for number, part in enumerate(state):
                self.update_recurrent_state(part, state_idx=number)
            self.advance(positions)

        def advance(self, positions: int) -> None:
            """Count positions by which the state was moved in place."""
            self.has_previous_state = dict.fromkeys(self.has_previous_state, True)
            self.cumulative_length += positions
            self.is_initialized = True

        def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            """Refuse: there are no keys here."""
            raise NotImplementedError(
                f"{type(self).__name__} keeps a state, no keys and values: use update_recurrent_state."
            )

        def get_seq_length(self) -> int:
            """Return how many positions were read."""
            return int(self.cumulative_length)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Return length and offset of a mask over all positions."""
            return self.cumulative_length + query_length, 0

        def reset(self) -> None:
            """Forget; the next batch may be of another size."""
            library.LinearAttentionLayer.__init__(self, number_of_states=2)
            self.cumulative_length, self.is_initialized = 0, False

        def _each(self, change: Callable[[Tensor], Tensor]) -> None:
            if self.is_initialized:
                self.recurrent_states = {n: change(x) for n, x in self.recurrent_states.items()}

    return RecurrentLayer


@functools.cache
def room_layer() -> Any:
    """Return the class of layers that keep keys and values with room for more."""
    library = _library()

    class RoomLayer(_Sequences, library.DynamicLayer):  # type: ignore[misc, name-defined]
        """Keys and values (batch, heads, capacity, size); those from begin to end are of use."""

        def __init__(self, window: int | None = None) -> None:
            super().__init__()
            self.window, self.is_sliding, self.is_croppable = window, window is not None, window is None
            self.room: tuple[Tensor, Tensor] | None = None
            self.begin = self.end = self.cumulative_length = 0

        def _kept(self) -> int:
            """Return how many of the positions so far the next one may see."""
            length: int = self.cumulative_length
            return length if self.window is None else min(length, self.window - 1)

        def reserve(self, more: int, like: Tensor) -> None:
            """Make room for positions like those of a (batch, heads, ..., size) tensor."""
            if self.room is not None and self.end + more <= self.room[0].shape[2]:
                return
            kept = self._kept()
            shape = (*like.shape[:2], max(_FIRST, 2 * (kept + more)), like.shape[3])
            room = (like.new_empty(shape), like.new_empty(shape))
            if self.room is not None:
                for new, old in zip(room, self.room):
                    new[:, :, :kept] = old[:, :, self.end - kept : self.end]
            self.room, self.begin, self.end = room, 0, kept

        def advance(self, positions: int) -> None:
            """Count positions that were written behind the end."""
            self.end, self.cumulative_length = self.end + positions, self.cumulative_length + positions
            self._show()

        def _show(self) -> None:
            self.begin = self.end - self._kept()
            assert self.room is not None
            self.keys: Tensor | None
            self.values: Tensor | None
            self.keys, self.values = (x[:, :, self.begin : self.end] for x in self.room)
            self.dtype, self.device, self.is_initialized = self.room[0].dtype, self.room[0].device, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            """Return keys and values that may be seen, the new ones last; they are kept."""
            more = key_states.shape[2]
            self.reserve(more, key_states)
            assert self.room is not None
            first = self.end - self._kept()
            for room, new in zip(self.room, (key_states, value_states)):
                room[:, :, self.end : self.end + more] = new
            self.advance(more)
            return self.room[0][:, :, first : self.end], self.room[1][:, :, first : self.end]

        def key_values(self, starts: Tensor | None) -> KeyValues:
            """Return the room as `ops.decode` takes it; starts counts from the first position ever."""
            assert self.room is not None
            shifted = None if starts is None else starts - (self.cumulative_length - self.end)
            return KeyValues(*self.room, self.end, shifted)

        def get_seq_length(self) -> int:
            """Return how many positions were read."""
            return int(self.cumulative_length)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Return length and offset of what `update` will return."""
            return self._kept() + query_length, self.cumulative_length - self._kept()

        def get_max_length(self) -> int:
            """Return the window, -1 without."""
            return -1 if self.window is None else self.window

        def reset(self) -> None:
            """Forget."""
            self.room = None
            self.keys = self.values = None
            self.begin = self.end = self.cumulative_length = 0
            self.is_initialized = False

        def crop(self, tokens_to_remove: int) -> None:
            """Forget the last -tokens_to_remove positions.

            Raises:
                ValueError: if the number is positive, or this is a window.
            """
            if tokens_to_remove > 0 or (tokens_to_remove and self.window is not None):
                raise ValueError(
                    f"A number of positions to forget is negative, and windows cannot: got {tokens_to_remove}."
                )
            self.advance(tokens_to_remove)

        def _each(self, change: Callable[[Tensor], Tensor]) -> None:
            if self.room is not None:
                self.room = (change(self.room[0]), change(self.room[1]))
                self._show()

    return RoomLayer


def adopt(cache: Any, config: Any, converted: Mapping[int, Substitute] | None = None) -> None:
    """Give an empty cache of transformers the layers that fit a model; leave one that has them.

    Args:
        cache: A `Cache`.
        config: The model's, with layer_types and sliding_window.
        converted: What stands for the softmax attention of layers after `linearize`, by their numbers.

    Raises:
        ValueError: if another model filled it, or it has other layers.
    """
    parts = converted or {}
    kinds = [
        RecurrentLayer if number in parts else recurrent_layer() if kind == "linear_attention" else room_layer()
        for number, kind in enumerate(config.layer_types)
    ]
    if [type(layer) for layer in cache.layers] == kinds and all(
        cache.layers[number].substitute is part for number, part in parts.items()
    ):
        return
    states = [getattr(layer, "recurrent_states", None) or {} for layer in cache.layers]
    filled = any(
        layer.batch() is not None if isinstance(layer, RecurrentLayer) else getattr(layer, "keys", None) is not None
        for layer in cache.layers
    )
    if filled or any(x is not None for state in states for x in state.values()):
        raise ValueError(
            f"This model cannot go on from {type(cache).__name__} with layers {cache.layers}: start with an empty one."
        )
    cache.layer_class_to_replicate = None
    cache.layers = [
        hybrid_layer(parts[number]) if number in parts
        else recurrent_layer()() if kind == "linear_attention"
        else room_layer()(config.sliding_window if kind == "sliding_attention" else None)
        for number, kind in enumerate(config.layer_types)
    ]  # fmt: skip


def new_cache(config: Any, converted: Mapping[int, Substitute] | None = None) -> Any:
    """Return an empty `DynamicCache` with the layers that fit a model.

    Args:
        config: The model's.
        converted: As for `adopt`.
    """
    cache = _library().DynamicCache()
    adopt(cache, config, converted)
    return cache


def batch_of(cache: Any) -> int | None:
    """Return how many sequences a cache stands for, None for an empty one."""
    layer = cache.layers[0]
    if not layer.get_seq_length():
        return None
    if isinstance(layer, RecurrentLayer):
        return layer.batch()
    first = layer.state()[0] if isinstance(layer, recurrent_layer()) else layer.room[0]
    return int(first.shape[0])


def snapshot(cache: Any, *, copies: int = 1) -> Any:
    """Copy a cache, so that what was read once can be continued many times.

    Args:
        cache: Of a `LinearTransformerForCausalLM`; it stays as it is.
        copies: How often each sequence is repeated in the copy.

    Returns:
        The copy.

    Raises:
        ValueError: if copies is not positive.
    """
    if copies < 1:
        raise ValueError(f"copies is a positive number, got {copies!r}.")
    found = copy.deepcopy(cache)
    if copies > 1:
        found.batch_repeat_interleave(copies)
    return found


def save_state(cache: Any, path: Path | str) -> None:
    """Write what a cache remembers to a safetensors file.

    Args:
        cache: Of a `LinearTransformerForCausalLM`, not empty.
        path: Where to.

    Raises:
        ValueError: if nothing was read yet.
    """
    from safetensors.torch import save_file

    if batch_of(cache) is None:
        raise ValueError(f"{type(cache).__name__} is empty: let the model read something first.")
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        names: tuple[str, ...]
        parts: Any
        if isinstance(layer, RecurrentLayer):
            names, parts = HybridState._fields, layer.state
        elif isinstance(layer, recurrent_layer()):
            names, parts = _LINEAR, layer.state()
        else:
            names, parts = _KEPT, (layer.keys, layer.values)
        tensors |= {f"{number}.{name}": x.contiguous() for name, x in zip(names, parts)}
    save_file(tensors, path, {"eke": json.dumps({"positions": cache.layers[0].get_seq_length()})})


def load_state(path: Path | str, config: Any, converted: Mapping[int, Substitute] | None = None) -> Any:
    """Read what `save_state` wrote.

    Args:
        path: Of the file.
        config: Of the model that goes on from it.
        converted: As for `adopt`: `hugging_face.converted(model)` for a model after `linearize`.

    Returns:
        A `DynamicCache` for `past_key_values=`.

    Raises:
        ValueError: if the file holds no state, or one of another model.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("eke")
        tensors: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about is None:
        raise ValueError(f"{path} holds no state: it was not written by save_state.")
    cache, positions = new_cache(config, converted), json.loads(about)["positions"]
    names = {
        number: HybridState._fields if isinstance(layer, RecurrentLayer)
        else _LINEAR if isinstance(layer, recurrent_layer()) else _KEPT
        for number, layer in enumerate(cache.layers)
    }  # fmt: skip
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if set(tensors) != {f"{number}.{name}" for number, parts in names.items() for name in parts} or not all(
        _of_model(name, x, heads, size, converted or {}) for name, x in tensors.items()
    ):
        raise ValueError(
            f"{path} is the state of another model: it holds {', '.join(sorted(tensors))}, and this one has layers "
            f"{config.layer_types} with {heads} heads of {size}, converted {sorted(converted or {})}."
        )
    for number, layer in enumerate(cache.layers):
        parts = [tensors[f"{number}.{name}"] for name in names[number]]
        if isinstance(layer, RecurrentLayer):
            layer.state = HybridState(*parts)
            layer.advance(positions)
        elif isinstance(layer, recurrent_layer()):
            layer.put((parts[0], parts[1]), positions)
        else:
            layer.update(*parts)
            layer.cumulative_length = positions
            layer._show()
    return cache


def _of_model(name: str, x: Tensor, heads: int, size: int, converted: Mapping[int, Substitute]) -> bool:
    """Return whether a part of a state has the shape that the model gives it."""
    number, _, kind = name.partition(".")
    part = converted.get(int(number))
    if part is None:
        return x.ndim > 2 and (x.shape[1], x.shape[3 if x.ndim > 3 else 2]) == (heads, size)
    one = torch.zeros(1, heads, 1, size)
    wanted: Tensor = getattr(part._begin(one, one, size**-0.5), kind)
    return x.shape[1:] == wanted.shape[1:]
