"""The native step of decoding, loaded by ctypes from the package folder."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load
from ..linear_attention import LinearAttentionState
from .blocks import Activation, Block, Hybrid, KeyValues, Map, Norm, Projection, Ring, Separate, Softmax

_LEVELS = ("plain C++", "AVX2", "AVX-512")
_NORMS = {"layer": 1, "rms": 2}
_MAPS = {"identity": 0, "elu": 1, "relu": 2, "t2r": 3, "hedgehog": 4}
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}
_Number, _Address = ctypes.c_int64, ctypes.c_void_p


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", _Address), ("bias", _Address))

    @classmethod
    def of(cls, part: Projection | Map | None) -> _Matrix:
        """Return the addresses of a projection."""
        return cls() if part is None else cls(_address(part.weight), _address(part.bias))

    @classmethod
    def third(cls, part: Projection, number: int) -> _Matrix:
        """Return the addresses of one of three projections that lie one behind the other."""
        rows, columns = part.weight.shape
        first = number * (rows // 3) * 4
        return cls(
            part.weight.data_ptr() + first * columns, None if part.bias is None else part.bias.data_ptr() + first
        )


class _Norm(ctypes.Structure):
    _fields_ = (("kind", _Number), ("eps", ctypes.c_double), ("weight", _Address), ("bias", _Address))

    @classmethod
    def of(cls, norm: Norm | None) -> _Norm:
        """Return the addresses of a norm."""
        return cls() if norm is None else cls(_NORMS[norm.kind], norm.eps, _address(norm.weight), _address(norm.bias))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in (
            "attention", "map", "normalize", "delta", "decay", "window", "features", "key_heads",
        )),
        *((name, _Norm) for name in ("before", "between", "inside")),
        *((name, _Matrix) for name in (
            "query", "key", "value", "out", "up", "down", "gated", "gate", "rate", "query_map", "key_map",
        )),
        *((name, _Address) for name in (
            "retention", "balance", "memory", "keys", "values", "near_keys", "near_values",
        )),
        *((name, _Number) for name in ("batch_stride", "head_stride", "filled")),
        *((name, _Address) for name in ("starts", "real")),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in (
            "threads", "batch", "width", "heads", "inner", "activation", "layers", "outputs",
        )),
        ("layer", ctypes.POINTER(_Layer)), ("last", _Norm), ("head", _Matrix),
        ("cosines", _Address), ("sines", _Address), ("rotation_stride", _Number),
        ("x", _Address), ("out", _Address), ("memory", _Address),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_decode", what="Steps of decoding")
    if loaded is not None:
        loaded.eke_decode.argtypes = (ctypes.c_int, ctypes.POINTER(_Step))
    return loaded


@functools.cache
def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_decode_level())


def available() -> bool:
    """Return whether the compiled kernel can be used."""
    return level() >= 0


def describe() -> str:
    """Return the kernel in use, in words."""
    return _LEVELS[level()] if available() else "none (torch's own operations)"


def reads(tensor: Tensor) -> bool:
    """Return whether the kernel can read a parameter where it lies."""
    return tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def _layer(block: Block, heads: int) -> _Layer:
    kind, given, feed = block.attention, block.projections, block.feed
    layer = _Layer(
        before=_Norm.of(block.norm), between=_Norm.of(feed.norm), out=_Matrix.of(block.out), up=_Matrix.of(feed.up),
        down=_Matrix.of(feed.down), gated=_Matrix.of(feed.gate), key_heads=block.key_heads(heads),
    )  # fmt: skip
    if isinstance(given, Separate):
        layer.query, layer.key, layer.value = map(_Matrix.of, given)
    else:
        layer.query, layer.key, layer.value = (_Matrix.third(given, number) for number in range(3))
    if isinstance(kind, Softmax):
        layer.attention, layer.window = 1, kind.window or 0
        return layer
    if isinstance(kind, Hybrid):
        layer.attention, layer.window, layer.balance = 2, kind.window, _address(kind.balance)
        layer.map, layer.features = _MAPS[kind.key_map.name], kind.key_map.features(block.out.weight.shape[0] // heads)
        layer.query_map, layer.key_map = _Matrix.of(kind.query_map), _Matrix.of(kind.key_map)
        return layer
    layer.map, layer.normalize, layer.delta = _MAPS[kind.feature_map], kind.normalize, kind.rate is not None
    layer.inside, layer.gate, layer.rate = _Norm.of(kind.norm), _Matrix.of(kind.gate), _Matrix.of(kind.rate)
    layer.retention = _address(kind.retention)
    if kind.gate is not None:
        layer.decay = 2 if kind.gate.weight.shape[0] == block.out.weight.shape[0] else 1
    return layer


class Native:
    """A step whose parameters lie where they lay when it was made.

    Args:
        blocks: Layers.
        heads: Of every attention.
        activation: Of every feed-forward part.
        last: Norm behind the last block, or None.
        head: Projection behind it, or None.
    """

    def __init__(
        self, blocks: Sequence[Block], *, heads: int, activation: Activation, last: Norm | None, head: Projection | None
    ) -> None:
        self.layers = (_Layer * len(blocks))(*(_layer(block, heads) for block in blocks))
        width, inner = blocks[0].out.weight.shape[0], blocks[0].feed.up.weight.shape[0]
        self.outputs = width if head is None else head.weight.shape[0]
        self.step = _Step(
            width=width, heads=heads, inner=inner, activation=_ACTIVATIONS[activation], layers=len(blocks),
            outputs=self.outputs, layer=self.layers, last=_Norm.of(last), head=_Matrix.of(head),
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        states: Sequence[LinearAttentionState | KeyValues | Ring],
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        instructions: int | None = None,
    ) -> Tensor:
        """Take one position of every sample through all layers; checked by the caller, states are changed in place.

        Args:
            x: (batch, width), float32, contiguous.
            states: One for each layer, float32, contiguous (keys and values by position and size).
            rotation: Cosines and sines, each (batch or 1, size), float32, contiguous; None for no rotation.
            instructions: Level of instructions, at most `level()`; None for the best.

        Returns:
            (batch, outputs).

        Raises:
            MemoryError: if there is no memory for scratch space.
        """
        loaded = library()
        assert loaded is not None  # callers ask available() first
        for layer, state in zip(self.layers, states):
            if isinstance(state, KeyValues):
                layer.keys, layer.values = state.keys.data_ptr(), state.values.data_ptr()
                layer.batch_stride, layer.head_stride, layer.filled = *state.keys.stride()[:2], state.filled
                layer.starts = _address(state.starts)
            elif isinstance(state, Ring):
                layer.memory, layer.keys, layer.filled = state.memory.data_ptr(), state.sums.data_ptr(), state.slot
                layer.near_keys, layer.near_values = state.keys.data_ptr(), state.values.data_ptr()
                layer.real = state.real.data_ptr()
            else:
                layer.memory, layer.keys = state.memory.data_ptr(), state.keys.data_ptr()
        batch = len(x)
        out = x.new_empty(batch, self.outputs)
        step = self.step
        step.threads, step.batch, step.x, step.out = torch.get_num_threads(), batch, x.data_ptr(), out.data_ptr()
        step.cosines, step.sines = (None, None) if rotation is None else map(torch.Tensor.data_ptr, rotation)
        step.rotation_stride = 0 if rotation is None or len(rotation[0]) == 1 else rotation[0].shape[1]
        if loaded.eke_decode(level() if instructions is None else instructions, ctypes.byref(step)):
            raise MemoryError(f"The step of decoding found no memory for its scratch space at batch {batch}.")
        for state in states:
            if isinstance(state, KeyValues):
                state.filled += 1
            elif isinstance(state, Ring):
                state.move()
        return out
