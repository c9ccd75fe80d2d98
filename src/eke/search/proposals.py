"""Searches under limits, one architecture at a time: ask, score, tell.

`Evolution` is the steady-state rule of ZiCo's search: while 10 or fewer are known, a mutation of the first network,
else one of a random member of the population; of more than 512 the worst goes. `RegularizedEvolution` lets the oldest
go and mutates the best of a random sample. `RandomSearch` draws.

An architecture is proposed at most once, and only if it keeps the limits: those with closed forms cost microseconds, so
most of the work is the score. Proposal n draws from a generator seeded by (seed, n), so a search that is told what was
found before goes on exactly as one that was never interrupted.

Several scores of an architecture are fused over what is compared (`fuse`): there is no sum of unlike scores anywhere.

Sources: G. Li et al., ZiCo, 2023; E. Real et al., "Regularized Evolution for Image Classifier Architecture Search",
2019.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .fusion import fuse
from .limits import Limits
from .spaces.space import Space

Objective = Callable[[Any], float | Mapping[str, float]]
"""Scores an architecture: one number or several by name, larger is better."""

PATIENCE = 20_000
"""Proposals in a row that may be of no use before a search gives up."""


@dataclass(frozen=True)
class Trial:
    """An architecture that was scored.

    Args:
        architecture: A value of the space.
        values: Scores by name.
        costs: Costs by name.
        proposals: Proposals of the search up to this one.
        seconds: That the score took.
    """

    architecture: Any
    values: dict[str, float]
    costs: dict[str, float]
    proposals: int = 0
    seconds: float = 0.0


class Method(Protocol):
    """How the next architecture is proposed."""

    def propose(self, space: Space, rng: random.Random) -> Any:
        """Return an architecture, useful or not."""
        ...

    def tell(self, trial: Trial) -> None:
        """Take what was found."""
        ...


def fused(trials: Sequence[Trial]) -> list[float]:
    """Return one number for each trial: its score, or the fusion of several over these trials.

    Args:
        trials: What is compared.
    """
    names = sorted({name for trial in trials for name in trial.values})
    columns = {name: [trial.values.get(name, math.nan) for trial in trials] for name in names}
    if len(names) == 1:
        return [-math.inf if math.isnan(value) else value for value in columns[names[0]]]
    return [float(value) for value in fuse(columns)]


@dataclass
class Evolution:
    """Steady-state evolution.

    Args:
        population: Members kept.
        start: First network; the space's own start, or its smallest, if not given.
        changes: Choices that a mutation draws again.
    """

    population: int = 512
    start: Any = None
    changes: int = 2
    members: list[Trial] = field(default_factory=list, repr=False)

    def propose(self, space: Space, rng: random.Random) -> Any:
        """Return a mutation of the start or of a random member."""
        if len(self.members) <= 10:
            return space.mutate(self.start, rng, changes=1) if self.start is not None else space.sample(rng)
        return space.mutate(rng.choice(self.members).architecture, rng, changes=self.changes)

    def tell(self, trial: Trial) -> None:
        """Add a member, and drop the worst if there are too many."""
        self.members.append(trial)
        if len(self.members) > self.population:
            del self.members[int(np.argmin(fused(self.members)))]


@dataclass
class RegularizedEvolution:
    """Evolution that forgets the oldest.

    Args:
        population: Members kept; as many are drawn at random first.
        sample: Members of which the best is mutated.
        changes: Choices that a mutation draws again.
    """

    population: int = 64
    sample: int = 16
    changes: int = 1
    members: deque[Trial] = field(default_factory=deque, repr=False)

    def propose(self, space: Space, rng: random.Random) -> Any:
        """Return a random architecture at first, then a mutation of the best of a sample."""
        if len(self.members) < self.population:
            return space.sample(rng)
        rivals = rng.sample(list(self.members), min(self.sample, len(self.members)))
        parent = rivals[int(np.argmax(fused(rivals)))]
        return space.mutate(parent.architecture, rng, changes=self.changes)

    def tell(self, trial: Trial) -> None:
        """Add a member, and drop the oldest if there are too many."""
        self.members.append(trial)
        if len(self.members) > self.population:
            self.members.popleft()


@dataclass
class RandomSearch:
    """Random architectures."""

    def propose(self, space: Space, rng: random.Random) -> Any:
        """Return a random architecture."""
        return space.sample(rng)

    def tell(self, trial: Trial) -> None:
        """Take nothing in."""


class Search:
    """A search by hand: `architecture = search.ask()`, score it, `search.tell(architecture, value)`.

    Args:
        space: Where to search.
        budget: Upper limits.
        method: How to propose.
        seed: Of all proposals.

    Raises:
        ValueError: if even the smallest architecture exceeds a limit on FLOPs.
    """

    def __init__(
        self, space: Space, budget: Limits | None = None, *, method: Method | None = None, seed: int = 0
    ) -> None:
        self.space = space
        self.budget = Limits() if budget is None else budget
        self.method = Evolution(start=getattr(space, "start", None)) if method is None else method
        self.seed = seed
        self.proposals = 0
        self.trials: list[Trial] = []
        self._seen: set[Any] = set()
        self._costs: dict[Any, dict[str, float]] = {}
        self._least = self.budget.closed(space, space.smallest)
        if self.budget.flops is not None and self._least["flops"] > self.budget.flops:
            raise ValueError(
                f"No architecture of {space.name!r} has at most {self.budget.flops:.6g} FLOPs: the smallest, "
                f"{space.describe(space.smallest)}, has {self._least['flops']:.6g}. Raise the limit to that or more."
            )
        if isinstance(self.method, Evolution) and self.method.start is not None and self._over(self.method.start):
            self.method.start = space.smallest

    def ask(self) -> Any:
        """Return the next architecture that keeps the limits and was not returned before.

        Returns:
            The architecture.

        Raises:
            ValueError: if none was found that keeps the limits; names the nearest.
            StopIteration: if all that are found were returned before.
        """
        nearest: tuple[float, Any, dict[str, float]] | None = None
        for _ in range(PATIENCE):
            self.proposals += 1
            rng = random.Random(self.seed * 1_000_000_007 + self.proposals)
            architecture = self.method.propose(self.space, rng)
            if architecture in self._seen or self.space.fault(architecture) is not None:
                continue
            costs = self._affordable(architecture)
            excess = self.budget.excess(costs)
            if excess == 0:
                self._seen.add(architecture)
                self._costs[architecture] = costs
                return architecture
            if nearest is None or excess < nearest[0]:
                nearest = excess, architecture, costs
        if nearest is None or self.trials:
            raise StopIteration(f"{PATIENCE} proposals in a row found nothing new after {len(self.trials)} trials.")
        raise ValueError(
            f"None of {PATIENCE} architectures of {self.space.name!r} keeps the limits; the nearest, "
            f"{self.space.describe(nearest[1])}, has {self.budget.told(nearest[2])}. Raise the limits to that or more."
        )

    def _affordable(self, architecture: Any) -> dict[str, float]:
        """Return the costs, measured ones only where the closed ones keep the limits."""
        costs = self.budget.closed(self.space, architecture)
        return costs if self.budget.excess(costs) else costs | self.budget.measured(self.space, architecture)

    def _over(self, architecture: Any) -> bool:
        return self.budget.excess(self.budget.closed(self.space, architecture)) > 0

    def tell(self, architecture: Any, value: float | Mapping[str, float], *, seconds: float = 0.0) -> Trial:
        """Take the score of an architecture.

        Args:
            architecture: From `ask`.
            value: Its score, or several by name; larger is better. What is no number ranks last.
            seconds: That it took.

        Returns:
            The trial.

        Raises:
            ValueError: if the architecture was not asked for.
        """
        if architecture not in self._costs:
            raise ValueError(f"tell() takes what ask() returned, got {architecture!r:.200}.")
        values = (
            {name: float(v) for name, v in value.items()} if isinstance(value, Mapping) else {"score": float(value)}
        )
        trial = Trial(architecture, values, self._costs[architecture], self.proposals, seconds)
        self.restore(trial)
        return trial

    def restore(self, trial: Trial) -> None:
        """Take a trial of an earlier run, in the order in which they were told.

        Args:
            trial: From its log.
        """
        self.proposals = trial.proposals
        self._seen.add(trial.architecture)
        self.trials.append(trial)
        self.method.tell(trial)
