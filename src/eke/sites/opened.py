"""Recurrent and attention modules opened up: every matrix applied by a linear layer of its own, where hooks see it.

A fused kernel hides what a recurrent weight or an attention projection multiplies. Here the same function is computed
step by step from linear layers that stand under the parameters' own names ("rnn.weight_hh_l0", "attn.in_proj_weight").
An opened model is for looking at it (statistics, marks), not for running fast: a recurrent layer takes one call of
its matrix a time step.

    LSTM: c' = f c + i g, h = o tanh(c');   GRU: h' = (1 - z) n + z h with n = tanh(W_in x + r (W_hn h + b_hn))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .site import is_openable


def open_(model: nn.Module) -> None:
    """Replace every recurrent and attention module of a model that can be opened, in place.

    Args:
        model: In evaluation mode; the new layers share its parameters.
    """
    for name, module in list(model.named_modules()):
        opened: nn.Module | None = None
        if not name or not is_openable(module):
            continue
        if isinstance(module, nn.MultiheadAttention):
            opened = OpenAttention(module)
        elif isinstance(module, nn.RNNBase):
            opened = OpenRecurrent(module)
        elif isinstance(module, nn.RNNCellBase):
            opened = OpenCell(module)
        if opened is not None:
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._modules[attribute] = opened.train(module.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer


def _step(kind: type[nn.Module], x: Tensor, h: Tensor, c: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state from the products with input and state, (batch, gates * H)."""
    if issubclass(kind, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (x + h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if issubclass(kind, nn.GRU | nn.GRUCell):
        r, z, n = x.chunk(3, -1)
        hr, hz, hn = h.chunk(3, -1)
        z = torch.sigmoid(z + hz)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * c, c
    return (F.relu if relu else torch.tanh)(x + h), c


class OpenCell(nn.Module):
    """A recurrent cell from two linear layers, `weight_ih` and `weight_hh`.

    Args:
        cell: The cell; its parameters are shared.
    """

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.kind, self.hidden_size = type(cell), cell.hidden_size
        self.relu = getattr(cell, "nonlinearity", "tanh") == "relu"
        for part in ("ih", "hh"):
            self.add_module(f"weight_{part}", _linear(getattr(cell, f"weight_{part}"), getattr(cell, f"bias_{part}")))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """Return the next state, as the cell does."""
        single = x.dim() == 1
        x = x[None] if single else x
        lstm = issubclass(self.kind, nn.LSTMCell)
        zero = x.new_zeros(x.shape[0], self.hidden_size)
        h, c = (zero, zero) if state is None else state if lstm else (state, zero)
        h, c = (t[None] if t.dim() == 1 else t for t in (h, c))
        carried = c if lstm else h
        products = self.get_submodule("weight_ih")(x), self.get_submodule("weight_hh")(h)
        h, c = _step(self.kind, products[0], products[1], carried, relu=self.relu)
        h, c = (h[0], c[0]) if single else (h, c)
        return (h, c) if lstm else h


class OpenRecurrent(nn.Module):
    """LSTM, GRU or RNN from linear layers `weight_ih_l0`, `weight_hh_l0`, ...; without dropout.

    Args:
        layers: The module; its parameters are shared.
    """

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.kind, self.hidden_size, self.num_layers = type(layers), layers.hidden_size, layers.num_layers
        self.batch_first, self.bidirectional = layers.batch_first, layers.bidirectional
        self.relu = getattr(layers, "nonlinearity", "tanh") == "relu"
        for name in [n for n in layers._parameters if n.startswith("weight")]:
            bias = getattr(layers, name.replace("weight", "bias")) if layers.bias else None
            self.add_module(name, _linear(getattr(layers, name), bias))

    def flatten_parameters(self) -> None:
        """Do nothing: there is nothing to flatten."""

    def forward(self, x: Tensor | PackedSequence, state: Any = None) -> tuple[Any, Any]:
        """Return outputs and last states, as the module does."""
        if isinstance(x, PackedSequence):
            return self._packed(x, state)
        single = x.dim() == 2
        x = x[:, None] if single else x.transpose(0, 1) if self.batch_first else x
        if single and state is not None:
            state = tuple(s[:, None] for s in state) if isinstance(state, tuple) else state[:, None]
        y, h, c = self._run(x, state, None)
        if single:
            y, h, c = y[:, 0], h[:, 0], c[:, 0]
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, (h, c) if issubclass(self.kind, nn.LSTM) else h

    def _packed(self, x: PackedSequence, state: Any) -> tuple[Any, Any]:
        padded, lengths = pad_packed_sequence(x)
        y, h, c = self._run(padded, state, lengths.to(padded.device))
        packed = pack_padded_sequence(y, lengths, enforce_sorted=x.sorted_indices is None)
        packed = PackedSequence(packed.data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, (h, c) if issubclass(self.kind, nn.LSTM) else h

    def _run(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
        h0, c0 = (zeros, zeros) if state is None else state if isinstance(state, tuple) else (state, zeros)
        lasts, cells = [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                end = f"_l{layer}{'_reverse' if direction else ''}"
                y, h, c = self._direction(x, (h0[number], c0[number]), end, lengths)
                outputs.append(y)
                lasts.append(h)
                cells.append(c)
            x = torch.cat(outputs, -1)
        return x, torch.stack(lasts), torch.stack(cells)

    def _direction(
        self, x: Tensor, state: tuple[Tensor, Tensor], end: str, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        lstm = issubclass(self.kind, nn.LSTM)
        products = self.get_submodule(f"weight_ih{end}")(x.transpose(0, 1)).transpose(0, 1)
        recurrent = self.get_submodule(f"weight_hh{end}")
        h, c = state
        outputs: list[Tensor] = []
        steps = range(x.shape[0])
        for t in reversed(steps) if end.endswith("reverse") else steps:
            new_h, new_c = _step(self.kind, products[t], recurrent(h), c if lstm else h, relu=self.relu)
            new_c = new_c if lstm else c
            if lengths is not None:
                alive = (t < lengths)[:, None]
                outputs.append(torch.where(alive, new_h, 0.0))
                h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
            else:
                outputs.append(new_h)
                h, c = new_h, new_c
        if end.endswith("reverse"):
            outputs.reverse()
        return torch.stack(outputs), h, c


class OpenAttention(nn.Module):
    """Multi-head attention from linear layers; the packed projection is one layer, called once if all inputs are one.

    Args:
        attention: The module; its parameters are shared.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.original = [attention]  # in a list: not a child, whose parameters would count twice
        self.packed = attention._qkv_same_embed_dim
        # A transformer layer reads these to choose its fused path, which this module has not.
        self._qkv_same_embed_dim, self.batch_first = False, False
        self.in_proj_bias = None
        bias = attention.in_proj_bias
        if self.packed:
            assert attention.in_proj_weight is not None
            self.add_module("in_proj_weight", _linear(attention.in_proj_weight, bias))
        else:
            parts = [None] * 3 if bias is None else list(bias.chunk(3))
            for letter, part in zip("qkv", parts):
                self.add_module(f"{letter}_proj_weight", _linear(getattr(attention, f"{letter}_proj_weight"), part))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *given: Any,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and attention weights, as the module does; options may be `given` by position."""
        named: list[Any] = [key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal]
        key_padding_mask, need_weights, attn_mask, average_attn_weights, _ = [*given, *named[len(given) :]]
        (module,) = self.original
        single = query.dim() == 2
        same = query is key and key is value
        if single:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value, same=same)
        if module.bias_k is not None and module.bias_v is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
        if module.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
        heads = module.num_heads
        q, k, v = (x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        mask = _mask(attn_mask, key_padding_mask, scores)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        y = y[0] if single else y if module.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        shown = weights.mean(1) if average_attn_weights else weights
        return y, shown[0] if single else shown

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, *, same: bool) -> tuple[Tensor, ...]:
        if not self.packed:
            return tuple(self.get_submodule(f"{n}_proj_weight")(x) for n, x in zip("qkv", (query, key, value)))
        layer = self.get_submodule("in_proj_weight")
        if same:
            return layer(query).chunk(3, -1)  # type: ignore[no-any-return]
        return tuple(layer(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))


def _mask(attn_mask: Tensor | None, padding: Tensor | None, scores: Tensor) -> Tensor | None:
    """Return both masks as one that is added to the scores (batch, heads, queries, keys)."""
    batch, heads, _, keys = scores.shape
    total: Tensor | None = None
    for mask in (attn_mask, padding):
        if mask is None:
            continue
        added = (
            torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
        )
        if mask is padding:
            added = added[:, None, None]
        elif added.dim() == 3:
            added = added.view(batch, heads, *added.shape[1:])
        added = F.pad(added, (0, keys - added.shape[-1]))
        total = added if total is None else total + added
    return total
