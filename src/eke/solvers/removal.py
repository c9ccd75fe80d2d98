"""Remove columns of a matrix (channels of its input) and let the survivors make up for them.

With H = A^-1 and B the columns of one channel, the best the survivors can do costs and changes (block OBS)

    1/2 tr(W_B^T G W_B (H_BB)^-1),      W <- W - W_B (H_BB)^-1 H_B:

which for a whole set R equals least squares on the kept columns K: W_K + W_R A_RK A_KK^-1. G does not matter for what
is best, only for what it costs. With the mean input, a bias takes up the mean of what is lost and A is replaced by the
covariance. Everything is computed in float64; A is damped relative to its mean diagonal.

Cost: one inverse, n^3; then n^2 r a removal of r columns for the greedy order, which goes by single channels up to 128
and by lots of a 128th of what is left above.

Source: Hassibi & Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1993; Frantar &
Alistarh, "Optimal brain compression", 2022 (blocks of weights: Kurtic et al., "The optimal BERT surgeon", 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import MANY, Metric, damped_cholesky, finite

DAMPING = 1e-3
"""Default damping of A, relative to the mean of its diagonal."""
_LOTS, _WAITING = 128, 256

Visit = Callable[[Tensor, Sequence[Callable[[], Tensor]]], None]
"""`visit(channels, changes)`: called when so many channels are removed."""


@dataclass(frozen=True)
class Removal:
    """What is left after removing columns.

    Args:
        weight: (m, n - removed), compensated, in the dtype of the given matrix.
        bias: (m,), or None if neither a mean nor a bias was given.
        loss: Predicted loss increase, undamped.
        plain_loss: The same without any compensation.
    """

    weight: Tensor
    bias: Tensor | None
    loss: float
    plain_loss: float


def remove_columns(
    weight: Tensor,
    a: Tensor,
    remove: Tensor,
    *,
    g: Tensor | None = None,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    locations: float = 1.0,
    damping: float = DAMPING,
) -> Removal:
    """Remove columns and compensate for them in closed form.

    Args:
        weight: W (m, n).
        a: (n, n), second moment of the inputs summed over locations, as `Factors.a[0]`.
        remove: Indices of the columns to remove, int64.
        g: (m, m), second moment of the output gradients; None prices the mean squared change of the output.
        mean: (n,), mean input; then the bias compensates too. Needs the `locations` that a sums over.
        bias: (m,), the bias so far; None counts as 0.
        locations: Locations summed in a, so that a / locations and `mean` belong together.
        damping: Of a, relative to its mean diagonal.

    Returns:
        The compensated matrix and bias, and the predicted loss increase. Never worse than leaving the survivors alone.
        Shapes that do not fit, entries that are not finite, columns out of range and a singular `a` raise ValueError.
    """
    Metric(a, g).check(tuple(weight.shape))
    gone = _mask(remove, weight.shape[1])
    kept = ~gone
    w, among, across = finite(weight, what="remove_columns"), a[kept][:, kept].double(), a[kept][:, gone].double()
    plain_loss = _quadratic(w[:, gone], a[gone][:, gone], g)
    if mean is not None:
        # The best bias absorbs D mean, so what remains is measured by the covariance.
        mean = finite(mean, what="remove_columns")
        among -= locations * torch.outer(mean[kept], mean[kept])
        across -= locations * torch.outer(mean[kept], mean[gone])
    # A covariance is a difference: where the mean is all that inputs have, rounding is all that is left of it.
    factor = damped_cholesky(among, damping, most=1e-2 if mean is None else 1e6)
    patch = torch.cholesky_solve(across @ w[:, gone].T, factor).T
    change = _without(w, gone, patch) - w
    loss = _quadratic(change, a, g)
    if mean is not None:
        shifted = (change @ mean)[:, None]
        loss -= 0.5 * locations * float((shifted * (shifted if g is None else g.double() @ shifted)).sum())
    if plain_loss < loss:
        patch, mean, loss = torch.zeros_like(patch), None, plain_loss
    result = w[:, kept] + patch
    shift = None
    if mean is not None:
        shift = w[:, gone] @ mean[gone] - patch @ mean[kept]
    new_bias = bias
    if shift is not None:
        new_bias = (shift if bias is None else bias.detach().double() + shift).to(weight.dtype)
    return Removal(result.to(weight.dtype), new_bias, loss, plain_loss)


@dataclass(frozen=True)
class Consumer:
    """One matrix that reads the channels.

    Args:
        weight: W (m, n).
        a: (n, n), second moment of its inputs.
        blocks: int64 (channels, r), the columns that belong to each channel.
        g: (m, m), second moment of its output gradients; None for the identity.
    """

    weight: Tensor
    a: Tensor
    blocks: Tensor
    g: Tensor | None = None

    def __post_init__(self) -> None:
        Metric(self.a, self.g).check(tuple(self.weight.shape))
        finite(self.weight, what="Consumer")
        _check_blocks(self.blocks, self.weight.shape[1])


@dataclass(frozen=True)
class RemovalOrder:
    """A greedy order of removal.

    Args:
        channels: int64 (count,), first removed first.
        losses: float64 (count,), predicted loss increase after each removal, survivors of all consumers compensated.
    """

    channels: Tensor
    losses: Tensor


def removal_scores(
    weight: Tensor, a: Tensor, blocks: Tensor, g: Tensor | None = None, *, damping: float = DAMPING
) -> Tensor:
    """Return the predicted loss of removing each channel alone, survivors compensated.

    Args:
        weight: W (m, n).
        a: (n, n), second moment of the inputs.
        blocks: int64 (channels, r), the columns of each channel.
        g: (m, m), second moment of the output gradients; None for the identity.
        damping: Of a, relative to its mean diagonal.

    Returns:
        float64 (channels,). Several consumers of the same channels: add their scores.
    """
    return _State(Consumer(weight, a, blocks, g), damping).scores(torch.arange(blocks.shape[0], device=blocks.device))


def greedy_removal(
    consumers: Sequence[Consumer],
    count: int,
    *,
    damping: float = DAMPING,
    extra: Tensor | None = None,
    stops: Mapping[int, Visit] | None = None,
) -> RemovalOrder:
    """Order channels by removing the cheapest one again and again, with exact updates after each removal.

    As long as more than 255 channels are left, the cheapest 128th of them goes at once.

    Args:
        consumers: All matrices that read the channels; their losses add.
        count: Channels to remove.
        damping: Of each a, relative to its mean diagonal.
        extra: float (channels,), added to the loss of each channel, for what no consumer sees.
        stops: Called after so many removals, with the channels removed so far and one function a consumer that gives
            the change (m, n) of its matrix, survivors compensated.

    Returns:
        The order; `losses[k - 1]` is the predicted loss of removing the first k channels together. Inside a lot it is
        shared out by the scores of its channels.

    Raises:
        ValueError: if there is no consumer, they disagree on the number of channels, or count is out of range.
    """
    sizes = {consumer.blocks.shape[0] for consumer in consumers}
    if len(sizes) != 1:
        raise ValueError(f"greedy_removal needs consumers of the same channels, got channel numbers {sorted(sizes)}.")
    channels = sizes.pop()
    if not 0 <= count <= channels:
        raise ValueError(f"count must be from 0 to the {channels} channels, got {count}.")
    stops = stops or {}
    states = [_State(consumer, damping, follow=bool(stops)) for consumer in consumers]
    left = torch.arange(channels, device=consumers[0].blocks.device)
    order, losses, total = list[int](), list[float](), 0.0
    while len(order) < count:
        scores = sum((state.scores(left) for state in states), torch.zeros(len(left), dtype=torch.float64))
        if extra is not None:
            scores = scores + extra.double()[left]
        end = min((stop for stop in stops if len(order) < stop < count), default=count)
        lot = min(max(1, len(left) // _LOTS), end - len(order))
        best = scores.argsort(stable=True)[:lot] if lot > 1 else scores.argmin()[None]
        chosen, alone = left[best], scores[best]
        joint = sum(state.remove(chosen) for state in states)
        joint += 0.0 if extra is None else float(extra.double()[chosen].sum())
        shares = alone.cumsum(0) / max(float(alone.sum()), 1e-300)
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[best] = False
        left = left[stays]
        order += chosen.tolist()
        losses += [total + joint * share for share in shares.tolist()]
        total += joint
        if len(order) in stops:
            stops[len(order)](torch.tensor(order), [state.change for state in states])
    return RemovalOrder(torch.tensor(order, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64))


class _State:
    """H = A^-1 and Q = W^T G W of the columns still there; the matrix itself is not needed.

    A removal subtracts thin products from both. Scores need only the blocks on their diagonals, which are kept up to
    date; of the rest the rows asked for are, and the products wait until they are worth one of matrices.
    """

    def __init__(self, consumer: Consumer, damping: float, *, follow: bool = False) -> None:
        self._given = consumer.weight.detach()
        # W - R^T P is the present matrix, of the present columns.
        self._weight = self._given.clone() if follow else None
        self._columns = torch.arange(self._given.shape[1], device=self._given.device)
        w = consumer.weight.detach().double()
        self.blocks = consumer.blocks.clone()
        self.inverse = torch.cholesky_inverse(damped_cholesky(consumer.a, damping))
        self.cost = w.T @ (w if consumer.g is None else consumer.g.double() @ w)
        rows, columns = self.blocks[:, :, None], self.blocks[:, None, :]
        self._inverses, self._costs = self.inverse[rows, columns], self.cost[rows, columns]
        self._gone = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
        # H - L^T P and Q - S^T P - P^T S are the present ones, L, P and S of so many rows.
        self._waiting = 0
        self._lines, self._patches, self._slopes = (w.new_empty(_WAITING, w.shape[1]) for _ in range(3))
        self._read = self._given.new_empty(_WAITING if follow else 0, w.shape[0])

    def scores(self, channels: Tensor) -> Tensor:
        """Return 1/2 tr(Q_BB (H_BB)^-1) for the blocks B of the given channels."""
        solved = torch.linalg.solve(self._inverses[channels], self._costs[channels])
        traces: Tensor = solved.diagonal(dim1=1, dim2=2).sum(1)
        return 0.5 * traces.clamp_min(0)

    def remove(self, channels: Tensor) -> float:
        """Remove channels together: with T = I - E_B (H_BB)^-1 H_B:, H becomes H T and Q becomes T^T Q T.

        Args:
            channels: Their indices.

        Returns:
            The loss of it, 1/2 tr(Q_BB (H_BB)^-1).
        """
        block = self.blocks[channels].flatten()
        if self._waiting + len(block) > len(self._lines):
            self._apply()
        held = slice(self._waiting)
        line, patches, slopes = self._lines[held], self._patches[held], self._slopes[held]
        rows = self.inverse[block] - line[:, block].T @ patches
        slope = self.cost[block] - slopes[:, block].T @ patches - patches[:, block].T @ slopes
        patch = torch.linalg.solve(rows[:, block], rows)
        # T^T Q T = Q - Q_:B P - P^T Q_B: + P^T Q_BB P, with P = (H_BB)^-1 H_B: and as two thin products.
        half = slope - 0.5 * (slope[:, block] @ patch)
        read = None
        if self._weight is not None:
            read = self._weight[:, block].T - patches[:, block].T.to(self._read.dtype) @ self._read[held]
        loss = 0.5 * float(torch.linalg.solve(rows[:, block], slope[:, block]).diagonal().sum())
        if len(block) > len(self._lines):
            self.inverse.addmm_(rows.T, patch, alpha=-1)
            self.cost.addmm_(half.T, patch, alpha=-1).addmm_(patch.T, half, alpha=-1)
            if self._weight is not None and read is not None:
                self._weight.addmm_(read.T, patch.to(read.dtype), alpha=-1)
        else:
            new = slice(self._waiting, self._waiting + len(block))
            self._lines[new], self._patches[new], self._slopes[new] = rows, patch, half
            if read is not None:
                self._read[new] = read
            self._waiting += len(block)
        of_rows, of_patch, of_half = (part[:, self.blocks].transpose(0, 1) for part in (rows, patch, half))
        self._inverses -= of_rows.mT @ of_patch
        crossed = of_half.mT @ of_patch
        self._costs -= crossed + crossed.mT
        self._gone[block] = True
        if 4 * int(self._gone.sum()) > len(self._gone):
            self._compact()
        return max(0.0, loss)

    def _apply(self) -> None:
        """Subtract the products that wait."""
        line, patch, slope = (part[: self._waiting] for part in (self._lines, self._patches, self._slopes))
        self.inverse.addmm_(line.T, patch, alpha=-1)
        self.cost.addmm_(slope.T, patch, alpha=-1).addmm_(patch.T, slope, alpha=-1)
        if self._weight is not None:
            self._weight.addmm_(self._read[: self._waiting].T, patch.to(self._weight.dtype), alpha=-1)
        self._waiting = 0

    def change(self) -> Tensor:
        """Return the change (m, n) of the matrix: minus what is gone, and what the survivors make up for it.

        Raises:
            ValueError: if the matrix was not followed.
        """
        if self._weight is None:
            raise ValueError(f"The matrix {tuple(self._given.shape)} was not followed: ask for it with stops=.")
        self._apply()
        change = -self._given
        kept = ~self._gone
        change[:, self._columns[kept]] += self._weight[:, kept]
        return change

    def _compact(self) -> None:
        """Drop the rows and columns of removed channels, so that later updates are cheaper."""
        self._apply()
        kept = (~self._gone).nonzero()[:, 0]
        place = torch.zeros_like(self._gone, dtype=torch.int64)
        place[kept] = torch.arange(len(kept), device=kept.device)
        self.blocks = place[self.blocks]  # removed channels point anywhere and are never asked for again
        self.inverse, self.cost = self.inverse[kept][:, kept].contiguous(), self.cost[kept][:, kept].contiguous()
        self._columns = self._columns[kept]
        if self._weight is not None:
            self._weight = self._weight[:, kept].contiguous()
        self._lines, self._patches, self._slopes = (
            part.new_empty(len(part), len(kept)) for part in (self._lines, self._patches, self._slopes)
        )
        self._gone = self._gone.new_zeros(len(kept))


def _mask(remove: Tensor, columns: int) -> Tensor:
    if remove.numel() and (int(remove.min()) < 0 or int(remove.max()) >= columns):
        raise ValueError(
            f"remove holds columns from {int(remove.min())} to {int(remove.max())}, the matrix has {columns}."
        )
    gone = torch.zeros(columns, dtype=torch.bool, device=remove.device)
    gone[remove] = True
    return gone


def _without(w: Tensor, gone: Tensor, patch: Tensor | None = None) -> Tensor:
    result = w.clone()
    result[:, gone] = 0
    if patch is not None:
        result[:, ~gone] += patch
    return result


def _quadratic(delta: Tensor, a: Tensor, g: Tensor | None) -> float:
    """Return 1/2 tr(D^T G D A); large matrices are multiplied in float32: the value is compared, never solved with."""
    dtype = torch.float32 if delta.numel() > MANY else torch.float64
    weighted = delta.to(dtype) @ a.to(dtype)
    return 0.5 * float(((weighted if g is None else g.to(dtype) @ weighted).double() * delta).sum())


def _check_blocks(blocks: Tensor, columns: int) -> None:
    if blocks.dim() != 2 or blocks.dtype != torch.int64:
        raise ValueError(
            f"blocks must be int64 (channels, columns a channel), got {blocks.dtype} {tuple(blocks.shape)}."
        )
    if blocks.numel() and (int(blocks.min()) < 0 or int(blocks.max()) >= columns):
        raise ValueError(f"blocks hold columns {int(blocks.min())} to {int(blocks.max())}, the matrix has {columns}.")
    twice = blocks.numel() - len(set(blocks.flatten().tolist()))
    if twice:
        raise ValueError(f"blocks name {twice} columns twice; a column has one channel.")
