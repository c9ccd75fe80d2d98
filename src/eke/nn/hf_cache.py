"""Generation with a converted Hugging Face decoder: a cache that holds states in the place of keys and values.

    cache = recurrent_cache(found.model)
    tokens = found.model.generate(prompt, past_key_values=cache, max_new_tokens=100)

Where attention was converted, the cache hands new keys and values on and keeps the substitute's state (S, z and the
last `window` positions): memory and time of a token do not grow with the text. Other layers keep all keys as ever.
Single tokens may be taken by the native step of `ops.decode`, which moves the state in place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from ..ops.decode import Ring
from .hybrid_attention import HybridState
from .substitute import Substitute, substitutes


class RecurrentLayer:
    """The cache of one converted attention, as Hugging Face's `Cache` uses its layers.

    Args:
        substitute: Whose state it keeps.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, substitute: Substitute) -> None:
        self.substitute = substitute
        self._ring: Ring | None = None
        self._own = False  # whether the ring's memory is nobody else's and lies as the native step takes it
        self.length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> RecurrentLayer:
        """Return a copy of what was read, for the same model."""
        new = RecurrentLayer(self.substitute)
        new._ring, new._own, new.length = copy.deepcopy(self._ring, memo), self._own, self.length
        return new

    @property
    def state(self) -> HybridState | None:
        """The state, the oldest of the last positions first; None before the first one."""
        ring = self._ring
        return None if ring is None else HybridState(ring.memory, ring.sums, *ring.ordered())

    @state.setter
    def state(self, state: HybridState | None) -> None:
        """Go on from another state, which is not changed."""
        self._ring, self._own = None if state is None else Ring(*state), False

    def ring(self) -> Ring:
        """Return the state as a step moves it in place; `advance` counts the position."""
        ring = self._ring
        assert ring is not None
        if not self._own:
            parts = (ring.memory, ring.sums, *ring.ordered())
            memory, sums, keys, values, real = (part.clone(memory_format=torch.contiguous_format) for part in parts)
            self._ring = ring = Ring(memory, sums, keys, values, real)
            self._own = True
        return ring

    def advance(self, positions: int) -> None:
        """Count positions by which the state was moved in place.

        Args:
            positions: How many.
        """
        self.length += positions

    def batch(self) -> int | None:
        """Return how many sequences were read, None before the first position."""
        return None if self._ring is None else self._ring.memory.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.length > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a state begins with the first positions."""

    def update(self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Tell the substitute, which is called next, to go on from this state.

        Args:
            key_states: New keys.
            value_states: New values.
            cache_kwargs: Not used.

        Returns:
            The same.
        """
        self.substitute.kept = self
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the positions that were read."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of masks and where they begin."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no end."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no end."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on from the states of some sequences of the batch."""
        state = self.state
        if state is not None:
            self.state = state.reordered(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        batch = self.batch()
        if batch is not None:
            self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def crop(self, _: int) -> None:
        """Refuse: a state has no way back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A recurrent state of {self.length} positions cannot be cropped: assisted generation needs a cache of "
            "keys (leave past_key_values out)."
        )

    def offload(self) -> None:
        """Do nothing: a state is small."""

    def prefetch(self) -> None:
        """Do nothing: a state is never away."""


def hybrid_layer(substitute: Substitute) -> RecurrentLayer:
    """Return an empty layer for a cache of transformers.

    Args:
        substitute: Whose state it keeps.
    """
    library: Any = require("transformers.cache_utils", extra="hf", purpose="A recurrent cache")
    # Its caches ask layers for their kind: one that inherits from an extra's class would need the extra to be imported.
    library.CacheLayerMixin.register(RecurrentLayer)
    return RecurrentLayer(substitute)


def recurrent_cache(model: nn.Module) -> Any:
    """Return an empty cache for generation with a converted decoder of Hugging Face.

    Args:
        model: From `linearize`; its attentions carry `layer_idx`, as Hugging Face's decoders do.

    Returns:
        A `transformers.Cache` for `generate(..., past_key_values=...)` or `model(..., past_key_values=...)`. It holds
        one batch of texts: make a new one, or call `reset()`, for others.

    Raises:
        ValueError: if no attention was converted or none has a place in a cache.
    """
    transformers = require("transformers", extra="hf", purpose="A recurrent cache")
    parts = substitutes(model)
    numbered = {
        int(index): part
        for name, part in parts.items()
        if part.causal
        and type(part) is Substitute  # clustered ones have no state
        and (index := getattr(model.get_submodule(name), "layer_idx", None)) is not None
    }
    if not numbered:
        raise ValueError(
            f"{type(model).__name__} has {len(parts)} converted attentions and none that is causal with a layer_idx "
            "and a state: recurrent_cache is for Hugging Face decoders after linearize. Clustered ones have no state "
            "and generate with the usual cache (leave past_key_values out)."
        )
    config = getattr(model, "config", None)
    depth = max(getattr(config, "num_hidden_layers", 0), 1 + max(numbered))
    plain = transformers.cache_utils.DynamicLayer
    layers = [hybrid_layer(numbered[i]) if i in numbered else plain() for i in range(depth)]
    return transformers.Cache(layers=layers)
