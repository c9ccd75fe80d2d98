"""Put structured layers in place of a model's linear layers.

Every `nn.Linear` becomes a `KSLinear`: its weight projected (`linalg.factorize`, on request in the metric of its
inputs) or drawn anew for training from scratch. The model that was given stays as it is; what each layer lost stands
beside the new one. Cost: that of the projections, about O(m n min(b, c)) a layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .._errors import suggest
from ..linalg import Metric
from ..patterns import Chain
from .ks_linear import ChainName, KSLinear, projected

ChainRule = Callable[[str, nn.Linear], Chain | ChainName | None]
"""`rule(name, linear)`: the chain of a layer, or None to leave it as it is."""


@dataclass(frozen=True)
class SwappedLayer:
    """What happened to one layer.

    Args:
        name: Of the module.
        chain: Its factors.
        before: Entries of the dense weight.
        after: Entries of the factors.
        error: Relative Frobenius error of the new weight; None where it was drawn anew.
        lower_bound: Relative error that no product of this chain can beat; None likewise.
        weighted_error: Relative error in the metric that was given; None without one.
    """

    name: str
    chain: Chain
    before: int
    after: int
    error: float | None
    lower_bound: float | None
    weighted_error: float | None


@dataclass(frozen=True)
class Replaced:
    """A model with structured layers, and what became of each.

    Args:
        model: The new model.
        layers: The layers that were replaced, in the order of `named_modules`.
    """

    model: nn.Module
    layers: tuple[SwappedLayer, ...]

    @property
    def share(self) -> float:
        """Entries of the new weights for one of the dense weights they replace; 1.0 if nothing was replaced."""
        return sum(layer.after for layer in self.layers) / max(1, sum(layer.before for layer in self.layers))


def replace_linears(
    model: nn.Module,
    chain: Chain | ChainName | ChainRule,
    *,
    rank: int | None = None,
    blocks: int | None = None,
    match: str | None = None,
    skip: Iterable[str] = (),
    project: bool = True,
    metrics: Mapping[str, Metric] | None = None,
    refine: int = 0,
) -> Replaced:
    """Return a copy of a model whose linear layers are products of Kronecker-sparse factors.

    Args:
        model: Any module; not changed. Only modules of the type `nn.Linear` itself are replaced: attentions that use
            their weights in a fused kernel, quantized and parametrized layers stay.
        chain: For every layer, or a rule that chooses by name and layer.
        rank: For named chains.
        blocks: For "monarch".
        match: Regular expression that a layer's name must contain; None for all.
        skip: Names of modules to leave as they are, with all that is inside them.
        project: Whether the new weights are near the old ones; else they are drawn anew, to be trained from scratch.
        metrics: How to measure the change of a layer, by name: `linalg.Metric` of its inputs' second moment.
        refine: Sweeps that lower the error after each projection.

    Returns:
        The new model, trained or not as the given one is, with a report a layer.

    Raises:
        ValueError: if a name is not in the model, no layer is left to replace, a layer's weight is shared with another
            module or watched by hooks, or a chain does not fit a layer.
    """
    wanted = list(_chosen(model, match, tuple(skip)))
    _check_metrics(metrics, dict(wanted))
    found: list[tuple[str, nn.Linear, Chain | ChainName]] = []
    for name, linear in wanted:
        rule = chain if isinstance(chain, (str, Chain)) else chain(name, linear)
        if rule is not None:
            found.append((name, linear, rule))
    if not found:
        raise ValueError(
            f"No layer of {type(model).__name__} is left to replace with match={match!r}, skip={list(skip)}: it has "
            f"{sum(type(module) is nn.Linear for module in model.modules())} nn.Linear."
        )
    _check_alone(model, found)
    # The replaced layers are not copied only to be thrown away.
    new: dict[int, KSLinear] = {}
    reports, ruled = [], not isinstance(chain, (str, Chain))
    for name, linear, rule in found:
        try:
            # What a rule chose may be of several kinds; a number for a single chain that takes none is refused.
            new[id(linear)], report = _swapped(
                name, linear, rule, rank=None if ruled and not isinstance(rule, str) else rank,
                blocks=None if ruled and rule != "monarch" else blocks, project=project,
                metric=(metrics or {}).get(name), refine=refine,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"At {name!r} ({linear.out_features} x {linear.in_features}): {error}") from error
        reports.append(report)
    return Replaced(without_fast_path(copy.deepcopy(model, {**new}), KSLinear), tuple(reports))


def _swapped(
    name: str,
    linear: nn.Linear,
    chain: Chain | ChainName,
    *,
    project: bool,
    rank: int | None = None,
    blocks: int | None = None,
    metric: Metric | None = None,
    refine: int = 0,
) -> tuple[KSLinear, SwappedLayer]:
    """Return one layer's successor and report.

    Args:
        name: Of the layer.
        linear: The layer.
        chain: Its factors, or their kind.
        project: Whether to keep the weight's values.
        rank: For a named chain.
        blocks: For "monarch".
        metric: To measure changes in.
        refine: Sweeps.

    Returns:
        The new layer and what it lost.
    """
    if not project:
        layer = KSLinear(
            linear.in_features, linear.out_features, chain=chain, rank=rank, blocks=blocks,
            bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype,
        ).train(linear.training).requires_grad_(linear.weight.requires_grad)  # fmt: skip
        return layer, SwappedLayer(
            name, layer.chain, linear.weight.numel(), layer.chain.parameters, None, None, None
        )  # fmt: skip
    layer, found = projected(
        KSLinear, linear, chain=chain, rank=rank, blocks=blocks, metric=metric, refine=refine
    )  # fmt: skip
    return layer, SwappedLayer(
        name, layer.chain, linear.weight.numel(), layer.chain.parameters, found.error, found.lower_bound,
        found.weighted_error,
    )  # fmt: skip


def _chosen(model: nn.Module, match: str | None, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that may be replaced.

    Raises:
        ValueError: if a name to skip is no module.
    """
    names = [name for name, _ in model.named_modules()]
    for name in skip:
        if name not in names:
            kind = type(model).__name__
            raise ValueError(f"skip names {name!r}, which is no module of {kind}.{suggest(name, names)}")
    for name, module in model.named_modules():
        inside = any(name == other or name.startswith(f"{other}.") for other in skip)
        if type(module) is nn.Linear and not inside and (match is None or re.search(match, name)):
            yield name, module


def _check_metrics(metrics: Mapping[str, Metric] | None, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse metrics of layers that stay.

    Raises:
        ValueError: if there is one.
    """
    for name in metrics or {}:
        if name not in layers:
            raise ValueError(f"metrics names {name!r}, which is not replaced.{suggest(name, layers)}")


def _check_alone(model: nn.Module, found: Iterable[tuple[str, nn.Linear, Chain | ChainName]]) -> None:
    """Refuse layers whose successor could not do all that they do.

    Raises:
        ValueError: if a weight belongs to two modules, or hooks watch the layer.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, linear, _ in found:
        if len(shared := owners[id(linear.weight)]) > 1:
            raise ValueError(
                f"The weight of {name!r} is shared by {', '.join(map(repr, shared))}: it would no longer be. "
                f"Leave it out with skip=[{name!r}]."
            )
        if hooks := len(linear._forward_hooks) + len(linear._forward_pre_hooks):
            raise ValueError(
                f"{name!r} has {hooks} forward hooks, which would be lost: remove them first, or leave the layer out "
                "with skip=."
            )


def without_fast_path(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return the model, torch's transformer layers kept from a fused kernel that reads weights of replaced layers.

    Args:
        model: Changed in place.
        kind: Of the layers that replaced others.
    """
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            isinstance(inside, kind) for inside in module.modules()
        ):
            module.activation_relu_or_gelu = 0
            module.use_nested_tensor = False
    return model
