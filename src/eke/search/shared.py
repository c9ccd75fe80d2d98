"""One search by several processes or machines: NSGA-II of Optuna over a storage that they share.

Scores are maximised, chosen costs minimised, so the outcome is a front. Limits with closed forms are looked at before
anything is built: what exceeds them is told to the sampler with its excess, which ranks it behind all that keeps them,
and is never scored; nor is what any process scored before. Every trial is in the storage as soon as it is scored. A
trial whose process died is found by the others (its process is gone, or it has run longer than `stale_seconds` on
another machine), given up, and queued again.

Storages: journal:FILE (one file, on a network drive too), sqlite:///FILE, postgresql://..., any other URL of Optuna's.
Source: K. Deb et al., NSGA-II, 2002; T. Akiba et al., Optuna, 2019.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .._errors import require
from .found import Found
from .limits import COSTS, Limits
from .proposals import Objective, Trial
from .run import Progress
from .spaces.space import Space


def share(
    space: Space,
    objective: Objective,
    budget: Limits | None = None,
    *,
    storage: str,
    study: str = "eke",
    evaluations: int = 1000,
    scores: Sequence[str] = ("score",),
    costs: Sequence[str] = ("flops",),
    population: int = 50,
    seed: int | None = None,
    patience: int = 2000,
    stale_seconds: float = 3600.0,
    progress: Progress | None = None,
) -> Found:
    """Take part in a search until `evaluations` architectures were scored by all who take part.

    Call it in as many processes as there are; each sees what the others found. After a kill, call it again.

    Args:
        space: Where to search.
        objective: Scores an architecture, larger is better: a number, or several by name.
        budget: Upper limits.
        storage: journal:FILE, sqlite:///FILE, postgresql://USER@HOST/DATABASE.
        study: Name of the search in the storage.
        evaluations: Architectures scored in all.
        scores: Names of what the objective returns, each maximised; "score" for a number.
        costs: Names of costs, each minimised.
        population: Of NSGA-II.
        seed: Of this process's proposals; unlike in every process, hence random if not given.
        patience: Proposals in a row of this process that may be of no use before it gives up.
        stale_seconds: After this time a trial of another machine is taken for dead.
        progress: Called after each trial.

    Returns:
        All trials of the search, best and front.

    Raises:
        ValueError: if the storage holds another search of this name, nothing keeps the limits, `evaluations` is less
            than 1, or the objective returns other scores than `scores`.
        ConnectionError: if the storage cannot be reached.
        MissingExtraError: if Optuna is not installed.
    """  # noqa: DOC502
    optuna = require("optuna", extra="search", purpose="A shared search")
    limits = Limits() if budget is None else budget
    if unknown := sorted(set(costs) - set(COSTS)):
        raise ValueError(f"Costs are {', '.join(COSTS)}, got {unknown}.")
    if evaluations < 1:
        raise ValueError(f"share needs evaluations >= 1, got {evaluations}.")
    # as the storage gives it back: tuples are lists there
    settings = json.loads(
        json.dumps({
            **space.settings(),
            "budget": {name: value for name, value in asdict(limits).items() if value is not None},
            "scores": list(scores),
            "costs": list(costs),
        })
    )
    with _quiet():
        opened = _opened(optuna, storage, study, settings, population, seed)
        worker = _Worker(optuna, opened, space, objective, limits, tuple(scores), tuple(costs))
        refused = 0
        while True:
            worker.reclaim(stale_seconds)
            done = worker.scored()
            if progress is not None:
                progress("search", min(1.0, len(done) / evaluations), f"{len(done)} of {evaluations} scored by all")
            if len(done) >= evaluations or refused >= patience:
                break
            refused = 0 if worker.step(done) else refused + 1
        if not done:
            count, nearest, told = worker.nearest()
            raise ValueError(
                f"None of {count} architectures of {space.name!r} keeps the limits; the nearest, {nearest}, has "
                f"{told}. Raise the limits to that or more."
            )
    note = f"{refused} proposals in a row found nothing new within the limits." if len(done) < evaluations else ""
    return Found(space, tuple(done.values()), settings | {"method": "NSGA-II", "evaluations": evaluations}, note)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log of every trial away."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _opened(optuna: Any, url: str, name: str, settings: Mapping[str, Any], population: int, seed: int | None) -> Any:
    """Return the study, made if there is none of its name.

    Args:
        optuna: The package.
        url: Of the storage.
        name: Of the study.
        settings: What is asked.
        population: Of NSGA-II.
        seed: Of the sampler.

    Returns:
        The study.

    Raises:
        ConnectionError: if the storage cannot be reached.
        ValueError: if the study is of another search.
    """
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    directions = ["maximize"] * len(settings["scores"]) + ["minimize"] * len(settings["costs"])
    try:
        study = optuna.create_study(
            study_name=name, storage=_storage(optuna, url), sampler=sampler, directions=directions, load_if_exists=True
        )
        known = study.user_attrs.get("eke search")
        if known is None:
            study.set_user_attr("eke search", settings)
    except ImportError as error:
        raise ConnectionError(
            f"The storage {url.partition('://')[0]!r} needs the driver of its database ({error.name or error}); for "
            "PostgreSQL: pip install 'psycopg[binary]'. A file needs none: journal:search.log."
        ) from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"The storage {url!r} cannot be reached: {first} Check the address and that its folder or server exists; "
            "a file needs no server: journal:search.log."
        ) from error
    if known is not None and known != settings:
        raise ValueError(f"The search {name!r} in {url!r} asked {known}, now asked is {settings}. Give another name.")
    return study


def _storage(optuna: Any, url: str) -> Any:
    kind, colon, rest = url.partition(":")
    if kind == "journal" and colon:
        folder = pathlib.Path(rest).absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(rest))
    if "://" not in url:
        raise ValueError(f"{url!r} is no URL such as journal:FILE, sqlite:///FILE or postgresql://HOST/DATABASE.")
    # two processes at once wait for each other instead of failing
    patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=patient)


class _Worker:
    """What one process does in a shared search."""

    def __init__(
        self,
        optuna: Any,
        study: Any,
        space: Space,
        objective: Objective,
        limits: Limits,
        scores: tuple[str, ...],
        costs: tuple[str, ...],
    ) -> None:
        self.states = optuna.trial.TrialState
        self.study = study
        self.space = space
        self.objective = objective
        self.limits = limits
        self.scores = scores
        self.costs = costs
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def step(self, known: Mapping[Any, Trial]) -> bool:
        """Propose one architecture and score it.

        Args:
            known: What was scored before, by architecture.

        Returns:
            Whether something new that keeps the limits was scored.

        Raises:
            ValueError: if the objective returns other scores than those of the search.
        """
        trial = self.study.ask()
        trial.set_user_attr("worker", self.name)
        architecture = self.space.compose(lambda name, options: trial.suggest_categorical(name, list(options)))
        costs = self.limits.closed(self.space, architecture)
        excess = self.limits.excess(costs) + (self.space.fault(architecture) is not None)
        if not excess and architecture not in known:
            costs |= self._measured(architecture)
            excess = self.limits.excess(costs)
        trial.set_constraint("excess", excess)
        if excess:
            # its values are never compared: what exceeds less or nothing ranks before it
            trial.set_user_attr("found", {"costs": costs, "excess": excess})
            self.study.tell(trial, [0.0] * (len(self.scores) + len(self.costs)))
            return False
        begun = time.perf_counter()
        if architecture in known:
            values, costs = known[architecture].values, known[architecture].costs
        else:
            value = self.objective(architecture)
            values = dict(value) if isinstance(value, Mapping) else {"score": value}
            if set(values) != set(self.scores):
                self.study.tell(trial, state=self.states.FAIL)
                raise ValueError(
                    f"The objective returns the scores {list(values)}, the search maximises {list(self.scores)}: "
                    f"pass scores={tuple(values)}, under another name if the study exists."
                )
            written = {name: str(float(values[name])) for name in self.scores}
            seconds = time.perf_counter() - begun
            trial.set_user_attr("found", {"values": written, "costs": costs, "seconds": seconds})
        told = [max(-1e300, min(1e300, float(values[name]))) for name in self.scores]
        self.study.tell(trial, [*told, *(costs[name] for name in self.costs)])
        return architecture not in known

    def _measured(self, architecture: Any) -> dict[str, float]:
        """Return latency and memory where they are limited or part of the front."""
        wanted = {name: math.inf for name in self.costs if name not in ("flops", "parameters")}
        bounds = Limits(**(wanted | self.limits.limited), batch=self.limits.batch, threads=self.limits.threads)
        return bounds.measured(self.space, architecture)

    def scored(self) -> dict[Any, Trial]:
        """Return what all processes have scored by architecture, in the order in which it was begun."""
        found: dict[Any, Trial] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,)):
            kept = trial.user_attrs.get("found", {})
            if "values" in kept:
                values = {name: float(value) for name, value in kept["values"].items()}
                architecture = self._made(trial.params)
                found.setdefault(
                    architecture, Trial(architecture, values, kept["costs"], trial.number + 1, kept["seconds"])
                )
        return found

    def _made(self, params: Mapping[str, Any]) -> Any:
        return self.space.compose(lambda name, _options: params[name])

    def reclaim(self, stale_seconds: float) -> None:
        """Give up trials whose process is gone, and queue what they were about."""
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker == self.name or not self._is_dead(trial, worker, stale_seconds):
                continue
            # another process may have been faster
            with contextlib.suppress(ValueError, RuntimeError):
                self.study.tell(trial.number, state=self.states.FAIL)
                if trial.params:
                    self.study.enqueue_trial(trial.params)

    @staticmethod
    def _is_dead(trial: Any, worker: str | None, stale_seconds: float) -> bool:
        host, _, process = (worker or "").rpartition(":")
        if host == socket.gethostname():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        begun = trial.datetime_start
        return begun is not None and (datetime.datetime.now() - begun).total_seconds() > stale_seconds

    def nearest(self) -> tuple[int, str, str]:
        """Return how many architectures were weighed, the one that exceeds the limits least, and its costs in words."""
        every = self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))
        tried = [trial for trial in every if "excess" in trial.user_attrs.get("found", {})]
        best = min(tried, key=lambda trial: trial.user_attrs["found"]["excess"])
        found = best.user_attrs["found"]
        return len(tried), self.space.describe(self._made(best.params)), self.limits.told(found["costs"])
