"""A linear layer that stores and multiplies only the entries that a mask keeps.

    layer = SparseLinear.from_dense(linear, mask)      # mask (out, in), True is kept

Four ways to the same product: "native" (`ops.sparse_matmul`), "csr" (torch's compressed rows), "dense" (zeros filled
in), "compact" (a dense product of the rows and columns that keep anything). Which is fastest hangs on density, batch
and machine: each is timed on first need for a batch of this size, and the answer is remembered by this process. What a
way is made from is made anew when a parameter changes as torch counts changes; writes through `.data` are not counted.
While gradients are recorded and under torch.compile the native operator runs: only kept entries are parameters, so
nothing that was removed comes back in training.
Cost: 2 kept entries operations a sample; 8 bytes a kept entry.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..ops import sparse_matmul
from ..ops.calls import direct
from ..ops.sparse_matmul import dense, native

Way = Literal["native", "csr", "dense", "compact"]
Product = Callable[[Tensor], Tensor]
_BLOCKS = (4, 2)
"""Rows that share their columns, where all do: the kernel then reads inputs once for several rows."""
_LARGEST = 1024
"""Samples beyond which ways are timed on this many."""
_SAVES = 0.98
"""Share of the matrix below which rows and columns without entries are worth leaving out."""
_REPEATS, _ROUNDS = 4, 3
_FASTEST: dict[tuple[object, ...], Way] = {}


class SparseLinear(nn.Module):
    """A linear layer with the entries of a mask.

    Args:
        mask: Kept entries, bool (out_features, in_features).
        bias: Whether to add a trained bias.
        device: Of the parameters.
        dtype: Of the parameters.
        way: How products are computed without gradients; None measures.

    Raises:
        ValueError: if the mask is no boolean matrix, or the way is unknown.
    """

    columns: Tensor
    starts: Tensor

    def __init__(
        self,
        mask: Tensor,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        way: Way | None = None,
    ) -> None:
        super().__init__()
        if mask.dim() != 2 or mask.dtype != torch.bool or 0 in mask.shape:
            raise ValueError(
                "SparseLinear needs a boolean mask (out_features, in_features), got "
                f"{tuple(mask.shape)} of {mask.dtype}."
            )
        if way is not None and way not in get_args(Way):
            raise ValueError(f"way must be None or one of {', '.join(map(repr, get_args(Way)))}, got {way!r}.")
        self.out_features, self.in_features = mask.shape
        self.way = way
        self.block = _shared_rows(mask)
        place = mask.device if device is None or torch.device(device).type == "meta" else device
        groups = mask.reshape(-1, self.block, self.in_features)[:, 0].to(place)
        self.register_buffer("columns", groups.nonzero()[:, 1].to(torch.int32))
        self.register_buffer("starts", nn.functional.pad(groups.sum(1).cumsum(0), (1, 0)))
        self.values = nn.Parameter(torch.empty(len(self.columns), self.block, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self._prepared: tuple[Way, list[int], tuple[Tensor | None, ...], Product] | None = None
        self._choices: dict[tuple[int, int], Way] = {}
        if not self.values.is_meta:  # nothing to draw, and torch loads its compiler to draw it
            self.reset_parameters()

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw values anew with variance 1 / (entries of the row on average), so that outputs keep the scale of inputs.

        Args:
            generator: Source of randomness; None for torch's own.
        """
        nn.init.normal_(self.values, std=max(1.0, self.kept / self.out_features) ** -0.5, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor, *, way: Way | None = None) -> Self:
        """Take the kept entries of a dense layer over.

        Args:
            linear: Left as it is.
            mask: Kept entries, bool (out_features, in_features).
            way: See the class.

        Returns:
            A layer with the outputs of the masked dense one.

        Raises:
            ValueError: if the mask has another shape than the weight.
        """
        weight = linear.weight.detach()
        if mask.shape != weight.shape:
            raise ValueError(
                f"The mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}; masks of "
                "`sparsity.prune` are found under the parameter's name."
            )
        # On meta nothing is drawn: the caller's random numbers stay as they are.
        mask = mask.to(weight.device)
        layer = cls(mask, bias=linear.bias is not None, device="meta", dtype=weight.dtype, way=way)
        shape = (-1, layer.block, layer.in_features)
        values = weight.reshape(shape).transpose(1, 2)[mask.reshape(shape)[:, 0]]
        layer.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def kept(self) -> int:
        """Number of entries kept."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Share of entries kept."""
        return self.kept / (self.in_features * self.out_features)

    def to_dense(self) -> Tensor:
        """Return the weight with its zeros, (out_features, in_features), differentiable in the values."""
        return dense(self.values, self.columns, self.starts, inputs=self.in_features)

    def mask(self) -> Tensor:
        """Return the kept entries, bool (out_features, in_features)."""
        ones = torch.ones_like(self.values, dtype=torch.float32, requires_grad=False)
        return dense(ones, self.columns, self.starts, inputs=self.in_features) > 0

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension of x.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).

        Raises:
            ValueError: if the last dimension is not in_features.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear takes (..., {self.in_features}), got {tuple(x.shape)}.")
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                y: Tensor = self(x.to(self.values.dtype))
                return y.to(torch.get_autocast_dtype(x.device.type))
        if not self._free(x):
            return sparse_matmul(x, self.values, self.columns, self.starts, bias=self.bias)
        if x.dim() == 2:
            return self._product(self.way or self.fastest(x.shape[0]))(x)
        flat = x.reshape(-1, self.in_features)
        y = self._product(self.way or self.fastest(flat.shape[0]))(flat)
        return y.reshape(*x.shape[:-1], self.out_features)

    def fastest(self, batch: int) -> Way:
        """Return the fastest way for so many samples, timed on first need (some milliseconds).

        Args:
            batch: Number of samples; rounded up to a power of two, at most 1024.
        """
        size = min(_LARGEST, 1 << max(0, batch - 1).bit_length())
        here = (size, torch.get_num_threads())
        if here not in self._choices:
            self._choices[here] = self._choose(size)
        return self._choices[here]

    def _choose(self, size: int) -> Way:
        rows, columns = self._used()
        key = (
            self.in_features, self.out_features, self.kept, self.block, len(rows), len(columns), self.values.dtype,
            size, torch.get_num_threads(),
        )  # fmt: skip
        if key not in _FASTEST:
            _FASTEST[key] = self._timed(size)
        return _FASTEST[key]

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        shared = f", {self.block} rows share their columns" if self.block > 1 else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, density={self.density:.3g}{shared}"
        )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_prepared": None}

    def _free(self, x: Tensor) -> bool:
        """Return whether the fastest way may be taken: on the CPU, unwatched, without gradients."""
        values = self._parameters["values"]
        if values is None or not direct(x, values):
            return False
        return x.dtype == values.dtype and x.numel() > 0 and not values.is_inference()

    def _used(self) -> tuple[Tensor, Tensor]:
        """Return the rows and the columns that keep anything."""
        rows = (self.starts.diff() > 0).repeat_interleave(self.block).nonzero()[:, 0]
        used = torch.zeros(self.in_features, dtype=torch.bool, device=self.columns.device)
        return rows, used.index_fill(0, self.columns.long(), True).nonzero()[:, 0]

    def _timed(self, batch: int) -> Way:
        x = torch.ones(batch, self.in_features, dtype=self.values.dtype)
        rows, columns = self._used()
        ways: list[Way] = ["native", "csr", "dense"]
        if 0 < len(rows) * len(columns) < _SAVES * self.in_features * self.out_features:
            ways.append("compact")
        runs = {way: self._build(way) for way in ways}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(_ROUNDS):  # interleaved, so that a burst of other work hits all of them
            for way in ways:
                best[way] = min(best[way], seconds(lambda way=way: runs[way](x)))  # type: ignore[misc]
        return min(ways, key=lambda way: best[way])

    def _product(self, way: Way) -> Product:
        """Return the product by one way; what it is made from is kept for as long as values and bias stay."""
        # Looked up here: an attribute of a module costs as much as a comparison of pointers.
        buffers, bias = self._buffers, self._parameters["bias"]
        held = (self._parameters["values"], buffers["columns"], buffers["starts"], bias)
        state = [0 if t is None else t.data_ptr() for t in held]
        if way != "native":
            state += [0 if t is None else t._version for t in held]
        known = self._prepared
        if known is None or known[0] != way or known[1] != state or any(a is not b for a, b in zip(known[2], held)):
            known = self._prepared = (way, state, held, self._build(way))
        return known[3]

    def _build(self, way: Way) -> Product:
        values, bias = self.values.detach(), None if self.bias is None else self.bias.detach()
        if way == "native" and native.supports(values, self.block) and (bias is None or bias.is_contiguous()):
            return native.bound(values, self.columns, self.starts, inputs=self.in_features, bias=bias)
        if way == "native":
            return lambda x: sparse_matmul(x, values, self.columns, self.starts, bias=bias)
        whole = dense(values, self.columns, self.starts, inputs=self.in_features)
        if way == "dense":
            return lambda x: nn.functional.linear(x, whole, bias)
        if way == "csr":
            with warnings.catch_warnings():  # torch says once that these tensors are in beta
                warnings.simplefilter("ignore", UserWarning)
                packed = whole.to_sparse_csr()
            if bias is None:
                return lambda x: (packed @ x.t().contiguous()).t().contiguous()
            return lambda x: ((packed @ x.t().contiguous()).t() + bias).contiguous()
        rows, columns = self._used()
        part = whole[rows][:, columns].contiguous()
        rest = bias if bias is not None else values.new_zeros(self.out_features)
        some = rest[rows]
        if len(rows) == self.out_features:
            return lambda x: nn.functional.linear(x.index_select(1, columns), part, some)
        every = len(columns) == self.in_features

        def compact(x: Tensor) -> Tensor:
            y = rest.repeat(len(x), 1)
            return y.index_copy_(1, rows, nn.functional.linear(x if every else x.index_select(1, columns), part, some))

        return compact


def _shared_rows(mask: Tensor) -> int:
    rows, columns = mask.shape
    for block in _BLOCKS:
        if rows % block == 0:
            groups = mask.reshape(-1, block, columns)
            if bool((groups == groups[:, :1]).all()):
                return block
    return 1


@torch.no_grad()
def seconds(run: Callable[[], object]) -> float:
    """Return the least seconds of one run, after one of warming up."""
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
