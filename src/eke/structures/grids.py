"""Symmetric uniform grids: v = scale * code with few bits a code and one scale a row or a group of columns.

    levels of b >= 2 bits:  scale * {-(2**(b-1) - 1), ..., 2**(b-1) - 1};    b = 1:  scale * {-1, +1}

Why no level -2**(b-1): with it the grid is not symmetric, project(-v) = -project(v) fails (folding a negative
normalisation weight flips signs) and int8 kernels that add pairs saturate. It costs one of 2**b levels.

Scales carry 17 significant bits, so that scale * code (|code| <= 127) has no rounding in float32. From this follow,
exactly and in float32 and float64 alike: a projected matrix is a fixed point, it is recovered bit for bit from its
codes, and multiplying a row by a power of two multiplies its scale and leaves its codes (absent under- and overflow).
For other positive factors c, project(c v) = c' project(v) with c' = c only up to 2**-17, and codes of entries that lie
that near to a rounding boundary can move; fold first and quantise after where codes must not change.

The scale is searched below max|v| / top level (clipping the outliers) for the least weighted squared error and refined
by least squares, sum(w v q) / sum(w q^2); max-abs is always a candidate, so the result is never worse than it.
Cost: about 30 passes over v. Source of the clipping search: Choukroun et al., "Low-bit quantization of neural
networks for efficient inference", 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import pack, packed_bytes, unpack
from .structure import ColumnRule, Exactness, check_matrix, check_shape

_SMALLEST = 2.0**-100
_LARGEST = 2.0**120
_CACHED = 1 << 18
_SEARCH = {2: (0.12, 24), 3: (0.2, 24), 4: (0.3, 20), 5: (0.4, 16), 6: (0.5, 14), 7: (0.6, 12), 8: (0.7, 10)}


@dataclass(frozen=True, init=False, repr=False)
class UniformGrid:
    """Matrices whose rows (or groups of columns within a row) lie on a symmetric uniform grid.

    Rows whose largest magnitude is below 2**-100 become 0, which keeps subnormal numbers out. Half precision is
    projected in float32 and comes back as float32: it cannot hold the products.

    Args:
        bits: Bits a code, 1 to 8 (kept as `code_bits`); 1 means sign * scale and has no zero level.
        group: Columns that share a scale; None for the whole row. The last group may be shorter.

    Raises:
        ValueError: if bits is not in 1..8 or group is not positive.
    """

    code_bits: int
    group: int | None

    def __init__(self, bits: int, group: int | None = None) -> None:
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"UniformGrid needs a whole number of bits from 1 to 8, got {bits!r}.")
        if group is not None and (not isinstance(group, int) or group < 1):
            raise ValueError(f"UniformGrid.group must be a positive number of columns or None, got {group!r}.")
        object.__setattr__(self, "code_bits", bits)
        object.__setattr__(self, "group", group)

    def __repr__(self) -> str:
        return f"UniformGrid(bits={self.code_bits}" + (f", group={self.group})" if self.group else ")")

    @property
    def top(self) -> int:
        """Largest code: 2**(bits-1) - 1, and 1 for one bit."""
        return max(1, (1 << (self.code_bits - 1)) - 1)

    @property
    def exactness(self) -> Exactness:
        """Heuristic: never worse than max-abs scaling, but the best scale is searched, not proved."""
        return "heuristic"

    def groups(self, columns: int) -> int:
        """Return the scales of a row of so many columns."""
        return 1 if self.group is None else -(-columns // self.group)

    def check(self, shape: tuple[int, int]) -> None:
        """Accept every matrix shape and refuse, by ValueError, what is not one."""
        check_shape(self, shape)

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of packed codes and float32 scales: 8 times the stored bytes."""
        check_shape(self, shape)
        rows, columns = shape
        return 8 * (packed_bytes(rows * columns, self.code_bits) + 4 * rows * self.groups(columns))

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the grid matrix found nearest to v.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors, (n,) or (m, n); None weighs them alike.

        Returns:
            (m, n) in the dtype of v (float32 for half precision). A matrix on such a grid is returned unchanged.
        """
        codes, scales = self.quantize(v, score)
        return self.dequantize(codes, scales, torch.promote_types(v.dtype, torch.float32))

    def quantize(self, v: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose scales and codes; `project` is their product.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors, (n,) or (m, n).

        Returns:
            Codes int8 (m, n) within +-top, and scales float32 (m, groups) of 17 significant bits.

        Raises:
            ValueError: if an entry of v is too large for float32 scales.
        """
        weights = check_matrix(self, v, score)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        if float(v.abs().max()) > _LARGEST:
            raise ValueError(f"{self} needs entries below 2**120 in magnitude, got {float(v.abs().max()):.3g}.")
        # Rows do not know of each other: some at a time stay in the cache for all passes.
        step = max(1, _CACHED // v.shape[1])
        parts = [
            self._quantize(v[at : at + step], None if weights is None else weights[at : at + step])
            for at in range(0, v.shape[0], step)
        ]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])

    def _quantize(self, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, columns = v.shape
        # One line a scale: (m * groups, width); entries that pad the last group have weight 0.
        lines = self._lines(v)
        weigh = self._lines(torch.ones_like(v) if weights is None else weights.to(v.dtype))
        real = self._lines(torch.ones_like(v))
        # A power of two brings each line to [1/2, 1), so that no square under- or overflows.
        peak = lines.abs().amax(1, keepdim=True)
        peak = torch.where(peak < _SMALLEST, torch.zeros_like(peak), peak)
        exponent = torch.frexp(peak).exponent
        unit = torch.ldexp(lines, -exponent) * (peak > 0)
        weigh = weigh / weigh.amax(1, keepdim=True).clamp_min(torch.finfo(weigh.dtype).tiny)
        scale = self._search(unit, weigh)
        scale = self._recover(unit, real, scale)
        codes = self._round(unit, scale).to(torch.int8).view(rows, -1)[:, :columns].contiguous()
        return codes, torch.ldexp(scale, exponent).to(torch.float32).view(rows, -1)

    def round(self, v: Tensor, scales: Tensor) -> Tensor:
        """Round v to the grid with given scales.

        Args:
            v: Matrix (m, n).
            scales: float32 (m, groups), as `quantize` returns them.

        Returns:
            Codes int8 (m, n).
        """
        lines = self._lines(v.to(torch.promote_types(v.dtype, torch.float32)))
        codes = self._round(lines, scales.reshape(-1, 1).to(lines.dtype))
        return codes.to(torch.int8).view(v.shape[0], -1)[:, : v.shape[1]].contiguous()

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        """Return the rule that rounds column j to the scales that suit v (m, n)."""
        _, scales = self.quantize(v, score)
        width = self.group or v.shape[1]
        lines = scales.T.contiguous()
        divisors = torch.where(lines > 0, lines, torch.ones_like(lines))

        def rule(column: Tensor, j: int) -> Tensor:
            scale = lines[j // width].to(column.dtype)
            if self.code_bits == 1:
                return torch.where(column < 0, -scale, scale)
            codes = (column / divisors[j // width].to(column.dtype)).round_().clamp_(-self.top, self.top)
            return codes.mul_(scale)

        return rule

    def encode(self, v: Tensor) -> dict[str, Tensor]:
        """Return v quantised and packed; a matrix on the grid (a projection, a sweep's result) loses nothing.

        Args:
            v: Matrix (m, n).

        Returns:
            codes: uint8 (ceil(m * n * bits / 8),), shifted to be non-negative, bit-packed row by row; scales: float32
            (m, groups of columns).
        """
        codes, scales = self.quantize(v)
        return {"codes": self.pack_codes(codes), "scales": scales}

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Return int8 codes of any shape, shifted and packed, uint8."""
        shifted = codes > 0 if self.code_bits == 1 else codes + self.top
        return pack(shifted.to(torch.uint8), self.code_bits)

    def unpack_codes(self, packed: Tensor, count: int) -> Tensor:
        """Return int8 codes (count,) of `pack_codes`."""
        codes = unpack(packed, self.code_bits, count).to(torch.int8)
        return 2 * codes - 1 if self.code_bits == 1 else codes - self.top

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Invert `encode`.

        Args:
            packed: Codes and scales.
            shape: (m, n) of the matrix.

        Returns:
            float32 (m, n): scale * code, without rounding.

        Raises:
            ValueError: if codes or scales do not belong to a matrix of this shape.
        """
        rows, columns = shape
        if tuple(packed["scales"].shape) != (rows, self.groups(columns)):
            raise ValueError(
                f"{self}.decode of a matrix {tuple(shape)} needs scales {(rows, self.groups(columns))}, "
                f"got {tuple(packed['scales'].shape)}."
            )
        return self.dequantize(self.unpack_codes(packed["codes"], rows * columns).view(rows, columns), packed["scales"])

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return scale * code (m, n) in dtype, without rounding in float32 and float64."""
        width = self.group or codes.shape[1]
        spread = scales.to(dtype).repeat_interleave(width, dim=1)[:, : codes.shape[1]]
        return codes.to(dtype) * spread

    def _lines(self, v: Tensor) -> Tensor:
        if self.group is None:
            return v
        return torch.nn.functional.pad(v, (0, -v.shape[1] % self.group)).reshape(-1, self.group)

    def _round(self, unit: Tensor, scale: Tensor) -> Tensor:
        if self.code_bits == 1:
            return torch.where(unit < 0, -1.0, 1.0).to(unit.dtype)
        ratio = unit / torch.where(scale > 0, scale, torch.ones_like(scale))
        return ratio.round_().clamp_(-self.top, self.top) * (scale > 0)

    def _search(self, unit: Tensor, weigh: Tensor) -> Tensor:
        """Return the best scale (lines, 1) among max-abs, clipped ones and least-squares refinements."""
        full = unit.abs().amax(1, keepdim=True) / self.top
        best = _trim(full)
        if self.code_bits == 1:
            candidates = []
        else:
            least, count = _SEARCH[self.code_bits]
            candidates = [_trim(full * ratio) for ratio in torch.linspace(1, least, count + 1)[1:].tolist()]
        codes = self._round(unit, best)
        error = _error(unit, codes, best, weigh)
        for scale in candidates:
            best, error = self._better(unit, weigh, scale, best, error)
        for _ in range(3):
            codes = self._round(unit, best)
            refined = (weigh * unit * codes).sum(1, keepdim=True) / (weigh * codes * codes).sum(1, keepdim=True)
            refined = torch.where(torch.isfinite(refined), refined, best).clamp(min=0)
            best, error = self._better(unit, weigh, _trim(torch.minimum(refined, full)), best, error)
        return best

    def _better(self, unit: Tensor, weigh: Tensor, scale: Tensor, best: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        tried = _error(unit, self._round(unit, scale), scale, weigh)
        wins = (tried < error) & (scale > 0)
        return torch.where(wins, scale, best), torch.where(wins, tried, error)

    def _recover(self, unit: Tensor, real: Tensor, scale: Tensor) -> Tensor:
        """Return the scales, with those of lines that already lie on a grid replaced by exact ones.

        If unit = s * code with largest code k, then max|unit| / k is s without rounding; few k give a 17-bit number.
        """
        peak = unit.abs().amax(1, keepdim=True)
        tops = torch.arange(self.top, 0, -1, device=unit.device, dtype=unit.dtype)
        guess = peak / tops
        possible = (_trim(guess) == guess) & (guess * tops == peak) & (peak > 0)
        scale = scale.clone()
        open_lines = possible.any(1)
        for column in possible.any(0).nonzero()[:, 0].tolist():
            index = (possible[:, column] & open_lines).nonzero()[:, 0]
            tried = guess[index, column, None]
            exact = ((self._round(unit[index], tried) * tried == unit[index]) | (real[index] == 0)).all(1)
            scale[index[exact]] = tried[exact]
            open_lines[index[exact]] = False
        return scale


def _error(unit: Tensor, codes: Tensor, scale: Tensor, weigh: Tensor) -> Tensor:
    return (codes * scale).sub_(unit).square_().mul_(weigh).sum(1, keepdim=True)


def _trim(scale: Tensor) -> Tensor:
    """Return the scale rounded to 17 significant bits, so that a product with 7 bits is exact in float32."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2.0**17).round() / 2.0**17, exponent)
