"""Generation with a converted Hugging Face decoder: a cache that holds states in the place of keys and values.

    cache = recurrent_cache(found.model)
    tokens = found.model.generate(prompt, past_key_values=cache, max_new_tokens=100)

Where attention was converted, the cache hands new keys and values on and keeps the substitute's state (S, z and the
last `window` positions): memory and time of a token do not grow with the text. Other layers keep all keys as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from .cluster_conversion import ClusteredSubstitute
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
        self._substitute = substitute
        self.state: HybridState | None = None
        self.length = 0

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
        self._substitute.kept = self
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
        if self.state is not None:
            self.state = self.state.reordered(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        if self.state is not None:
            batch = self.state.memory.shape[0]
            self.state = self.state.reordered(torch.arange(batch).repeat_interleave(repeats))

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
        and not isinstance(part, ClusteredSubstitute)
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
    # Its caches ask layers for their kind: one that inherits from an extra's class would need the extra to be imported.
    transformers.cache_utils.CacheLayerMixin.register(RecurrentLayer)
    layers = [RecurrentLayer(numbered[i]) if i in numbered else plain() for i in range(depth)]
    return transformers.Cache(layers=layers)
