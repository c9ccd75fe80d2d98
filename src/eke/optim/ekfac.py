"""EKFAC: natural gradient in the eigenbasis of Kronecker factors, with second moments measured in that basis.

For each layer, A = E[a a^T] and S = E[g g^T] over inputs a (a 1 appended for the bias) and gradients g at the output,
U_A and U_S their eigenvectors, G_n the gradient of example n:

    m2 = E_n[(U_S^T G_n U_A)^2],     W <- W - lr U_S ((U_S^T G U_A) / (m2 + damping)) U_A^T.

"kfac" takes the product of the eigenvalues for m2; "ekfac_ra" a running mean of N (U_S^T G U_A)^2, which needs no
gradients of single examples. Among all diagonals in this basis E_n[...] is nearest to the Fisher matrix (Frobenius).
Running means start as plain means; momentum and m2 turn with the basis. With `kl_clip` the step does not depend on the
scale of the loss: damping counts in units of the mean of a layer's m2, the step in units of s, s^2 the mean of all m2,
and the step of a layer is shortened where the change it predicts, lr^2 sum(D^2 (m2 + damping)) a parameter, exceeds the
clip. With `rank` only so many leading directions a side are told apart; all others share their mean moment.

Cost of a layer (m, n) at batch N in multiply-adds: N (m^2 + n^2) to turn the rows, N m n twice for m2 and the turned
gradient (a gradient that is no sum of seen rows, as after clipping by value, costs m n (m + n) more), m n (m + n) to
turn back; eigenvectors every `basis_every` steps.

Source: George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis", 2018; Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
curvature", 2015 (clip). Units of s and the carried moments are eke's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import sites
from ..curvature import Basis, Calls, Capture, Fisher, Likelihood, Lookups, Rows, Seen, Sharing, pulls, sharing_of
from .basis import Refresh, turn
from .layers import Layer, attentions, find_layers
from .statistics import (
    Move,
    Rules,
    State,
    Variant,
    is_cut,
    mean_moments,
    moments_of_gradient,
    product_moments,
    thinned,
    update_factors,
    update_moments,
)

_SAME = 1e-4
"""Relative difference up to which a gradient counts as the sum of the rows seen."""


class EKFAC(torch.optim.Optimizer):
    """Optimizer for linear layers and convolutions, with AdamW for every other parameter.

    Args:
        model: The model, watched during its own passes in training mode: gradients at the outputs of its layers are
            seen in `loss.backward()`. Wrappers of DDP are looked through.
        params: Parameters or parameter groups, as for any optimizer; None for all that need a gradient. Each group is
            split in two: layers with Kronecker factors, and others.
        lr: Learning rate of the layers.
        damping: Added to m2; in units of s^2 with `kl_clip`, in units of the loss's curvature without.
        momentum: Of a running mean of gradients, corrected for its start.
        weight_decay: Decoupled: weights shrink by lr * weight_decay each step.
        kl_clip: See above; None for raw units and no clip.
        variant: See above.
        fisher: Whose gradients make the moments: of the labels ("empirical"), of labels drawn from the model ("mc"), or
            of all columns of a root of the loss's Hessian ("exact"). For the last two call `observe` before `backward`.
        basis_every: Steps between refreshes of the bases.
        statistics_decay: Of the running means of A, S and m2; 0 for the current batch alone.
        sharing: What many locations of a linear layer (tokens) mean: "sum" for one loss an example, "expand" for one
            loss a token, "reduce" for a cheap form of the first. "auto" tells by the first step's gradients at the
            layer nearest to the loss: those of several tokens differ only where each has a loss of its own.
        reduction: Whether the loss is a mean over examples or their sum.
        refresh: How bases are refreshed.
        tolerance: Bases that diagonalise to this share of the factor's norm are kept.
        others_lr: Learning rate of AdamW.
        betas: Of AdamW.
        largest: Sides longer than this keep the identity as their basis.
        rank: Directions of a side that are told apart; None for all. "auto" tells 64 apart where a side is longer than
            128, and all where `statistics_decay` is 0: the textbook's step.
        convolutions: Whether the taps of a kernel have a basis together with the channels ("kfc") or not ("sua").
        loss_scale: What the loss is multiplied by before `backward`: a number or a function that returns it, such as
            `GradScaler.get_scale`.

    Raises:
        ValueError: if a number is out of range or the model has no parameter that needs a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        damping: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-5,
        variant: Variant = "ekfac",
        fisher: Fisher = "empirical",
        basis_every: int = 50,
        statistics_decay: float = 0.95,
        sharing: Sharing | Literal["auto"] = "auto",
        reduction: Literal["mean", "sum"] = "mean",
        refresh: Refresh = "eigh",
        tolerance: float = 0.0,
        others_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        largest: int = 4096,
        rank: int | Literal["auto"] | None = "auto",
        convolutions: Literal["kfc", "sua"] = "kfc",
        loss_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        inner = sites.unwrap(model)
        self._layers = {id(layer.weight): layer for layer in find_layers(inner)}
        self._rules = Rules(
            variant, basis_every, statistics_decay, refresh, tolerance, largest, rank, convolutions == "sua"
        )
        self.fisher, self.mean, self.loss_scale = fisher, reduction == "mean", loss_scale
        self.sharing: Sharing = "sum" if sharing == "auto" else sharing
        self._tells = sharing == "auto"
        self._probes: dict[int, Tensor] = {}
        self._warned = False
        defaults: dict[str, Any] = {
            "lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay, "kl_clip": kl_clip,
            "betas": betas, "kronecker": False,
        }  # fmt: skip
        _check_ranges(defaults, self._rules)
        given = [p for p in inner.parameters() if p.requires_grad] if params is None else list(params)
        super().__init__(self._split(given, others_lr), defaults)
        layers = list(self._layers.values())
        owners = [owner for layer in layers for owner in layer.owners if isinstance(owner, nn.Module)]
        self._capture = Capture(inner, owners, attentions(inner, layers))
        self._capture.listening = fisher == "empirical"
        if not self._layers:
            warnings.warn("EKFAC found no layer it can watch: AdamW does all.", stacklevel=2)

    def _split(self, given: list[Any], others_lr: float) -> list[dict[str, Any]]:
        """Return each parameter group as two: weights with Kronecker factors, and others."""
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups = [{**group, "params": _listed(group["params"])} for group in groups]
        found: list[dict[str, Any]] = []
        chosen = {id(p) for group in groups for p in group["params"]}
        self._layers = {key: layer for key, layer in self._layers.items() if key in chosen}
        for layer in self._layers.values():
            if id(layer.bias) not in chosen:
                layer.bias = None  # it stays as it is, so its column is no part of the matrix
        biases = {id(layer.bias) for layer in self._layers.values()}
        for group in groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            params = group["params"]
            main = [p for p in params if id(p) in self._layers or id(p) in biases]
            others = [p for p in params if id(p) not in self._layers and id(p) not in biases]
            if main:
                found.append({**rest, "params": main, "kronecker": True})
            if others:
                found.append({"lr": others_lr, **rest, "params": others, "kronecker": False})
        return found

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *, weights: Tensor | None = None
    ) -> Tensor | None:
        """Change the parameters by one step.

        Args:
            closure: Clears gradients, computes the loss, calls `backward` and returns the loss.
            weights: Weights (examples,) of the examples in the loss, where it is a weighted mean (importance sampling).

        Returns:
            The closure's loss, None without one.

        Raises:
            RuntimeError: if a layer has a gradient but was never seen in a pass in training mode.
        """  # noqa: DOC502
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._tells and self._capture.nearest is not None:
            self.sharing, self._tells = sharing_of(self._capture.nearest), False
        for group in self.param_groups:
            if group["kronecker"]:
                self._step_layers(group, weights)
            else:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _adamw(parameter, self.state[parameter], group)
        self._capture.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and what was seen since the last step (a step may have been skipped)."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def observe(
        self, outputs: Tensor, *, likelihood: Likelihood = "categorical", generator: torch.Generator | None = None
    ) -> None:
        """See the gradients of the model's own distribution, for `fisher` "mc" and "exact".

        Call it between the forward pass and `loss.backward()`. No `.grad` is changed.

        Args:
            outputs: What the model returned, still connected to it: logits (examples, ..., classes) of a categorical,
                logits of independent Bernoullis, or means of Gaussians of variance 1 (loss 1/2 sum (y - mean)^2).
            likelihood: Which of these.
            generator: Source of drawn labels; None for torch's own.

        Raises:
            ValueError: if `fisher` is "empirical", or outputs have no graph.
        """
        if self.fisher == "empirical":
            raise ValueError('observe is for fisher="mc" and fisher="exact"; this optimizer has fisher="empirical".')
        if not outputs.requires_grad:
            raise ValueError(
                f"observe needs outputs {tuple(outputs.shape)} that are still connected to the model: not detached, "
                "not from no_grad."
            )
        weights = [layer.weight for layer in self._layers.values()]
        with torch.no_grad():
            columns = pulls(outputs, likelihood, exact=self.fisher == "exact", generator=generator)
        # Columns count as examples, but their second moments are to add up, not to be averaged.
        rows = outputs[..., 0].numel() if likelihood == "categorical" else outputs.shape[0]
        scale = self._scale() * (1 / (rows * len(columns) ** 0.5) if self.mean else len(columns) ** 0.5)
        self._capture.listening = True
        try:
            for column in columns:
                self._capture.turn += 1
                torch.autograd.grad(outputs, weights, column * scale, retain_graph=True, allow_unused=True)
        finally:
            self._capture.listening = False

    def basis(self, name: str) -> Basis:
        """Return the curvature of a layer as it is now: a linear operator with `mv`, `solve`, `trace` and `logdet`.

        Args:
            name: Of the layer: its module, or the parameter inside an attention.

        Returns:
            Directions and second moments, in raw units of the loss, without damping. Rows of a table and entries of a
            normalization are directions of their own.

        Raises:
            KeyError: if there is no such layer, or it was never seen.
        """
        known = {layer.name: layer for layer in self._layers.values()}
        if name not in known or "moments" not in self.state[known[name].weight]:
            seen = sorted(key for key, layer in known.items() if "moments" in self.state[layer.weight])
            raise KeyError(f"EKFAC has no statistics of a layer {name!r}; it has those of {seen}.")
        state = self.state[known[name].weight]
        vectors = []
        for dim, key in ((1, "g"), (2, "a")):
            found = state.get(f"{key}_basis")
            size = state["moments"].shape[dim]
            eye = torch.eye(size, device=state["moments"].device).expand(state["moments"].shape[0], size, size)
            vectors.append(eye if found is None else found)
        return Basis(vectors[0].double(), vectors[1].double(), state["moments"].double())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; statistics keep their type whatever that of the parameters."""
        super().load_state_dict(state_dict)
        held = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    self.state[held[index]][key] = value.detach().to(held[index].device, copy=True)

    def _scale(self) -> float:
        return float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    def _step_layers(self, group: dict[str, Any], weights: Tensor | None) -> None:
        found = [self._layers.get(id(parameter)) for parameter in group["params"]]
        watched = [self._watch(x, group, weights) for x in found if x is not None and x.weight.grad is not None]
        moves = [move for move in watched if move is not None]
        if not moves:
            return
        lr, damping, clip = group["lr"], group["damping"], group["kl_clip"]
        unit, scales = 1.0, [1.0] * len(moves)
        if clip is not None:
            totals = [max(move.total(), 1e-30) for move in moves]
            unit = (sum(totals) / sum(move.entries for move in moves)) ** 0.5
            scales = [total / move.entries for move, total in zip(moves, totals)]
        for move, scale in zip(moves, scales):
            change = move.damp(damping * scale, predict=clip is not None)
            share = 1.0
            if clip is not None:
                share = min(1.0, (clip * move.entries / max(lr**2 * change, 1e-30)) ** 0.5)
            move.apply(lr * share * unit, decay=lr * group["weight_decay"])

    def _watch(self, layer: Layer, group: dict[str, Any], weights: Tensor | None) -> Move | None:
        """Bring a layer's statistics up to date and give its gradient with momentum; None where there are no good
        statistics yet. A layer that was never seen raises RuntimeError.
        """  # noqa: D205, DOC201, DOC501
        state, rules = self.state[layer.weight], self._rules
        calls = [call for owner in layer.owners for call in self._capture.take(owner)]
        if not calls and "moments" not in state:
            raise RuntimeError(
                f"EKFAC has seen no pass of {layer.name!r} in training mode"
                + ("" if self.fisher == "empirical" else " with observe(outputs) before backward")
                + ", and has no statistics of it: call model.train() before the forward pass, and use the model that "
                "was given to the optimizer, not a copy."
            )
        rows, fine = None, True
        now = "moments" not in state or rules.reads(int(state.get("steps", 0)))
        reads = now and (any(layer.bases) or rules.variant == "kfac")
        known = weights is None and self.fisher == "empirical"
        # Rows are cut out (which convolutions feel) for statistics, to count examples, and where they save work.
        shapes = [list(x.shape) for _, x, _ in calls]
        plain = self.mean and rules.variant != "ekfac_ra"
        counted = plain or (self.sharing != "expand" and state.get("shapes") == shapes)
        wanted = reads or (now and rules.variant == "ekfac") or not counted
        if calls and (wanted or (known and not is_cut(state) and _saves(layer, calls))):
            seen = Seen(self.sharing, self.mean, self._scale(), weights)
            if plain and known and rules.every > 1:
                rows = layer.rows(*thinned(layer, calls, seen, turn=int(state.get("seen", 0))))
            else:
                rows = layer.rows(calls, seen)
                state["shapes"], state["examples"] = shapes, rows.examples
        if rows is not None and reads:
            fine = update_factors(layer, state, rows, rules)
        state["steps"] = int(state.get("steps", 0)) + 1
        gradient: Tensor | None = None
        batch: Tensor | None = None
        if not (plain and is_cut(state)):
            gradient = layer.gradient()
            if not self.mean and calls:
                gradient = gradient / state["examples"]
            gradient, batch = self._measured(state, rows, gradient, known=known, now=now)
        elif now and rows is not None:
            batch = product_moments(state) if rules.variant == "kfac" else self._along(state, rows)
        if calls and batch is not None:
            decay = 0.0 if rules.variant == "kfac" else rules.decay
            fine = update_moments(state, batch, decay) and fine
        if not fine:
            self._warn(layer)
        if "moments" not in state:
            return None
        return _with_momentum(layer, state, gradient, group["momentum"])

    def _along(self, state: State, rows: Rows | Lookups) -> Tensor:
        """Return the second moments of examples' gradients where a side is cut."""
        return mean_moments(state, rows.energies(state.get("g_basis"), state.get("a_basis")))

    def _measured(
        self, state: State, rows: Rows | Lookups | None, gradient: Tensor, *, known: bool, now: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient (turned where no side is cut) and the batch's second moments, None if it is not time."""
        variant, g, a = self._rules.variant, state.get("g_basis"), state.get("a_basis")
        squares = variant == "ekfac" and now
        batch: Tensor | None = None
        if not is_cut(state):
            turned = None
            if rows is not None and squares and isinstance(rows, Rows) and rows.summed_first:
                batch = rows.energies(g, a)
            elif rows is not None and (squares or (known and _cheaper(rows, gradient))):
                turned = rows.turned(g, a)
                batch = turned.squares() if squares else None
            if turned is not None and rows is not None and known and self._explains(rows, gradient):
                gradient = turned.gradient()
            else:
                gradient = turn(gradient, _t(g), _t(a))
            if variant == "ekfac_ra":
                batch = gradient.square() * state.get("examples", 1)
        elif squares and rows is not None:
            batch = self._along(state, rows)
        elif variant == "ekfac_ra":
            batch = moments_of_gradient(state, gradient).mul_(state.get("examples", 1))
        if variant == "kfac" and now and rows is not None and "a_factor" in state and "g_factor" in state:
            batch = product_moments(state)
        return gradient, batch

    def _explains(self, rows: Rows | Lookups, gradient: Tensor) -> bool:
        """Return whether the gradient is the mean of the rows' outer products, told by one random direction."""
        if isinstance(rows, Lookups):
            return False
        width = gradient.shape[2]
        probe = self._probes.get(width)
        if probe is None or probe.dtype != gradient.dtype or probe.device != gradient.device:
            generator = torch.Generator(device=gradient.device).manual_seed(0)
            probe = torch.randn(width, 1, generator=generator, dtype=gradient.dtype, device=gradient.device)
            self._probes[width] = probe
        a, g = rows.a.flatten(1, 2), rows.g.flatten(1, 2)
        seen = a @ probe[:-1] + probe[-1] if rows.ones else a @ probe
        expected = (g.mT @ seen).div_(rows.examples)
        norms = torch.stack([(gradient @ probe).sub_(expected).norm(), expected.norm()]).tolist()
        return bool(norms[0] <= _SAME * norms[1])

    def _warn(self, layer: Layer | None) -> None:
        if not self._warned:
            self._warned = True
            where = "" if layer is None else f" of {layer.name!r}"
            warnings.warn(
                f"Statistics{where} are not finite in this step: the last good ones stay in use (said once).",
                stacklevel=4,
            )


def _cheaper(rows: Rows | Lookups, gradient: Tensor) -> bool:
    """Return whether turning rows is less work than turning their mean gradient."""
    if isinstance(rows, Lookups):
        return False
    (m, n), seen = gradient.shape[1:], rows.a.shape[1] * rows.a.shape[2]
    return seen * (m * m + n * n + m * n) < m * n * (m + n)


_WORTH = 1 << 21
"""Multiply-adds that are worth the calls it takes to leave them out."""


def _saves(layer: Layer, calls: Calls) -> bool:
    """Return whether turning the rows of calls is so much less work than turning their sum that it pays."""
    if not all(layer.bases):
        return False
    m = layer.weight.shape[0]
    n, seen = layer.weight.numel() // m, sum(gradient.numel() // m for _, _, gradient in calls)
    return m * n * (m + n) - seen * (m * m + n * n + m * n) > _WORTH


def _with_momentum(layer: Layer, state: State, gradient: Tensor | None, momentum: float) -> Move:
    """Return the running mean of gradients, and what it is to be divided by for its start.

    Args:
        layer: The layer.
        state: Its state.
        gradient: None for the layer's own, in weights' space.
        momentum: Share of the mean that stays.
    """
    if not momentum:
        return Move(layer, state, layer.gradient() if gradient is None else gradient, 1.0)
    weight = float(state.get("momentum_weight", 0.0)) * momentum + (1 - momentum)
    state["momentum_weight"] = weight
    old = state.get("momentum")
    if old is None:
        state["momentum"] = (layer.gradient() if gradient is None else gradient) * (1 - momentum)
    elif gradient is None:
        layer.mix_(old, 1 - momentum)
    else:
        old.lerp_(gradient, 1 - momentum)
    return Move(layer, state, state["momentum"], weight)


def _adamw(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of AdamW. Source: Loshchilov, Hutter, "Decoupled weight decay regularization", 2019."""
    if not state:
        state["steps"] = 0
        state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["steps"] += 1
    (one, two), steps = group["betas"], state["steps"]
    gradient = parameter.grad
    assert gradient is not None
    state["first"].lerp_(gradient, 1 - one)
    state["second"].lerp_(gradient.square(), 1 - two)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    root = (state["second"] / (1 - two**steps)).sqrt_().add_(1e-8)
    parameter.addcdiv_(state["first"], root, value=-group["lr"] / (1 - one**steps))


def _t(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT


def _listed(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def _check_ranges(group: dict[str, Any], rules: Rules) -> None:
    for name in ("lr", "damping", "kl_clip"):
        value = group[name]
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    for name, value in (("momentum", group["momentum"]), ("statistics_decay", rules.decay)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")
    if rules.rank is not None and rules.rank != "auto" and rules.rank < 1:
        raise ValueError(f'rank must be at least 1, None for all directions, or "auto", got {rules.rank}.')
    if group["weight_decay"] < 0 or rules.basis_every < 1:
        raise ValueError(
            f"weight_decay must be >= 0 and basis_every >= 1, got weight_decay={group['weight_decay']}, "
            f"basis_every={rules.basis_every}."
        )
