"""A token through all layers of a Hugging Face decoder of Llama's kind as one native call.

    linear = linearize(LlamaForCausalLM(...), batches, window=64).model
    linear.generate(tokens, past_key_values=recurrent_cache(linear))     # takes the call by itself

After `linearize` the decoder's class has a `forward` that takes single tokens through `ops.decode` where all attentions
are converted and their states lie in a `recurrent_cache`: float32 on the CPU, no derivatives, nothing recorded. In any
other case it is the class's own. RMS norms, rotary positions (any scaling: its own module is asked), heads that share
keys and the gated feed-forward part are those of `LlamaModel`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decode import Block, Decoder, Feed, Hybrid, Norm, Projection, Separate, Softmax
from .fused_step import PARTS, FusedStep, described_hybrid, watched
from .hf_cache import RecurrentLayer
from .substitute import CHILD, converted_from, substitutes

_HOME = "transformers.models.llama.modeling_llama"
_ACTIVATIONS: dict[str, Any] = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu",
}  # fmt: skip
_ASKED = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "cache_position",
}  # fmt: skip


def _is(kind: type | None, name: str) -> bool:
    return kind is not None and kind.__module__ == _HOME and kind.__name__ == name


def fuse_decoder(model: Any) -> FusedStep | None:
    """Return all layers of a decoder and its last norm as one step for a token, on the same parameters.

    The step takes embedded tokens, and cosines and sines of the positions: `decoder(x, states, rotation=(cos, sin))`.

    Args:
        model: A `LlamaModel`, its attentions converted or (each head with keys of its own) softmax.

    Returns:
        The step, or None if a module is not of the plain kind.
    """
    if not _is(type(model), "LlamaModel"):
        return None
    layers, norm = list(model.layers), model.norm
    modules = [module for part in (*layers, norm) for module in part.modules()]
    if not layers or not all(map(_plain, modules)) or any(map(watched, modules)):
        return None
    kinds = {(_ACTIVATIONS.get(type(layer.mlp.act_fn).__name__), layer.self_attn.config.num_attention_heads)
             for layer in layers}  # fmt: skip
    activation, heads = kinds.pop()
    blocks = [block for layer in layers if (block := _described(layer)) is not None]
    if kinds or activation is None or not len(blocks) == len(layers) == model.config.num_hidden_layers:
        return None
    return FusedStep(Decoder(blocks, heads=heads, activation=activation, last=_norm(norm)), modules)


def _plain(module: nn.Module) -> bool:
    """Return whether a module is of a class that a step knows, or was before it was converted."""
    kind = type(module)
    if kind is nn.Linear or kind in PARTS or kind.__name__ in _ACTIVATIONS:
        return True
    named = any(_is(kind, f"Llama{name}") for name in ("DecoderLayer", "Attention", "MLP", "RMSNorm"))
    return named or _is(converted_from(module), "LlamaAttention")


def _norm(norm: Any) -> Norm:
    return Norm("rms", norm.weight, None, norm.variance_epsilon)


def _projection(linear: Any) -> Projection:
    return Projection(linear.weight, linear.bias)


def _described(layer: Any) -> Block | None:
    attention, mlp = layer.self_attn, layer.mlp
    heads, size = attention.config.num_attention_heads, attention.head_dim
    shared = attention.num_key_value_groups
    if heads * size != attention.o_proj.out_features or abs(attention.scaling * size**0.5 - 1) > 1e-6 or size % 2:
        return None
    kind: Hybrid | Softmax | None = Softmax() if shared == 1 else None
    if converted_from(attention) is not None:
        kind = described_hybrid(attention, heads, size)
    if kind is None:
        return None
    feed = Feed(
        _norm(layer.post_attention_layernorm), _projection(mlp.up_proj), _projection(mlp.down_proj),
        _projection(mlp.gate_proj),
    )  # fmt: skip
    parts = Separate(*(_projection(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)))
    return Block(_norm(layer.input_layernorm), parts, kind, _projection(attention.o_proj), feed)


def step_decoders_(model: nn.Module) -> None:
    """Let decoders of Llama's kind inside a converted model take single tokens by the native call, in place.

    Args:
        model: From `linearize`.
    """
    for module in model.modules():
        kind, new = type(module), "steps" not in type(module).__dict__
        if new and _is(kind, "LlamaModel") and any(part.causal for part in substitutes(module).values()):
            module.__class__ = _stepping(kind)  # type: ignore[arg-type]


@functools.cache
def _stepping(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass whose forward takes single tokens by the native call; files know it by the same name."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = None if args else _stepped(self, kwargs)
        return kind.forward(self, *args, **kwargs) if found is None else found

    about = {"forward": forward, "steps": True, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), about)


def _stepped(model: Any, given: dict[str, Any]) -> Any:
    """Return what the decoder gives for one token of every sequence, None where the native call does not."""
    if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
        return None
    if any(value is not None for name, value in given.items() if name not in _ASKED):
        return None
    ids, x, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
    read: Tensor | None = x if ids is None else ids
    if read is None or (ids is not None and x is not None) or cache is None or given.get("use_cache") is False:
        return None
    config, (batch, length) = model.config, read.shape[:2]
    if length != 1 or config.output_hidden_states or config.output_attentions or not config.return_dict:
        return None
    mask: Tensor | None = given.get("attention_mask")
    newest_is_real = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask[:, -1].all()))
    if not newest_is_real or not _own(model, cache, batch):
        return None
    x = model.embed_tokens(ids) if ids is not None else read
    if x.dtype != torch.float32 or not x.is_cpu:
        return None
    fused: FusedStep | None = getattr(model, "_fused", None)
    if fused is None or not fused.current():
        fused = model._fused = fuse_decoder(model)
    if fused is None or not fused.decoder.fused():
        return None
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.full((1, 1), cache.get_seq_length())
    cosines, sines = model.rotary_emb(x, position_ids=positions)
    y = fused.decoder(x[:, 0], [layer.ring() for layer in cache.layers], rotation=(cosines[:, 0], sines[:, 0]))
    for layer in cache.layers:
        layer.advance(1)
    library = sys.modules["transformers.modeling_outputs"]  # the model is made of it
    return library.BaseModelOutputWithPast(last_hidden_state=y[:, None], past_key_values=cache)


def _own(model: Any, cache: Any, batch: int) -> bool:
    """Return whether a cache holds the states of this decoder's attentions, of so many sequences."""
    layers, parts = getattr(cache, "layers", ()), [layer.self_attn._modules.get(CHILD) for layer in model.layers]
    return len(layers) == len(parts) and all(
        isinstance(kept, RecurrentLayer) and kept.substitute is part and kept.batch() == batch
        for kept, part in zip(layers, parts)
    )
