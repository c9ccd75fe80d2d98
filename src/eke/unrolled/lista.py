"""Networks unrolled from proximal gradient: layers with trained weights, steps and thresholds.

    LISTA      x+ = S_t(W1 b + W2 x)                       W1 and W2 of each layer trained freely
    LISTACP    x+ = S_t(x + g W^H (b - A x))               W of each layer; LISTA with W2 = I - W1 A
    LISTACPSS  the same with support selection: the p_k largest entries pass the threshold unshrunk
    TiLISTA    the same with one W for all layers
    ALISTA     the same with W fixed to its closed form: 2 scalars a layer are left

Every layer has a threshold t (trained as its logarithm, so it stays positive) and, but for LISTA, a step g.
At their first weights (A / L', L' = 1.001 |A|^2) LISTA, LISTACP and TiLISTA are ISTA. Cost: 2 m n a layer.
Shares p_k are min(1.2 (k + 1), 13) per cent. Sources: Gregor and LeCun, "Learning fast approximations of sparse
coding", 2010; Chen, Liu, Wang and Yin, "Theoretical linear convergence of unfolded ISTA", 2018; Liu, Chen, Wang and
Yin, "ALISTA", 2019.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from .convolutional import convolutional_weight
from .operators import Convolutional, Dense, Operator, as_operator
from .shrink import select_support, soft_threshold
from .solver import SparseSolver, State
from .weights import analytic_weight

_MARGIN = 1.001
"""L' = 1.001 |A|^2: steps of 1 / L' never raise the objective."""


class Unrolled(SparseSolver):
    """A network whose layers are the steps of a solver; each has its own threshold.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        layers: Steps, at least 1.
        thresholds: First thresholds, one for all layers or one each, >= 0.

    Raises:
        ValueError: if thresholds are not of that number and sign.
    """

    def __init__(self, A: Tensor | Operator, *, layers: int, thresholds: float | Sequence[float]) -> None:
        super().__init__(A, iterations=layers)
        values = _each(thresholds, layers, "thresholds")
        if not all(value >= 0 for value in values):
            raise ValueError(f"thresholds must be 0 or more, got {values}.")
        logs = [math.log(value) if value > 0 else -math.inf for value in values]
        self.log_thresholds = self._scalars(logs)

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """Return the parameters that one layer has for itself."""
        return [self.log_thresholds[layer]]

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all layers use."""
        own = {id(p) for k in range(len(self.log_thresholds)) for p in self.parameters_of(k)}
        return [p for p in self.parameters() if id(p) not in own]

    def prefix(self, depth: int) -> Self:
        """Return the network of the first layers; parameters are shared.

        Args:
            depth: Layers to keep, from 1.

        Returns:
            The network.

        Raises:
            ValueError: if there are not so many.
        """
        if not 1 <= depth <= len(self.log_thresholds):
            raise ValueError(f"depth must be from 1 to {len(self.log_thresholds)} layers, got {depth!r}.")
        other = copy.copy(self)
        other.iterations = depth
        return other

    def _scalars(self, values: Sequence[float]) -> nn.ParameterList:
        device, dtype = self.operator.device, real_dtype(self.operator.dtype)
        return nn.ParameterList([nn.Parameter(torch.tensor(v, device=device, dtype=dtype)) for v in values])

    def _threshold(self, k: int) -> Tensor:
        logarithm: Tensor = self.log_thresholds[k]
        return logarithm.exp()


class LISTA(Unrolled):
    """The network of Gregor and LeCun: every matrix free.

    Args:
        A: (m, n), or an operator that can be written out; one for all samples.
        layers: Layers.
        penalty: Of the lasso that the first weights solve by ISTA; thresholds begin at penalty / L'.
        tied: Whether all layers share one W2.

    Raises:
        ValueError: if every sample has an A of its own.
    """

    def __init__(self, A: Tensor | Operator, *, layers: int = 16, penalty: float = 0.4, tied: bool = False) -> None:
        operator = one_dictionary(A, "LISTA")
        scale = _scale(operator)
        super().__init__(operator, layers=layers, thresholds=penalty * scale)
        matrix = operator.dense().detach()
        first = scale * matrix.mH
        second = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) - first @ matrix
        self.input_weight = nn.Parameter(first.contiguous())
        self.tied = tied
        count = min(1, layers - 1) if tied else layers - 1
        self.state_weights = nn.ParameterList([nn.Parameter(second.clone()) for _ in range(count)])

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """Return the threshold and W2 of a layer; the first one has no W2."""
        own = [] if self.tied or layer == 0 else [self.state_weights[layer - 1]]
        return [*super().parameters_of(layer), *own]

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, W1 b and what the first layer shrinks; a warm start enters by W2 = I - W1 A."""
        inner = b @ self.input_weight.T
        if x0 is None:
            return b.new_zeros(len(b), operator.shape[1]), inner, inner
        return x0, inner, inner + x0 - operator.forward(x0) @ self.input_weight.T

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a layer."""
        del operator
        x, inner, first = state
        if k:
            first = inner + x @ self.state_weights[0 if self.tied else k - 1].T
        return soft_threshold(first, self._threshold(k)), inner, first


class _Coupled(Unrolled):
    """x+ = shrink(x + g W^H (b - A x)), the layer of all networks but LISTA.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        layers: Layers.
        thresholds: First thresholds.
        steps: First steps.
        shares: What part of the entries may pass each layer unshrunk.
    """

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        layers: int,
        thresholds: float | Sequence[float],
        steps: float | Sequence[float],
        shares: float | Sequence[float],
    ) -> None:
        super().__init__(A, layers=layers, thresholds=thresholds)
        self.steps = self._scalars(_each(steps, layers, "steps"))
        self.shares = _each(shares, layers, "shares")
        if not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares are parts of the entries, from 0 to 1, got {self.shares}.")

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """Return the threshold and the step of a layer."""
        return [*super().parameters_of(layer), self.steps[layer]]

    @abc.abstractmethod
    def weight_of(self, k: int, operator: Operator, state: State) -> Operator:
        """Return W of a layer as an operator; the layer uses its adjoint."""

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, b and b - A x."""
        if x0 is None:
            return b.new_zeros(len(b), operator.shape[1]), b, b
        return x0, b, b - operator.forward(x0)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a layer."""
        x, b, residual, *rest = state
        if k:
            residual = b - operator.forward(x)
        moved = x + self.steps[k] * self.weight_of(k, operator, state).adjoint(residual)
        return select_support(moved, self._threshold(k), self.shares[k]), b, residual, *rest


class LISTACP(_Coupled):
    """Coupled weights: one W for each layer.

    Args:
        A: (m, n), or an operator; one for all samples. Weights of a convolutional one are filters, else matrices.
        layers: Layers.
        penalty: Of the lasso that the first weights solve; thresholds begin at penalty / L'.
        scale: First weights are A times this; None for 1 / L', which makes the network ISTA.
        shares: What part of the entries may pass each layer unshrunk: one for all or one each.

    Raises:
        ValueError: if every sample has an A of its own, or a number is out of range.
    """

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        layers: int = 16,
        penalty: float = 0.4,
        scale: float | None = None,
        shares: float | Sequence[float] = 0.0,
    ) -> None:
        operator = one_dictionary(A, type(self).__name__)
        super().__init__(operator, layers=layers, thresholds=penalty * _scale(operator), steps=1.0, shares=shares)
        first = (_scale(operator) if scale is None else scale) * _tensor_of(operator).detach()
        self.weights = nn.ParameterList([nn.Parameter(first.clone()) for _ in range(self._count(layers))])

    def _count(self, layers: int) -> int:
        return layers

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """Return the threshold, the step and W of a layer."""
        return [*super().parameters_of(layer), self.weights[layer]]

    def weight_of(self, k: int, operator: Operator, state: State) -> Operator:
        """Return W of a layer as an operator."""
        del state
        return _with_tensor(operator, self.weights[k])


class LISTACPSS(LISTACP):
    """Coupled weights and support selection.

    Args:
        A: (m, n), or an operator; one for all samples.
        layers: Layers.
        penalty: Of the lasso that the first weights solve; thresholds begin at penalty / L'.
        scale: First weights are A times this; None for 1 / L'.
        shares: What part of the entries may pass each layer unshrunk; None for min(1.2 (k + 1), 13) per cent.
    """

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        layers: int = 16,
        penalty: float = 0.4,
        scale: float | None = None,
        shares: float | Sequence[float] | None = None,
    ) -> None:
        chosen = support_schedule(layers) if shares is None else shares
        super().__init__(A, layers=layers, penalty=penalty, scale=scale, shares=chosen)


class TiLISTA(LISTACPSS):
    """Coupled weights, one W for all layers, and support selection; arguments as those of `LISTACPSS`."""

    def _count(self, layers: int) -> int:
        del layers
        return 1

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """Return the threshold and the step of a layer."""
        return _Coupled.parameters_of(self, layer)

    def weight_of(self, k: int, operator: Operator, state: State) -> Operator:
        """Return W as an operator."""
        del k, state
        return _with_tensor(operator, self.weights[0])


class ALISTA(_Coupled):
    """Analytic weights: only steps and thresholds are trained.

    Args:
        A: (m, n), (batch, m, n) or an operator. For a matrix the weight is the closed form, differentiable in A.
        layers: Layers.
        weight: W in A's shape or as an operator whose adjoint is used; None for the closed form.
        thresholds: First thresholds; None for 0.3 * 0.75^k.
        steps: First steps.
        shares: What part of the entries may pass each layer unshrunk; None for min(1.2 (k + 1), 13) per cent.

    Raises:
        ValueError: if the weight has another shape, or a number is out of range.
    """

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        layers: int = 16,
        weight: Tensor | Operator | None = None,
        thresholds: float | Sequence[float] | None = None,
        steps: float | Sequence[float] = 1.0,
        shares: float | Sequence[float] | None = None,
    ) -> None:
        first = [0.3 * 0.75**k for k in range(layers)] if thresholds is None else thresholds
        chosen = support_schedule(layers) if shares is None else shares
        super().__init__(A, layers=layers, thresholds=first, steps=steps, shares=chosen)
        self.weight = _weight(self.operator, weight)

    def on(self, A: Tensor | Operator, *, weight: Tensor | Operator | None = None) -> Self:
        """Return the same network for other dictionaries, with their own weights; steps and thresholds are shared.

        One exact batched solve takes the place of the encoder that robust ALISTA learns for perturbed dictionaries.

        Args:
            A: As at construction: (batch, m, n) for one a sample.
            weight: As at construction.

        Returns:
            The network.
        """
        other = copy.copy(self)
        other.operator = as_operator(A)
        other.weight = _weight(other.operator, weight)
        return other

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, b, b - A x and, where matrices differ by sample, their weights."""
        state = super().start(operator, b, x0)
        return state if operator.batch is None else (*state, self.weight.dense())

    def weight_of(self, k: int, operator: Operator, state: State) -> Operator:
        """Return W as an operator."""
        del k
        return self.weight if operator.batch is None else Dense(state[3])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.weight = self.weight.mapped(fn)
        return self


def support_schedule(layers: int) -> list[float]:
    """Return the parts of entries that pass each layer: min(1.2 (k + 1), 13) per cent."""
    return [min(0.012 * (k + 1), 0.13) for k in range(layers)]


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of magnitudes."""
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def one_dictionary(A: Tensor | Operator, name: str) -> Operator:
    """Return the operator of A.

    Args:
        A: (m, n) or an operator.
        name: Of the network, for the message.

    Returns:
        The operator.

    Raises:
        ValueError: if every sample has a dictionary of its own.
    """
    operator = as_operator(A)
    if operator.batch is not None:
        raise ValueError(
            f"{name} trains matrices for one A (m, n), got one for each of {operator.batch} samples. ALISTA and "
            "HyperLISTA compute theirs from every A."
        )
    return operator


def _each(values: float | Sequence[float], layers: int, name: str) -> list[float]:
    if isinstance(values, (int, float)):
        return [float(values)] * layers
    if len(values) != layers:
        raise ValueError(f"{name} must be one number or one a layer ({layers}), got {len(values)}.")
    return [float(value) for value in values]


def _scale(operator: Operator) -> float:
    return 1 / (_MARGIN * float(operator.norm_squared()))


def _tensor_of(operator: Operator) -> Tensor:
    """Return what a weight of A's kind consists of: filters or a matrix."""
    return operator.filters if isinstance(operator, Convolutional) else operator.dense()


def _with_tensor(operator: Operator, tensor: Tensor) -> Operator:
    """Return an operator of A's kind with another tensor."""
    return operator.mapped(lambda _: tensor) if isinstance(operator, Convolutional) else Dense(tensor)


def _weight(operator: Operator, weight: Tensor | Operator | None) -> Operator:
    """Return the weight of ALISTA as an operator.

    Args:
        operator: A.
        weight: What was given.

    Returns:
        W.

    Raises:
        ValueError: if its shape is not A's.
    """
    if weight is None and isinstance(operator, Convolutional):
        return _with_tensor(operator, convolutional_weight(operator.filters))
    if weight is None:
        return Dense(analytic_weight(operator))
    given = as_operator(weight)
    if given.shape != operator.shape or given.batch != operator.batch:
        raise ValueError(
            f"The weight must have A's shape {operator.shape} with batch={operator.batch}, got {given.shape} with "
            f"batch={given.batch}."
        )
    return given
