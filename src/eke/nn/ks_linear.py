"""A linear layer whose weight is a product of Kronecker-sparse factors: y = x (X_1 ... X_L)^T + bias.

Named chains: "monarch" (1, m/k, r k, k) (k, r k, n/k, 1), k blocks and interface rank r; "butterfly", square dyadic;
"btt", (1, m_1, n_1 r, m_0) (n_1, m_0 r, n_0, 1) with m = m_1 m_0, n = n_1 n_0 as square as they go; "low_rank".
Sizes that the chain does not fit are padded with zeros on the way in and cut on the way out.
Sources: Dao et al., "Monarch", 2022; Dao et al., "Learning fast algorithms with butterflies", 2019; Qiu et al.,
"Compute better spent", 2024. Cost: 2 sum(a b c d) operations a sample.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from ..linalg import Factorization, Metric, factorize
from ..ops import ks_chain_matmul
from ..patterns import Chain, to_dense
from .ks_init import Init, check_init, fill_
from .param_groups import Core, initial_std

ChainName = Literal["monarch", "butterfly", "btt", "low_rank"]
_NAMES = ("monarch", "butterfly", "btt", "low_rank")
_BLOCKS = 4
Layer = TypeVar("Layer", bound="KSLinear")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _balanced(n: int) -> tuple[int, int]:
    """Return two factors, the larger one first, of the smallest number from n on that has them within a factor of 2."""
    while True:
        low = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
        if n // low <= 2 * low or n < 4:
            return n // low, low
        n += 1


def named_chain(
    name: ChainName, shape: tuple[int, int], *, rank: int | None = None, blocks: int | None = None
) -> Chain:
    """Return a chain of a known kind for a matrix of any size.

    Args:
        name: "monarch", "butterfly", "btt" or "low_rank".
        shape: (outputs, inputs) of the layer.
        rank: Of the blocks at each interface; "low_rank" needs it. None: 1 for "butterfly", 2 for "btt", and for
            "monarch" what makes the blocks of the narrower side square.
        blocks: Dense blocks of "monarch"; None for 4.

    Returns:
        A chain at least as large as the matrix.

    Raises:
        ValueError: if the name is unknown, a number is out of range, or blocks are given for another kind.
    """
    outputs, inputs = shape
    if name not in _NAMES:
        raise ValueError(f"A chain is a Chain or one of {', '.join(map(repr, _NAMES))}, got {name!r}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}.")
    if blocks is not None and (name != "monarch" or blocks < 1):
        raise ValueError(f"blocks is a positive number for chain='monarch', got {blocks!r} with {name!r}.")
    if name == "low_rank":
        if rank is None:
            raise ValueError(f"chain='low_rank' needs rank=, a number from 1 to {min(shape)}, got None.")
        return Chain.low_rank(outputs, inputs, rank)
    if name == "butterfly":
        return Chain.butterfly(max(2, 1 << (max(shape) - 1).bit_length()), rank=rank or 1)
    if name == "btt":
        (m1, m0), (n1, n0) = _balanced(outputs), _balanced(inputs)
        return Chain.radix([m1, m0], [n1, n0], ranks=[rank or 2])
    k = blocks or _BLOCKS
    high, wide = _up(outputs, k) // k, _up(inputs, k) // k
    middle = k * (rank or -(-min(high, wide) // k))
    return Chain([(1, high, middle, k), (k, middle, wide, 1)])


class KSLinear(nn.Module):
    """A linear layer with a product of Kronecker-sparse factors as its weight.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        chain: The factors, or the name of a kind (see `named_chain`).
        rank: For a named chain.
        blocks: For chain="monarch".
        bias: Whether to add a trained bias.
        init: What the factors start as: "normal", each with the deviation of `initial_std`; "orthogonal", so that
            lengths are kept where every factor is square; and for square chains such as a butterfly "identity",
            "hadamard" (orthonormal), or "fft": `torch.fft.fft` of digit-reversed inputs, for complex layers.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the chain is smaller than the layer, rank or blocks come with a Chain, or the chain cannot hold
            what `init` asks for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        chain: Chain | ChainName,
        rank: int | None = None,
        blocks: int | None = None,
        bias: bool = True,
        init: Init = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(chain, Chain):
            chain = named_chain(chain, (out_features, in_features), rank=rank, blocks=blocks)
        elif rank is not None or blocks is not None:
            raise ValueError(f"rank and blocks belong to a named chain, got rank={rank!r}, blocks={blocks!r}.")
        rows, cols = chain.shape
        if in_features < 1 or out_features < 1 or rows < out_features or cols < in_features:
            raise ValueError(
                f"KSLinear({in_features}, {out_features}) needs a chain with at least {out_features} rows and "
                f"{in_features} columns, got {rows} x {cols}: {chain}."
            )
        check_init(init, chain, dtype or torch.get_default_dtype())
        self.in_features, self.out_features, self.chain, self.init = in_features, out_features, chain, init
        self.factors = nn.ParameterList(torch.empty(*pattern, device=device, dtype=dtype) for pattern in chain)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Give the factors what `init` names, drawn anew where it is random; the bias becomes zero.

        Args:
            generator: Source of randomness; None for torch's own.
        """
        for pattern, core in zip(self.chain, self.cores()):
            if self.init == "normal":
                std = initial_std(core.fan_in, core.fan_out)
                nn.init.normal_(core.parameter, std=std, generator=generator)
            else:
                fill_(core.parameter, pattern, self.init, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def zero_output_(self) -> None:
        """Set the factor applied last to zero: how the last layer of a residual block should start."""
        nn.init.zeros_(self.factors[0])

    def cores(self) -> list[Core]:
        """Return the factors, leftmost first, with their fans."""
        return [Core(blocks, p.c, p.b) for p, blocks in zip(self.chain, self.factors)]

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        chain: Chain | ChainName,
        rank: int | None = None,
        blocks: int | None = None,
        metric: Metric | None = None,
        refine: int = 0,
    ) -> Self:
        """Project a dense layer: the factors of its weight by `linalg.factorize`, the same bias.

        Args:
            linear: Left as it is.
            chain: A chainable chain, or the name of a kind.
            rank: For a named chain.
            blocks: For chain="monarch".
            metric: Measures the change, such as `Metric(x.T @ x / len(x))` of the layer's inputs x; None for the plain
                distance of the weights.
            refine: Sweeps over the factors afterwards, each of which can only lower the error.

        Returns:
            A layer near the dense one; compare `to_dense()` with its weight.
        """
        return projected(cls, linear, chain=chain, rank=rank, blocks=blocks, metric=metric, refine=refine)[0]

    def to_dense(self) -> Tensor:
        """Return the weight, (out_features, in_features), differentiable in the factors."""
        whole = functools.reduce(torch.matmul, (to_dense(blocks) for blocks in self.factors))
        return whole[: self.out_features, : self.in_features]

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
            raise ValueError(f"KSLinear takes (..., {self.in_features}), got {tuple(x.shape)}.")
        rows, cols = self.chain.shape
        if cols > self.in_features:
            x = nn.functional.pad(x, (0, cols - self.in_features))
        if rows == self.out_features:
            return ks_chain_matmul(x, list(self.factors), bias=self.bias)
        y = ks_chain_matmul(x, list(self.factors))[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        return f"{self.in_features}, {self.out_features}, chain={self.chain}, bias={self.bias is not None}"


def projected(
    kind: type[Layer],
    linear: nn.Linear,
    *,
    chain: Chain | ChainName,
    rank: int | None = None,
    blocks: int | None = None,
    metric: Metric | None = None,
    refine: int = 0,
) -> tuple[Layer, Factorization]:
    """Project a dense layer and say how near it came.

    Args:
        kind: `KSLinear`, or a class derived from it.
        linear: Left as it is.
        chain: A chainable chain, or the name of a kind.
        rank: For a named chain.
        blocks: For chain="monarch".
        metric: Measures the change; None for the plain distance of the weights.
        refine: Sweeps over the factors afterwards.

    Returns:
        The layer, and the factorization of its weight (with zeros added where the chain is larger).

    Raises:
        ValueError: if a metric comes with a chain of another size than the layer's.
    """
    weight = linear.weight.detach()
    # On meta nothing is drawn: the caller's random numbers stay as they are.
    layer = kind(
        linear.in_features, linear.out_features, chain=chain, rank=rank, blocks=blocks,
        bias=linear.bias is not None, device="meta", dtype=weight.dtype,
    ).to_empty(device=weight.device).train(linear.training)  # fmt: skip
    rows, cols = layer.chain.shape
    if metric is not None and (rows, cols) != tuple(weight.shape):
        raise ValueError(
            f"A metric needs a chain of the layer's size {tuple(weight.shape)}, got {rows} x {cols}: {layer.chain}."
        )
    padded = nn.functional.pad(weight, (0, cols - linear.in_features, 0, rows - linear.out_features))
    padded = padded.to(torch.promote_types(weight.dtype, torch.float32))
    found = factorize(padded, layer.chain, metric=metric, refine=refine)
    with torch.no_grad():
        for parameter, block in zip(layer.factors, found.blocks):
            parameter.copy_(block)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
    return layer.requires_grad_(linear.weight.requires_grad), found
