"""A linear layer whose weight has blocks A_ij = U_i diag(s_ij) V_j that share their bases along rows and columns.

With s_ij = 1 for all it is a matrix of rank r; with one block too. Parameters: r (m + n + b_1 b_2).
Projection of a dense weight: each of U, V and s in turn is the solution of a linear least-squares problem.
Source: Lee et al., "BLAST: Block-level adaptive structured matrices", 2024 (the layer; it fits by gradient descent).
Cost: 2 r (m + n + b_1 b_2) operations a sample.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from .param_groups import Core, initial_std


class BLASTLinear(nn.Module):
    """A linear layer with a block-level adaptive structured weight.

    Args:
        in_features: Inputs; padded with zeros to a multiple of the blocks.
        out_features: Outputs; cut from a multiple of the blocks.
        blocks: (b_1, b_2), blocks along outputs and inputs, or one number for both.
        rank: Columns r of each U_i.
        bias: Whether to add a trained bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if a number is not positive, or there are more blocks than features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        blocks: int | tuple[int, int],
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows, cols = (blocks, blocks) if isinstance(blocks, int) else blocks
        if rank < 1 or not 1 <= rows <= out_features or not 1 <= cols <= in_features:
            raise ValueError(
                f"BLASTLinear({in_features}, {out_features}) needs rank >= 1 and blocks from 1 to the features, got "
                f"rank={rank!r}, blocks={blocks!r}."
            )
        self.in_features, self.out_features, self.blocks, self.rank = in_features, out_features, (rows, cols), rank
        height, width = -(-out_features // rows), -(-in_features // cols)
        self.left = nn.Parameter(torch.empty(rows, height, rank, device=device, dtype=dtype))
        self.middle = nn.Parameter(torch.empty(rows, cols, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(cols, rank, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw the cores anew, each with the deviation of `initial_std`; the bias becomes zero.

        Args:
            generator: Source of randomness; None for torch's own.
        """
        for core in self.cores():
            nn.init.normal_(core.parameter, std=initial_std(core.fan_in, core.fan_out), generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def cores(self) -> list[Core]:
        """Return U, s and V with their fans."""
        rows, cols = self.blocks
        return [
            Core(self.left, self.rank, self.left.shape[1]),
            Core(self.middle, cols, rows),
            Core(self.right, self.right.shape[2], self.rank),
        ]

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        blocks: int | tuple[int, int],
        rank: int,
        sweeps: int = 30,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Project a dense layer by alternating least squares.

        Args:
            linear: Left as it is.
            blocks: See the class.
            rank: See the class.
            sweeps: Rounds over V, s and U; the error never grows.
            generator: Source of a random start; None starts from the best matrix of this rank, which is one of these
                with s = 1, so the error is at most that one's. Random starts may end lower or in a local minimum.

        Returns:
            A layer near the dense one.
        """
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, blocks=blocks, rank=rank, bias=linear.bias is not None,
            device="meta", dtype=weight.dtype,
        ).to_empty(device=weight.device).train(linear.training)  # fmt: skip
        if generator is not None:
            layer.reset_parameters(generator=generator)
        with torch.no_grad():
            layer._fit(weight, sweeps, from_rank=generator is None)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.requires_grad_(linear.weight.requires_grad)

    def _fit(self, weight: Tensor, sweeps: int, *, from_rank: bool) -> None:
        (rows, cols), (height, width) = self.blocks, (self.left.shape[1], self.right.shape[2])
        padded = nn.functional.pad(
            weight.double(), (0, cols * width - self.in_features, 0, rows * height - self.out_features)
        )
        target = padded.reshape(rows, height, cols, width)
        u, s, v = self.left.double(), torch.ones_like(self.middle, dtype=torch.float64), self.right.double()
        if from_rank:
            outer, values, inner = torch.linalg.svd(padded, full_matrices=False)
            rank = min(self.rank, len(values))
            u, v = torch.zeros_like(u), torch.zeros_like(v)
            u[..., :rank] = (outer[:, :rank] * values[:rank]).reshape(rows, height, rank)
            v[:, :rank] = inner[:rank].reshape(rank, cols, width).transpose(0, 1)
        for _ in range(sweeps):
            # U_i: rows of A against [diag(s_ij) V_j]_j.
            wide = torch.einsum("ijr,jrq->irjq", s, v).flatten(2)
            u = _solve(wide @ wide.mT, wide @ target.flatten(2).mT).mT
            # V_j: columns of A against [U_i diag(s_ij)]_i.
            tall = torch.einsum("ipr,ijr->jipr", u, s).flatten(1, 2)
            v = _solve(tall.mT @ tall, tall.mT @ target.permute(2, 0, 1, 3).flatten(1, 2))
            # s_ij: a Hadamard product of the two Gram matrices.
            gram = torch.einsum("ipr,ipt,jrq,jtq->ijrt", u, u, v, v)
            s = _solve(gram, torch.einsum("ipr,ipjq,jrq->ijr", u, target, v)[..., None])[..., 0]
        self.left.copy_(u), self.middle.copy_(s), self.right.copy_(v)

    def to_dense(self) -> Tensor:
        """Return the weight, (out_features, in_features), differentiable in the cores."""
        whole = torch.einsum("ipr,ijr,jrq->ipjq", self.left, self.middle, self.right)
        return whole.flatten(2).flatten(0, 1)[: self.out_features, : self.in_features]

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
            raise ValueError(f"BLASTLinear takes (..., {self.in_features}), got {tuple(x.shape)}.")
        _, cols = self.blocks
        width = self.right.shape[2]
        x = nn.functional.pad(x, (0, cols * width - self.in_features))
        groups = x.reshape(-1, cols, width).transpose(0, 1)
        coded = torch.bmm(groups, self.right.mT)  # (b2, n, r)
        mixed = torch.einsum("ijr,jnr->inr", self.middle, coded)
        y = torch.bmm(mixed, self.left.mT).transpose(0, 1).flatten(1)[:, : self.out_features]
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        return f"{self.in_features}, {self.out_features}, blocks={self.blocks}, rank={self.rank}"


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return the solution for a Gram matrix that may be singular, by a ridge far below its size."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + 1e-12 * size * eye, right)
    return solution
