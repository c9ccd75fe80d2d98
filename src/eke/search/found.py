"""What a search found: trials, the best of them, the front, and the winner as a network with its recipe.

A folder with a winner holds `architecture.json` (space, architecture, costs, scores), `model.safetensors` (fresh
weights of the seed), `recipe.yaml` (how it was searched, how to train it) and `trials.jsonl`. `load` builds it again.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors.torch import load as read_safetensors
from torch import nn

from ..cost import write_bytes, write_tensors
from .pareto import pareto
from .proposals import Trial, fused
from .spaces import SPACES, Space
from .spaces.space import plain
from .subject import built

ARCHITECTURE, WEIGHTS, RECIPE, TRIALS = "architecture.json", "model.safetensors", "recipe.yaml", "trials.jsonl"

TRAINING = {
    "optimizer": "SGD, momentum 0.9, Nesterov",
    "learning_rate": "0.1 for a batch of 256, in proportion, cosine to 0",
    "weight_decay": 4e-5,
    "label_smoothing": 0.1,
    "note": "a plain start, not tuned here; the ZiCo paper adds distillation, mixup and AutoAugment over 480 epochs",
}
"""How to train a winner."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Args:
        space: Where it searched.
        trials: All that were scored, in order.
        settings: What the search was asked.
        note: Why it ended early, or nothing.
    """

    space: Space
    trials: tuple[Trial, ...]
    settings: Mapping[str, Any]
    note: str = ""

    @property
    def ranking(self) -> list[int]:
        """Places of the trials from the best to the worst; several scores are fused over all trials."""
        values = np.asarray(fused(self.trials))
        return [int(place) for place in np.argsort(-values, kind="stable")]

    @property
    def best(self) -> Trial:
        """The trial with the best score, or the best fusion of several."""
        return self.trials[self.ranking[0]]

    def front(self, *costs: str) -> list[Trial]:
        """Return the trials that no other one beats in score and costs, from cheap to dear.

        Args:
            *costs: Names of costs; FLOPs if none is given.

        Returns:
            The front.

        Raises:
            ValueError: if a cost was not measured for every trial.
        """
        names = costs or ("flops",)
        if missing := [name for name in names if any(name not in trial.costs for trial in self.trials)]:
            raise ValueError(f"These costs are not known of every trial: {missing}; known are {self._known}.")
        values = fused(self.trials)
        points = [
            [value if math.isfinite(value) else -1e300, *(-trial.costs[name] for name in names)]
            for value, trial in zip(values, self.trials)
        ]
        # of trials that are equal in all of this the first one stands for the others
        chosen = {tuple(points[place]): self.trials[place] for place in reversed(pareto(points))}
        return sorted(chosen.values(), key=lambda trial: trial.costs[names[0]])

    @property
    def _known(self) -> list[str]:
        return sorted(set.intersection(*(set(trial.costs) for trial in self.trials)))

    def model(self, *, seed: int = 0) -> nn.Module:
        """Return the winner with fresh weights.

        Args:
            seed: Of the weights.
        """
        return built(lambda: self.space.decode(self.best.architecture), seed)

    def save(self, folder: str | pathlib.Path, *, seed: int = 0) -> None:
        """Write the winner with its recipe.

        Args:
            folder: Made if it does not exist.
            seed: Of the weights.
        """
        import yaml

        place = pathlib.Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        best = self.best
        described = {
            **self.space.settings(),
            "architecture": best.architecture,
            "description": self.space.describe(best.architecture),
            "values": best.values,
            "costs": best.costs,
            "seed": seed,
        }
        write_bytes(place / ARCHITECTURE, (json.dumps(described, indent=1) + "\n").encode())
        write_tensors(place / WEIGHTS, self.model(seed=seed).state_dict(), {})
        recipe = {"search": json.loads(json.dumps(dict(self.settings))), "training": TRAINING}
        write_bytes(place / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode())
        write_bytes(place / TRIALS, "".join(line(trial) for trial in self.trials).encode())


def line(trial: Trial) -> str:
    """Return a trial as a line of JSON; scores that are not finite are words.

    Args:
        trial: What was found.
    """
    return json.dumps(asdict(trial) | {"values": {k: _written(v) for k, v in trial.values.items()}}) + "\n"


def parsed(text: str) -> Trial:
    """Return the trial of a line.

    Args:
        text: From `line`.
    """
    data = json.loads(text)
    values = {name: float(value) for name, value in data["values"].items()}
    return Trial(plain(data["architecture"]), values, data["costs"], data["proposals"], data["seconds"])


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def load(folder: str | pathlib.Path, *, space: Space | None = None) -> nn.Module:
    """Return the winner that a search saved, with its weights.

    Args:
        folder: Written by `Found.save`.
        space: Needed for spaces of the user's; the others are known by name.

    Returns:
        The network.

    Raises:
        FileNotFoundError: if there is no winner.
        ValueError: if its space has no name here and none is given.
    """  # noqa: DOC502
    place = pathlib.Path(folder)
    if not (place / ARCHITECTURE).is_file():
        raise FileNotFoundError(f"There is no {ARCHITECTURE} in '{place}'; give the folder of a search.")
    data = json.loads((place / ARCHITECTURE).read_text(encoding="utf-8"))
    if space is None:
        space = named(data)
    model = built(lambda: space.decode(plain(data["architecture"])), data["seed"])
    model.load_state_dict(read_safetensors((place / WEIGHTS).read_bytes()))
    return model


def named(data: Mapping[str, Any]) -> Space:
    """Return the space that settings describe.

    Args:
        data: "space" and the arguments of its class; other keys are passed over.

    Returns:
        The space.

    Raises:
        ValueError: if the name is not known.
    """
    kind = SPACES.get(data["space"])
    if kind is None:
        raise ValueError(f"The space {data['space']!r} is not one of {', '.join(SPACES)}; pass the object as `space=`.")
    keys: Sequence[str] = [name for name in kind.__dataclass_fields__ if name in data]  # type: ignore[attr-defined]
    return kind(**{name: plain(data[name]) for name in keys})
