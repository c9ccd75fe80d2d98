"""Which channels depend on which: Torch-Pruning's dependency graph, converted into eke's own index maps.

Torch-Pruning traces one forward pass by autograd and links layers through the operations between them. Its graph is
followed here channel by channel until nothing new is reached; channels that reach a common index form one unit. What
comes out are candidates only: the graph treats operations that it does not know as elementwise and can be
silently wrong, so `proof` decides about each.

Source: G. Fang, X. Ma, M. Song, M. Bi Mi, X. Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023.
Cost: one forward pass with gradients, then about channels x modules steps in Python.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import Axes, ChannelGroup, Member, NotCuttableError, Side, axes_of, is_conv1d, is_depthwise
from .site import storage_key

Key = tuple[str, Side]
Pair = tuple[int, int]

_FOLLOWED = (
    nn.Linear,
    nn.Embedding,
    nn.PReLU,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
)
_UPDATES = {
    "_ConcatOp": "update_concat_index_mapping",
    "_SplitOp": "update_split_index_mapping",
    "_ReshapeOp": "update_reshape_index_mapping",
    "_UnbindOp": "update_unbind_index_mapping",
    "_ExpandOp": "update_expand_index_mapping",
    "_SliceOp": "update_slice_index_mapping",
}
_MAX_STEPS_PER_CHANNEL = 2000
_OPEN = "its channel dependencies do not close"


@dataclass(frozen=True)
class Candidate:
    """Groups that one layer's output channels fall into, not yet proved.

    Args:
        root: Name of the layer.
        groups: One group, or several where different parts of the channels go different ways.
        paired: The same parts bound together unit by unit (a gated unit splits its channels in two halves), to be
            tried when the parts cannot be cut alone.
        reason: Why there are none.
        modules: Names of the modules touched.
        silent: Whether the reason is no news to the user (the channels are the model's output, or were ignored).
    """

    root: str
    groups: tuple[ChannelGroup, ...] = ()
    paired: ChannelGroup | None = None
    reason: str = ""
    modules: tuple[str, ...] = ()
    silent: bool = False


def candidates(
    model: nn.Module,
    call: Callable[[nn.Module], object],
    *,
    ignore: Iterable[str] = (),
    taken: Collection[str] = (),
) -> list[Candidate]:
    """Propose channel groups for every layer with output channels.

    Args:
        model: Model whose parameters all require gradients; its structure is only read, its flags may change.
        call: Runs a model on the example inputs.
        ignore: Module names; groups that touch them, or what is inside them, are left out.
        taken: Layers whose output channels are in groups already.

    Returns:
        One candidate per distinct set of coupled channels, in module order of the first layer.
    """
    graph = _Graph.trace(model, call)
    tied = _tied_tensors(model)
    ignored = tuple(ignore)
    covered: dict[str, set[int]] = defaultdict(set)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not is_conv1d(module):
            continue
        if module not in graph.nodes or name in taken:
            continue
        channels = [i for i in range(_width(module)) if i not in covered[name]]
        if not channels:
            continue
        reached = graph.follow(module, channels)
        for (member, side), pairs in reached.pairs.items():
            if side != "in":
                # Where one walk does not end, one from any layer that it met would not either.
                all_of_it = _OPEN in reached.reasons.values() and pairs
                covered[member].update(range(1 << 16) if all_of_it else (index for index, _ in pairs))
        found.append(_convert(model, name, reached, tied, ignored))
    return found


def _map_what_can_be_mapped(graph: Any) -> None:
    """Give each operation its index map alone, where mapping all at once failed in one of them.

    An operation without a map passes indices on as they are; where that is wrong the proof finds out.
    """
    from torch_pruning.dependency import index_mapping

    for node in list(graph.module2node.values()):
        if update := getattr(index_mapping, _UPDATES.get(type(node.module).__name__, ""), None):
            with contextlib.suppress(Exception):
                update(graph, node)


@dataclass(frozen=True)
class _Reached:
    pairs: dict[Key, list[Pair]]
    reasons: dict[str, str]
    output: bool


class _Union:
    """Channels that are known to be one unit."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def top(self, i: int) -> int:
        parent = self.parent
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def unite(self, i: int, j: int) -> None:
        self.parent[self.top(i)] = self.top(j)

    def arrive(self, pairs: Iterable[Pair], known: dict[int, int]) -> list[Pair]:
        """Return the pairs whose index is new; note them, and unite the others with what was there before."""
        fresh = []
        for index, origin in pairs:
            if index not in known:
                known[index] = origin
                fresh.append((index, origin))
            elif known[index] != origin:
                self.unite(origin, known[index])
        return fresh


class _Graph:
    """Torch-Pruning's graph and the walk over it."""

    def __init__(self, graph: Any, model: nn.Module) -> None:
        self.graph = graph
        self.nodes: Mapping[object, Any] = graph.module2node
        self.names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}

    @classmethod
    def trace(cls, model: nn.Module, call: Callable[[nn.Module], object]) -> _Graph:
        from torch_pruning.dependency import DependencyGraph

        graph = DependencyGraph()
        stub = _opaque_pruner()
        for module in model.modules():
            if _is_opaque(module):
                graph.register_customized_layer(type(module), stub)
            elif is_conv1d(module):
                graph.register_customized_layer(type(module), _conv1d_pruner())

        def outputs(result: object) -> list[Tensor]:
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            # One more operation, so that every output has a node of its own even if a layer makes it.
            return [tensor * 1 for tensor in tensors if tensor.requires_grad and tensor.grad_fn is not None]

        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                graph.build_dependency(
                    model, (), forward_fn=lambda net, _: call(net), output_transform=outputs, verbose=False
                )
            except Exception:
                if not hasattr(graph, "module2node"):
                    raise
                _map_what_can_be_mapped(graph)
        return cls(graph, model)

    def follow(self, root: nn.Module, channels: Sequence[int]) -> _Reached:
        """Return everything that depends on output channels of a layer.

        Where a channel arrives at an index that another has reached before, the two are one from there on, so that
        every index of every node is left once.
        """
        from torch_pruning._helpers import _HybridIndex

        start = self.graph.get_pruner_of_module(root).prune_out_channels
        seen: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
        same = _Union()
        reached: dict[Key, list[Pair]] = defaultdict(list)
        reasons: dict[str, str] = {}
        output, steps = False, 0
        todo = [(self.nodes[root], start, [(i, i) for i in channels])]
        while todo:
            node, function, pairs = todo.pop()
            fresh = same.arrive(pairs, seen[id(node), _function_name(function)])
            if not fresh:
                continue
            steps += len(fresh)
            if steps > _MAX_STEPS_PER_CHANNEL * max(64, len(channels)):
                reasons[self.names[id(root)]] = _OPEN
                break
            output |= self._visit(node, function, fresh, reached, reasons)
            todo += self._whole_groups(node, function, fresh)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(function):
                    indices = [_HybridIndex(idx=index, root_idx=origin) for index, origin in fresh]
                    try:
                        for mapping in dependency.index_mapping:
                            indices = indices if mapping is None else mapping(indices)
                    except IndexError:
                        where = self.names.get(id(dependency.target.module), "an operation")
                        reasons[self.names[id(root)]] = f"its channels could not be followed into {where}"
                        todo.clear()
                        break
                    todo.append((dependency.target, dependency.handler, [(i.idx, i.root_idx) for i in indices]))
        united = {key: [(index, same.top(origin)) for index, origin in pairs] for key, pairs in reached.items()}
        return _Reached(united, reasons, output)

    def _whole_groups(self, node: Any, function: Any, pairs: Sequence[Pair]) -> list[tuple[Any, Any, list[Pair]]]:
        """Return what goes with channels of a convolution in groups: all inputs and outputs of their groups."""
        module = node.module
        if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1 or is_depthwise(module):
            return []
        into, out = module.in_channels // module.groups, module.out_channels // module.groups
        here = out if self.graph.is_out_channel_pruning_fn(function) else into
        groups = dict.fromkeys((index // here, origin) for index, origin in pairs)
        pruner = self.graph.get_pruner_of_module(module)
        return [
            (node, handler, [(group * size + i, origin) for group, origin in groups for i in range(size)])
            for handler, size in ((pruner.prune_in_channels, into), (pruner.prune_out_channels, out))
        ]

    def _visit(
        self, node: Any, function: Any, pairs: list[Pair], reached: dict[Key, list[Pair]], reasons: dict[str, str]
    ) -> bool:
        """Return whether a step reached the model's output; note what else it reached."""
        module = node.module
        if isinstance(module, nn.Parameter):
            reasons[self.parameters.get(id(module), "a parameter")] = "parameter outside a known layer"
        elif id(module) in self.names:
            name = self.names[id(module)]
            side: Side = "out" if self.graph.is_out_channel_pruning_fn(function) else "in"
            try:
                axes = axes_of(module, side)
            except NotCuttableError as error:
                reasons[name] = str(error)
            else:
                if axes.tensors:
                    reached[name, axes.side].extend(pairs)
        return type(module).__name__ == "_OutputOp"


def _convert(
    model: nn.Module,
    root: str,
    reached: _Reached,
    tied: Mapping[tuple[str, str], list[str]],
    ignored: Sequence[str],
) -> Candidate:
    touched = tuple(dict.fromkeys([*(name for name, _ in reached.pairs), *reached.reasons]))
    if reached.output or any(name == other or name.startswith(f"{other}.") for name in touched for other in ignored):
        return Candidate(root, modules=touched, silent=True)
    if reached.reasons:
        name, why = next(iter(reached.reasons.items()))
        return Candidate(root, modules=touched, reason=f"{name}: {why}")
    axes = {key: axes_of(model.get_submodule(key[0]), key[1]) for key in reached.pairs}
    for (name, _), axis in axes.items():
        for attribute, _ in axis.tensors:
            if others := tied.get((name, attribute)):
                return Candidate(root, modules=touched, reason=f"{name}.{attribute} is tied with {', '.join(others)}")
    if not any(axis.matrix and side == "in" for (_, side), axis in axes.items()):
        return Candidate(root, modules=touched, reason="no layer reads these channels")
    parts = _parts(_units(reached.pairs, axes))
    if any(len(part) < 2 for part in parts) and len(parts) > 8:
        return Candidate(root, modules=touched, reason="its channels go too many different ways")
    groups = tuple(
        _group(model, root if len(parts) == 1 else f"{root}#{i}", part, axes) for i, part in enumerate(parts, 1)
    )
    paired = None
    if len(parts) > 1 and len({len(part) for part in parts}) == 1:
        paired = _group(model, root, [_union(units) for units in zip(*parts)], axes)
    return Candidate(root, groups, paired, modules=touched)


Unit = dict[Key, list[int]]


def _units(pairs: Mapping[Key, list[Pair]], axes: Mapping[Key, Axes]) -> list[Unit]:
    """Return the channels of the root, joined where they reach a common index (or one block of a GroupNorm)."""
    same = _Union()
    for key, reached in pairs.items():
        owner: dict[int, int] = {}
        for index, origin in reached:
            block = index // axes[key].block
            same.unite(origin, owner.setdefault(block, origin))
    units: dict[int, dict[Key, set[int]]] = defaultdict(lambda: defaultdict(set))
    for key, reached in pairs.items():
        for index, origin in reached:
            units[same.top(origin)][key].add(index)
    ordered = [{key: sorted(indices) for key, indices in unit.items()} for unit in units.values()]
    first = next(iter(pairs))
    return sorted(ordered, key=lambda unit: unit.get(first, [1 << 40])[0])


def _parts(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units, split where they reach different members, or different numbers of their channels."""
    parts: dict[frozenset[tuple[Key, int]], list[Unit]] = defaultdict(list)
    for unit in units:
        parts[frozenset((key, len(indices)) for key, indices in unit.items())].append(unit)
    return list(parts.values())


def _union(units: Sequence[Unit]) -> Unit:
    union: dict[Key, set[int]] = defaultdict(set)
    for unit in units:
        for key, indices in unit.items():
            union[key].update(indices)
    return {key: sorted(indices) for key, indices in union.items()}


def _group(model: nn.Module, name: str, units: Sequence[Unit], axes: Mapping[Key, Axes]) -> ChannelGroup:
    members = []
    for key in (key for key in axes if key in units[0]):
        module = model.get_submodule(key[0])
        shapes = tuple(tuple(getattr(module, attribute).shape) for attribute, _ in axes[key].tensors)
        members.append(Member(*key, torch.tensor([unit[key] for unit in units]), axes[key], shapes))
    return ChannelGroup(name, len(units), tuple(members))


def _is_opaque(module: nn.Module) -> bool:
    """Return whether channels must not be followed through a module: recurrent, attention, custom, parametrized."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention) or hasattr(module, "parametrizations"):
        return True
    own = any(parameter is not None for parameter in module._parameters.values())
    childless = next(module.children(), None) is None
    return own and childless and not isinstance(module, _FOLLOWED) and not is_conv1d(module)


def _width(module: nn.Module) -> int:
    return int(next(getattr(module, name) for name in ("out_channels", "out_features", "nf") if hasattr(module, name)))


def _function_name(function: Any) -> str:
    return f"{type(function.__self__).__name__}.{function.__name__}"


def _tied_tensors(model: nn.Module) -> dict[tuple[str, str], list[str]]:
    owners: dict[tuple[object, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, module in model.named_modules():
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                owners[storage_key(tensor)].append((name, attribute))
    return {
        place: [".".join(other) for other in places if other != place]
        for places in owners.values()
        if len(places) > 1
        for place in places
    }


def _opaque_pruner() -> Any:
    from torch_pruning.pruner.function import BasePruningFunc

    class Opaque(BasePruningFunc):  # type: ignore[misc]
        """Ends every walk: groups that reach it are left out."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            """Return the layer as it is."""
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> None:
            """Return nothing: the number of channels is not known."""

        get_in_channels = get_out_channels

    return Opaque()


def _conv1d_pruner() -> Any:
    from torch_pruning.pruner.function import BasePruningFunc

    class Transposed(BasePruningFunc):  # type: ignore[misc]
        """The transposed linear layer of GPT-2."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            """Return the layer as it is."""
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            """Return the layer as it is."""
            return layer

        def get_out_channels(self, layer: nn.Module) -> int:
            """Return the number of output channels as far as it is known."""
            return int(layer.weight.shape[1])  # type: ignore[index]

        def get_in_channels(self, layer: nn.Module) -> int:
            """Return the number of input channels as far as it is known."""
            return int(layer.weight.shape[0])  # type: ignore[index]

    return Transposed()
