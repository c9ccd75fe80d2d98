"""Many groups proved by few comparisons: all at once, in halves where that fails, one by one where halves end.

Every group must be as proved as alone. Three things could hide a wrong one among others, and each is excluded:
- Others mask all that is downstream of it, or of one of its consumers. So in the masked pass the gradient of a random
  projection of the outputs is taken: dL/dW[:, j] . W[:, j] over the dropped columns j of a consumer is, to first order,
  what its mask does in this company. A group with a consumer that does less than `_DIM` is proved alone.
- Its error is small beside what the others do. So the difference is held against the least of these effects.
- Others make up for it: channels that are concatenated and chunked fit again if two layers lose as many, heads that
  share a table agree if two attentions lose the same. So all are cut again in sets such that for any two, one set has
  the first without the second (Sperner 1928: n groups need t sets where t choose t/2 >= n), with other channels and
  other numbers of them.
Where a comparison fails it is halved, with the same channels; what fails alone is refused with its own reason.

Cost: 4 + 2t forward passes for n groups instead of 2n; O(f log n) more for f failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import ChannelGroup
from .proof import INVISIBLE, Bench, Choice, call, cuda_devices, masked, random_keep

_FEW = 8
_DIM = 1e-5
_WIDE = 0.25


class Joint:
    """Proofs of groups on one bench; what is known of each is kept.

    Args:
        where: The bench.
        generator: Chooses channels and sets.
    """

    def __init__(self, where: Bench, generator: torch.Generator) -> None:
        self.where, self.generator = where, generator
        self._least: dict[ChannelGroup, float] = {}  # of groups that held together
        self._alone: dict[ChannelGroup, str] = {}
        self._right = self._wrong = 0

    def prove(self, groups: Sequence[ChannelGroup]) -> list[str]:
        """Prove groups, alone if they are few; those that held together are still to be separated.

        Args:
            groups: Each of at least two units.

        Returns:
            For each group '' if it is proved, else what went wrong.
        """
        if len(groups) < _FEW:
            return [self.alone(group) for group in groups]
        self._right = self._wrong = 0
        self._settle([(group, random_keep(group, self.generator)) for group in groups])
        return [self._alone.get(group, "") for group in groups]

    def alone(self, group: ChannelGroup) -> str:
        """Return '' if a group is proved alone, else what went wrong."""
        if group not in self._alone:
            self._alone[group] = self.where.prove([group], self.generator)
        return self._alone[group]

    def separate(self) -> list[tuple[ChannelGroup, str]]:
        """Cut the groups that held together without one another, and those that held alone with them.

        Returns:
            Groups that turned out wrong, and what goes wrong with each alone.
        """
        groups = [*self._least, *(group for group, reason in self._alone.items() if not reason)]
        late: dict[ChannelGroup, str] = {}
        codes = separating_codes(len(groups), self.generator) if self._least else []
        for test in range(1 + max((max(code, default=0) for code in codes), default=0)):
            inside = [group for group, code in zip(groups, codes) if test in code and group not in late]
            self._confirm([(group, random_keep(group, self.generator, spread=_WIDE)) for group in inside], late)
        self._least = {}
        return list(late.items())

    def _settle(self, choices: Sequence[Choice]) -> None:
        # Where most are wrong, halving costs more than it saves.
        if len(choices) < 3 or (len(choices) < 2 * _FEW and self._wrong > self._right):
            self._settle_alone(choices)
            return
        reason, effects = self._watched(choices)
        if reason:
            half = len(choices) // 2
            self._settle(choices[:half])
            self._settle(choices[half:])
            return
        seen = {group: effect for (group, _), effect in zip(choices, effects) if effect >= _DIM}
        if len(seen) > 1:
            self._least |= seen
            self._right += len(seen)
        self._settle_alone([choice for choice in choices if choice[0] not in self._least])

    def _settle_alone(self, choices: Sequence[Choice]) -> None:
        for group, keep in choices:
            reason = self.where.failure([(group, keep)])  # first the choice that failed in company
            self._alone[group] = self.where.prove([group], self.generator) if reason == INVISIBLE else reason
            if self._alone[group]:
                self._wrong += 1
            else:
                self._right += 1

    def _confirm(self, choices: Sequence[Choice], late: dict[ChannelGroup, str]) -> None:
        least = min((self._least.get(group, 1.0) for group, _ in choices), default=1.0)
        reason = self.where.failure(choices, least=least) if choices else ""
        if reason in ("", INVISIBLE):  # each was seen before
            return
        if len(choices) == 1:
            late[choices[0][0]] = reason
            return
        half = len(choices) // 2
        self._confirm(choices[:half], late)
        self._confirm(choices[half:], late)

    def _watched(self, choices: Sequence[Choice]) -> tuple[str, list[float]]:
        """Return what is wrong with a joint cut, '' if nothing, and what the mask of each group does in it."""
        model, nothing = self.where.model, [0.0] * len(choices)
        after = self.where.cut_outputs(choices)
        if isinstance(after, str):
            return after, nothing
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = _consumer_weights(model, choices)
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            with masked(model, choices), torch.enable_grad(), torch.random.fork_rng(cuda_devices(model)):
                torch.manual_seed(0)
                leaves = pytree.tree_leaves(call(model, self.where.inputs))
                outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                before = tuple(output.detach().to(torch.float64) for output in outputs)
                reason = self.where.verdict(before, after)
                effects = nothing if reason else _effects(model, choices, weights, outputs, self.generator)
        except Exception as error:
            return f"the masked model does not run with gradients ({type(error).__name__})", nothing
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
        least = min((effect for effect in effects if effect >= _DIM), default=1.0)
        return reason or self.where.verdict(before, after, least=least), effects


def separating_codes(number: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Return for each of some things the sets that it is in, such that of any two each is once without the other.

    Args:
        number: Of things.
        generator: Chooses among the codes.

    Returns:
        As many different subsets of equal size of the smallest range of sets that has enough.
    """
    sets = next(t for t in range(1, number + 2) if math.comb(t, t // 2) >= number)
    codes = list(combinations(range(sets), sets // 2))
    return [codes[i] for i in torch.randperm(len(codes), generator=generator)[:number].tolist()]


def _consumer_weights(model: nn.Module, choices: Sequence[Choice]) -> dict[tuple[str, str], Tensor]:
    """Return the weights that are going to be masked, as they are."""
    members = [member for group, _ in choices for member in group.consumers]
    places = {(member.module_name, attribute) for member in members for attribute, _ in member.axes.tensors}
    return {(name, a): model.get_submodule(name)._parameters[a].detach() for name, a in places}  # type: ignore[union-attr]


def _effects(
    model: nn.Module,
    choices: Sequence[Choice],
    weights: dict[tuple[str, str], Tensor],
    outputs: Sequence[Tensor],
    generator: torch.Generator,
) -> list[float]:
    """Return for each group what the mask of its weakest consumer does to the outputs, relative, to first order.

    Args:
        model: Masked.
        choices: What is masked.
        weights: Of the consumers, not masked.
        outputs: Of the masked model, with their history.
        generator: Draws the projection of the outputs.
    """
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        scale = float(output.detach().abs().max()) if output.numel() and output.requires_grad else 0.0
        if scale > 0:
            ray = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            total = total.to(output.device) + (output * ray).sum() / (scale * math.sqrt(output.numel()))
    found: list[list[float]] = [[] for _ in choices]
    readers: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = {}
    for number, (group, keep) in enumerate(choices):
        dropped = group.dropped(keep)
        for member in group.consumers:
            for attribute, dim in member.axes.tensors:
                columns = member.indices[dropped].flatten()
                readers.setdefault((member.module_name, attribute), []).append((number, dim, columns))

    def watch(place: tuple[str, str]) -> None:
        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            worth = parameter.grad * weights[place]
            parameter.grad = None  # one gradient at a time is kept
            for number, dim, columns in readers[place]:
                each = worth.transpose(0, dim).flatten(1).sum(1)
                found[number].append(float(each[columns.to(each.device)].norm()))

        masked_weight = model.get_submodule(place[0])._parameters[place[1]]
        assert masked_weight is not None
        masked_weight.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]

    if total.requires_grad:
        for place in readers:
            watch(place)
        total.backward()  # type: ignore[no-untyped-call]
    expected = [sum(len(member.axes.tensors) for member in group.consumers) for group, _ in choices]
    return [min(effects) if effects and len(effects) == n else 0.0 for effects, n in zip(found, expected)]
