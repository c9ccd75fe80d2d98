"""The recipe of a run: what was compressed, on which data, within which budget. Enough to run it again.

    model: my_model.py:build      or  task: demo
    data: my_data.py:loaders
    budget: {max_drop: 1%, latency: 0.5x}
    recovery: {steps: 600}
    seed: 0
    threads: null
    seconds: 3.0
    skip: []

It is YAML on disk; `--set budget.latency=0.4x` changes one entry, flags change their own. Reading and changing a recipe
needs no torch.
"""

from __future__ import annotations

import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import yaml

from .names import check, check_all
from .session import UsageError

if TYPE_CHECKING:
    from ..compression import Task

BUDGET = ("max_drop", "latency", "size", "macs", "parameters", "peak_memory")
"""Limits, as `eke.Budget` has them."""

RECOVERY = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup", "grid_from", "hidden")
"""Numbers of `eke.compression.Recovery`."""

TASKS = ("demo", "minilm", "g2p", "crepe", "mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet")
"""Trained networks with data, as `eke.demo.WITNESSES` has them."""

FILE = "recipe.yaml"
_SECTIONS = {"budget": BUDGET, "recovery": RECOVERY}


@dataclass(frozen=True)
class Recipe:
    """What a run was asked for; entries that are not there take their defaults.

    Args:
        model: FILE.py:FUNCTION or torchvision:NAME.
        data: FILE.py:FUNCTION.
        task: One of `TASKS` instead of a model and data.
        budget: Limits by name, as typed.
        recovery: Numbers of the recovery.
        seed: Of recovery and measurements.
        threads: Of torch.
        seconds: Of one comparison of latencies.
        skip: Modules or sites to leave as they are.
    """

    model: str | None = None
    data: str | None = None
    task: str | None = None
    budget: Mapping[str, str | float] = field(default_factory=dict)
    recovery: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    seconds: float = 3.0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task is not None:
            check(self.task, TASKS, "There is no task")
            if self.model or self.data:
                raise UsageError(
                    f"--task {self.task} brings its own model and data, got {self.model or self.data!r} beside it: "
                    "give one of them."
                )

    def check_source(self, verb: str) -> None:
        """Refuse a recipe that names no model or no data.

        Args:
            verb: Of the command, for the message.

        Raises:
            UsageError: if so.
        """
        if self.task is None and self.model is None:
            raise UsageError(
                f"No model was given, got {self.model}: eke {verb} FILE.py:FUNCTION --data FILE.py:FUNCTION, or "
                f"eke {verb} --task demo."
            )
        if self.task is None and self.data is None:
            raise UsageError(
                f"No data were given for {self.model}, got {self.data}: add --data FILE.py:FUNCTION, such as "
                "my_data.py:loaders."
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a model and data, or a task."""
        source = {"task": self.task} if self.task else {"model": self.model, "data": self.data}
        return {
            **source,
            "budget": dict(self.budget),
            "recovery": dict(self.recovery),
            "seed": self.seed,
            "threads": self.threads,
            "seconds": self.seconds,
            "skip": list(self.skip),
        }

    def with_source(self, model: str | None, *, data: str | None, task: str | None) -> Recipe:
        """Return the recipe with another model, data or task, where one is given."""
        if task is not None:
            return replace(self, model=model, data=data, task=task)
        if model is not None or data is not None:
            return replace(self, model=model or self.model, data=data or self.data, task=None)
        return self

    def with_recovery_of(self, task: Task) -> Recipe:
        """Return the recipe with the task's recovery, or the default one, filled in: it says all there is to say."""
        from ..compression import Recovery

        defaults = task.recovery or Recovery()
        return replace(self, recovery={n: self.recovery.get(n, getattr(defaults, n)) for n in RECOVERY})

    def with_flags(
        self,
        budget: Mapping[str, str | None],
        *,
        steps: int | None = None,
        seed: int | None = None,
        threads: int | None = None,
        seconds: float | None = None,
        skip: Sequence[str] | None = None,
    ) -> Recipe:
        """Return the recipe with the flags that were given: those that are not None, and names to skip."""
        limits = {name: value for name, value in budget.items() if value is not None}
        return replace(
            self,
            budget={**self.budget, **limits},
            recovery={**self.recovery, **({} if steps is None else {"steps": steps})},
            seed=self.seed if seed is None else seed,
            threads=self.threads if threads is None else threads,
            seconds=self.seconds if seconds is None else seconds,
            skip=tuple(skip) if skip else self.skip,
        )


def build(document: object, *, where: str) -> Recipe:
    """Read a recipe from plain values.

    Args:
        document: What YAML made of the text.
        where: What it was read from, for messages.

    Returns:
        The recipe.

    Raises:
        UsageError: if a key is unknown or a value has another type.
    """
    if not isinstance(document, Mapping):
        raise UsageError(f"{where} must hold keys and values, got {type(document).__name__} {document!r:.60}.")
    check_all(document, [f.name for f in fields(Recipe)], f"{where} has an unknown key")
    found = {str(key): value for key, value in document.items()}
    for section, names in _SECTIONS.items():
        entries = found.setdefault(section, {}) or {}
        if not isinstance(entries, Mapping):
            raise UsageError(f"{where}: {section} must hold keys and values, got {entries!r:.60}.")
        check_all(entries, names, f"{where}: {section} has an unknown key")
        found[section] = {name: entries[name] for name in names if entries.get(name) is not None}
        if section == "recovery":
            found[section] = {name: _number(value) for name, value in found[section].items()}
        for name, value in found[section].items():
            _typed(value, f"{where}: {section}.{name}", str if section == "budget" else None, int, float)
    for name in ("model", "data", "task"):
        _typed(found.get(name), f"{where}: {name}", str, type(None))
    found["seed"] = _typed(found.get("seed", 0), f"{where}: seed", int)
    _typed(found.get("threads"), f"{where}: threads", int, type(None))
    found["seconds"] = float(_typed(_number(found.get("seconds", 3.0)), f"{where}: seconds", int, float))
    skip = found.get("skip") or []
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise UsageError(f"{where}: skip must be a list of names, got {skip!r:.60}.")
    return Recipe(**{**found, "skip": tuple(skip)})


def _number(value: Any) -> Any:
    """Return the number that a text says, and anything else as it is: YAML 1.1 reads 1e-3 as text."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return int(number) if number.is_integer() else number


def _typed(value: Any, where: str, *allowed: type | None) -> Any:
    kinds = tuple(kind for kind in allowed if kind is not None)
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join({str: "text", int: "a whole number", float: "a number"}.get(k, "null") for k in kinds)
        raise UsageError(f"{where} must be {wanted}, got {value!r}.")
    return value


def read(path: pathlib.Path) -> Any:
    """Return what a recipe's YAML holds.

    Args:
        path: The file, or a folder with a recipe.yaml.

    Returns:
        Plain values.

    Raises:
        FileNotFoundError: if there is no such file.
        UsageError: if it is not YAML.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe at {path}: give a YAML file, or the folder of a result.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}.") from error


def assigned(document: Any, settings: Sequence[str], *, where: str = "The recipe") -> dict[str, Any]:
    """Return plain values with `a.b=c` settings made; c is YAML.

    Args:
        document: Plain values; not changed.
        settings: Such as "budget.latency=0.4x".
        where: What the document was read from, for messages.

    Returns:
        New plain values.

    Raises:
        UsageError: if the document is no mapping, a setting has no "=", or its key does not exist.
    """
    document = _mapping({} if document is None else document, where)
    changed: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in document.items()}
    plain = [f.name for f in fields(Recipe) if f.name not in _SECTIONS]
    allowed = [*plain, *(f"{section}.{name}" for section, names in _SECTIONS.items() for name in names)]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set needs KEY=VALUE, such as --set budget.latency=0.4x, got {setting!r}.")
        section, _, name = check(key.strip(), allowed, "--set has an unknown key").rpartition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {key}: the value {text!r} could not be read ({error}).") from error
        if section:
            changed[section] = {**_mapping(changed.get(section) or {}, f"{where}: {section}"), name: value}
        else:
            changed[name] = value
    return changed


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{where} must be a mapping (lines of 'key: value'), got {type(value).__name__} {value!r:.60}."
        )
    return value


def of_folder(folder: pathlib.Path) -> Recipe:
    """Return what an artifact's recipe says about its model and data; an empty recipe if it says nothing.

    Args:
        folder: The artifact, which may have been saved from Python with a recipe of another kind.
    """
    path = folder / FILE
    document = read(path) if path.is_file() else None
    known = ("model", "data", "task", "threads")
    kept = {k: v for k, v in document.items() if k in known} if isinstance(document, Mapping) else {}
    return build(kept, where=str(path))


def command(recipe: Recipe, folder: str | pathlib.Path, *, resume: bool = False) -> str:
    """Write the recipe as the command that runs it.

    Args:
        recipe: What to run.
        folder: Where the result goes.
        resume: Whether to continue.

    Returns:
        A line for a shell.
    """
    words = ["eke", "compress"]
    words += [recipe.model] if recipe.model else []
    words += ["--data", recipe.data] if recipe.data else []
    words += ["--task", recipe.task] if recipe.task else []
    for name, limit in recipe.budget.items():
        words += [f"--{name.replace('_', '-')}", str(limit)]
    for name in (name for name in RECOVERY if name in recipe.recovery):
        value = str(recipe.recovery[name])
        words += ["--steps", value] if name == "steps" else ["--set", f"recovery.{name}={value}"]
    words += ["--seed", str(recipe.seed)] if recipe.seed else []
    words += ["--threads", str(recipe.threads)] if recipe.threads is not None else []
    words += ["--seconds", str(recipe.seconds)] if recipe.seconds != Recipe.seconds else []
    for name in recipe.skip:
        words += ["--skip", name]
    return shlex.join([*words, "--out", str(folder), *(["--resume"] if resume else [])])
