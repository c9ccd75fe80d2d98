"""`evolve`: a search from start to end in one process, with a log from which it goes on after a kill.

The log is a file of JSON lines: what was asked, then one line a trial, each on disk before the next begins. Started
again with the same question the search reads it, and goes on exactly as if it had never ended.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._types import Batch, Loss
from ..cost import write_bytes
from .found import Found, line, parsed
from .limits import Limits
from .proposals import Evolution, Method, Objective, RandomSearch, RegularizedEvolution, Search
from .spaces.space import Space
from .subject import built, cross_entropy, listed
from .tables import FUSION, Proxy, score

METHODS: dict[str, type[Evolution | RegularizedEvolution | RandomSearch]] = {
    "evolution": Evolution,
    "regularized": RegularizedEvolution,
    "random": RandomSearch,
}
"""Methods by name."""

Progress = Callable[[str, float, str], None]
"""`progress(stage, share, text)`."""


@dataclass(frozen=True)
class Scorer:
    """An objective made of proxies: builds the network of an architecture and scores it.

    Args:
        space: What architectures mean.
        batches: For the proxies that need data.
        proxies: Names or functions, see `score`; several are fused by the search.
        seed: Of the weights.
        loss: Mean loss.
    """

    space: Space
    batches: Sequence[Batch]
    proxies: Sequence[str | Proxy] = FUSION
    seed: int = 0
    loss: Loss = cross_entropy

    def __call__(self, architecture: Any) -> dict[str, float]:
        """Return the scores by name; those that a closed form gives are not computed from the network."""
        closed = {"params": self.space.parameters, "flops": self.space.flops}
        if (formula := getattr(self.space, "log_numel", None)) is not None:
            closed["log_numel"] = formula
        values = {name: float(closed[name](architecture)) for name in self.proxies if name in closed}
        left = [proxy for proxy in self.proxies if proxy not in closed]
        if left:
            model = built(lambda: self.space.bare(architecture), self.seed)
            values |= score(model, self.batches, proxies=left, loss=self.loss).means
        return values

    def settings(self) -> dict[str, Any]:
        """Return what a log must agree on: proxies by name, and the seed of the weights."""
        names = [proxy if isinstance(proxy, str) else getattr(proxy, "__name__", "") for proxy in self.proxies]
        return {"proxies": names, "weights": self.seed}

    @classmethod
    def of(cls, space: Space, batches: Iterable[Batch], *, proxies: Sequence[str | Proxy] = FUSION) -> Scorer:
        """Return the scorer for batches of any kind, read once.

        Args:
            space: What architectures mean.
            batches: A loader or a list.
            proxies: Names or functions.
        """
        return cls(space, listed(batches), proxies)


def evolve(
    space: Space,
    objective: Objective,
    budget: Limits | None = None,
    *,
    evaluations: int = 1000,
    method: Method | None = None,
    seed: int = 0,
    log: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search for the architecture with the best score within limits.

    Args:
        space: Where to search.
        objective: Scores an architecture, larger is better; several scores by name are fused. `Scorer` makes one of
            proxies.
        budget: Upper limits.
        evaluations: Architectures that are scored, those of the log included.
        method: How to propose, new; steady-state evolution if not given.
        seed: Of the proposals.
        log: File that keeps every trial, and from which the search goes on. It knows limits, method, seed and a
            `Scorer`'s proxies; that data, and objectives of another kind, are the same is up to the caller.
        progress: Called after each trial.

    Returns:
        Trials, best and front.

    Raises:
        ValueError: if no architecture keeps the limits (the nearest is named), `evaluations` is less than 1, or the log
            is of another search, or no log at all.
    """
    if evaluations < 1:
        raise ValueError(f"evolve needs evaluations >= 1, got {evaluations}.")
    search = Search(space, budget, method=method, seed=seed)
    settings = {
        **space.settings(),
        "budget": {name: value for name, value in asdict(search.budget).items() if value is not None},
        "method": type(search.method).__name__,
        **_numbers(search.method),
        "seed": seed,
        **(objective.settings() if isinstance(objective, Scorer) else {}),
    }
    file = None if log is None else _Log(pathlib.Path(log), settings)
    for trial in file.trials if file is not None else ():
        search.restore(trial)
    note = ""
    while len(search.trials) < evaluations:
        try:
            architecture = search.ask()
        except StopIteration as end:
            note = str(end)
            break
        begun = time.perf_counter()
        value = objective(architecture)
        trial = search.tell(architecture, value, seconds=time.perf_counter() - begun)
        if file is not None:
            file.add(line(trial))
        if progress is not None:
            text = f"{len(search.trials)} of {evaluations} scored, {search.proposals} proposed"
            progress("search", len(search.trials) / evaluations, text)
    return Found(space, tuple(search.trials), settings | {"evaluations": evaluations}, note)


def _numbers(method: Method) -> dict[str, Any]:
    """Return the plain numbers of a method: population, sample, changes."""
    return {name: value for name, value in getattr(method, "__dict__", {}).items() if isinstance(value, int | float)}


class _Log:
    """A file of JSON lines that is whole up to its last newline."""

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        header = json.dumps({"eke search": settings})
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        # what a kill cut short has no newline; the first line is written as a whole
        kept = lines[:-1]
        if lines[0] and (not kept or kept[0] != header):
            raise ValueError(
                f"{path} is the log of another search, or none: it has {lines[0]:.600}, asked is {header:.600}. "
                "Give another file, or ask the same."
            )
        self.trials = [parsed(text) for text in kept[1:]]
        content = "".join(f"{text}\n" for text in (kept or [header]))
        write_bytes(path, content.encode())

    def add(self, text: str) -> None:
        """Append a line and wait until it is on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
