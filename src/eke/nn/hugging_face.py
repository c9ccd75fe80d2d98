"""A small language (or pixel) model in the form of transformers, whose `generate()` runs on states of constant size.

    from eke.nn.hugging_face import LinearTransformerConfig, LinearTransformerForCausalLM
    config = LinearTransformerConfig(vocab_size=256, layer_types=["linear_attention"] * 7 + ["sliding_attention"],
                                     sliding_window=64)
    model = LinearTransformerForCausalLM(config)
    model.generate(tokens, max_new_tokens=100, num_beams=4)

Each layer is "linear_attention", "full_attention" or "sliding_attention". A new token goes through all layers in one
native call (`ops.decode`) where nobody needs derivatives: float32 on the CPU. Layers that `linearize` converted keep
states in the place of keys, and stay in that call. The two classes are made on first use, because transformers is an
extra; that also tells AutoConfig and AutoModelForCausalLM about them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from ..ops.decode.blocks import KeyValues, Ring
from ..ops.linear_attention import LinearAttentionState
from .fused_step import FusedStep
from .generation_cache import adopt, batch_of, load_state, new_cache, recurrent_layer, save_state, snapshot
from .hf_cache import RecurrentLayer
from .substitute import CHILD, Substitute
from .transformer import TransformerBlock, fuse

__all__ = ["config_class", "load_state", "model_class", "save_state", "snapshot"]

_KINDS = ("linear_attention", "full_attention", "sliding_attention")
_CLASSES = {"LinearTransformerConfig": "config_class", "LinearTransformerForCausalLM": "model_class"}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class() if name == "LinearTransformerConfig" else model_class()


def _named(kind: type, name: str) -> type:
    """Return a class with the name under which pickle and save_pretrained find it again."""
    kind.__module__, kind.__qualname__, kind.__name__ = __name__, name, name
    return kind


@functools.cache
def config_class() -> type:
    """Return LinearTransformerConfig, a configuration of transformers.

    Its arguments: vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act
    ("gelu", "gelu_tanh", "relu" or "silu"), layer_types (one a layer), sliding_window, feature_map, decay and delta of
    linear attention, max_position_embeddings (None: positions are not embedded), layer_norm_eps, initializer_range.
    """
    library = require("transformers", extra="hf", purpose="LinearTransformerConfig")

    class Config(library.PreTrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "eke_linear_transformer"
        keys_to_ignore_at_inference = ("past_key_values",)

        def __init__(
            self,
            *,
            vocab_size: int = 256,
            hidden_size: int = 256,
            num_hidden_layers: int = 8,
            num_attention_heads: int = 8,
            intermediate_size: int = 1024,
            hidden_act: str = "gelu",
            layer_types: list[str] | None = None,
            sliding_window: int | None = None,
            feature_map: str | None = None,
            decay: str | None = None,
            delta: bool = False,
            max_position_embeddings: int | None = None,
            layer_norm_eps: float = 1e-5,
            initializer_range: float = 0.02,
            use_cache: bool = True,
            tie_word_embeddings: bool = False,
            **kwargs: Any,
        ) -> None:
            kinds = ["linear_attention"] * num_hidden_layers if layer_types is None else list(layer_types)
            if len(kinds) != num_hidden_layers or any(kind not in _KINDS for kind in kinds):
                raise ValueError(
                    f"layer_types names one of {', '.join(map(repr, _KINDS))} for each of {num_hidden_layers} layers, "
                    f"got {layer_types!r}."
                )
            if "sliding_attention" in kinds and sliding_window is None:
                raise ValueError(f"layer_types {kinds!r} need a sliding_window (a number of positions), got None.")
            self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
            self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
            self.hidden_act, self.layer_types, self.sliding_window = hidden_act, kinds, sliding_window
            self.feature_map, self.decay, self.delta = feature_map, decay, delta
            self.max_position_embeddings, self.layer_norm_eps = max_position_embeddings, layer_norm_eps
            self.initializer_range, self.use_cache = initializer_range, use_cache
            super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    made = _named(Config, "LinearTransformerConfig")
    library.AutoConfig.register(Config.model_type, made)
    return made


@functools.cache
def model_class() -> type:
    """Return LinearTransformerForCausalLM, a model of transformers that generates."""
    library = require("transformers", extra="hf", purpose="LinearTransformerForCausalLM")

    class Model(library.PreTrainedModel, library.GenerationMixin):  # type: ignore[misc, name-defined]
        config_class = config_class()
        base_model_prefix = ""
        _supports_sdpa = True  # it always calls it: `linearize` may ask for it
        _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 (transformers reads a dictionary here)
        _fused: FusedStep | None = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
            self.positions = None
            if config.max_position_embeddings is not None:
                self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.blocks = nn.ModuleList(
                TransformerBlock(
                    config.hidden_size, config.num_attention_heads, inner=config.intermediate_size, kind=kind,
                    window=config.sliding_window, feature_map=config.feature_map, decay=config.decay,
                    delta=config.delta, activation=config.hidden_act, eps=config.layer_norm_eps,
                )
                for kind in config.layer_types
            )  # fmt: skip
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def set_input_embeddings(self, value: nn.Module) -> None:
            self.embedding = value

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
            self.head = new_embeddings

        def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
            text = kwargs.get("input_ids", inputs)
            if kwargs.get("past_key_values") is not None:
                _goes_on(self, kwargs["past_key_values"], text, kwargs.get("attention_mask"))
            elif kwargs.get("use_cache", getattr(kwargs.get("generation_config"), "use_cache", None)) is not False:
                # One of our own: what transformers makes for linear attention does not know its length.
                kwargs["past_key_values"] = new_cache(self.config, converted(self))
            return super().generate(inputs, **kwargs)

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            *,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int = 0,
            **_: Any,
        ) -> Any:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError(
                    f"Give one of input_ids and inputs_embeds, got {'neither' if input_ids is None else 'both'}."
                )
            cache = past_key_values
            if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
                cache = new_cache(self.config, converted(self))
            x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            mask = _prepared(self, cache, x, attention_mask)
            if self.positions is not None:
                x = x + self.positions(_positions(self.config, cache, x, mask, position_ids))
            logits = _stepped(self, x, cache, mask)
            if logits is None:
                x = self.norm(_read(self, x, cache, mask))
                logits = self.head(x[:, -logits_to_keep:] if logits_to_keep else x)
            loss = None
            if labels is not None:
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            return library.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    made = _named(Model, "LinearTransformerForCausalLM")
    library.AutoModelForCausalLM.register(config_class(), made)
    return made


def converted(model: Any) -> dict[int, Substitute]:
    """Return what stands for softmax attention in a model after `linearize`, by the numbers of the layers.

    Args:
        model: A LinearTransformerForCausalLM.
    """
    return {
        number: part
        for number, block in enumerate(model.blocks)
        if isinstance(part := block.attention._modules.get(CHILD), Substitute)
    }


def _goes_on(model: Any, cache: Any, text: Tensor | None, mask: Tensor | None) -> None:
    """Refuse a text of which a cache leaves nothing to read: transformers would read it twice.

    Raises:
        ValueError: saying how much was read.
    """
    adopt(cache, model.config, converted(model))
    read = cache.get_seq_length()
    if text is not None and (mask is None or mask.shape == text.shape) and 0 < text.shape[1] <= read:
        raise ValueError(
            f"The cache has read {read} positions and the input has {text.shape[1]}: give the text from its beginning, "
            "with at least one token more."
        )


def _prepared(model: Any, cache: Any, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Check cache and mask against the inputs.

    Returns:
        The mask over all positions, None if all are real.

    Raises:
        ValueError: if the batch changed, or the mask is none over positions.
    """
    past = 0
    if cache is not None:
        adopt(cache, model.config, converted(model))
        batch, past = batch_of(cache), cache.layers[0].get_seq_length()
        if batch not in {None, x.shape[0]}:
            raise ValueError(
                f"The cache stands for {batch} sequences and the input for {x.shape[0]}: the batch may not change "
                "while sequences go on. Start with an empty cache, or copy one with snapshot(cache, copies=...)."
            )
    if attention_mask is None:
        return None
    wanted = (x.shape[0], past + x.shape[1])
    if tuple(attention_mask.shape) != wanted:
        raise ValueError(
            f"attention_mask says which positions are real, those read before included: (batch, positions) = {wanted}, "
            f"got {tuple(attention_mask.shape)}. Masks of pairs do not exist for linear attention."
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def _positions(config: Any, cache: Any, x: Tensor, mask: Tensor | None, given: Tensor | None) -> Tensor:
    """Return the number of each position among the real ones.

    Raises:
        ValueError: if one is beyond those that are embedded.
    """
    past = 0 if cache is None else cache.layers[0].get_seq_length()
    if given is None and mask is not None:
        given = (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    elif given is None:
        given = torch.arange(past, past + x.shape[1], device=x.device)[None]
    if int(given.max()) >= config.max_position_embeddings:
        raise ValueError(
            f"Position {int(given.max())} is beyond the {config.max_position_embeddings} that this model embeds "
            "(max_position_embeddings): generate less, or train a model with more, or None for no positions."
        )
    return given


def _read(model: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Return what comes behind all blocks; the cache keeps what each remembers."""
    length = x.shape[1]
    for number, block in enumerate(model.blocks):
        layer = None if cache is None else cache.layers[number]
        if model.config.layer_types[number] != "linear_attention":
            x, _ = block(x, mask=mask, keep=None if layer is None else layer.update)
            continue
        own = None if mask is None else mask[:, -length:]
        x, state = block(x, state=None if layer is None else layer.state(), mask=own)
        if layer is not None:
            layer.put(state, length)
    return x


def _stepped(model: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor | None:
    """Return the logits of one token of every sequence, by one call for all blocks; None where that cannot be."""
    if x.shape[1] != 1 or cache is None or torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
        return None
    if x.dtype != torch.float32 or not x.is_cpu or batch_of(cache) is None:
        return None
    starts = None
    if mask is not None:
        starts = mask.int().argmax(1)
        if not bool((mask.sum(1) == mask.shape[1] - starts).all()):
            return None  # not padding on the left
    fused: FusedStep | None = model._fused
    if fused is None or not fused.current():
        fused = model._fused = fuse(model.blocks, last=model.norm, head=model.head)
    if fused is None or not fused.decoder.fused():
        return None
    states: list[LinearAttentionState | KeyValues | Ring] = []
    for layer in cache.layers:
        if isinstance(layer, recurrent_layer()):
            states.append(LinearAttentionState(*layer.state()))
        elif isinstance(layer, RecurrentLayer):
            states.append(layer.ring())
        else:
            layer.reserve(1, layer.room[0])
            states.append(layer.key_values(starts))
    logits = fused.decoder(x[:, 0], states)
    for layer in cache.layers:
        layer.advance(1)
    return logits[:, None]
