"""The names a newcomer meets, pinned: a change here is a change for every user."""

from __future__ import annotations

import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import eke

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [
    "compression", "cost", "curvature", "demo", "linalg", "nn", "ops", "optim", "patterns", "report", "search",
    "sites", "solvers", "sparsity", "structures", "unrolled",
]  # fmt: skip
NAMES = [
    "Budget", "Chain", "Counts", "KSPattern", "Result", "Task", "__version__", "best_chain", "compress",
    "enumerate_chains", "factorize", "front", "load", "survey",
]  # fmt: skip


def test_public_names_are_pinned():
    assert sorted(eke.__all__) == sorted(ROOMS + NAMES)
    assert dir(eke) == sorted(ROOMS + NAMES)


@pytest.mark.parametrize("name", ROOMS + NAMES)
def test_public_name_loads_and_is_documented(name):
    value = getattr(eke, name)
    if name != "__version__":
        assert inspect.getdoc(value)


@pytest.mark.parametrize("room", ROOMS)
def test_room_lists_what_it_offers(room):
    module = importlib.import_module(f"eke.{room}")
    assert module.__all__, f"eke.{room} needs an __all__"
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), f"eke.{room}.{name} needs a docstring"


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'compres'\. Did you mean 'compress'\?"):
        _ = eke.compres


def test_private_names_are_missing_without_advice():
    with pytest.raises(AttributeError, match=r"no attribute '__wrapped__'\.$"):
        _ = eke.__wrapped__


def test_names_promised_to_other_projects():
    """What issue trackers, notebooks and CI scripts will write."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    compress = inspect.signature(eke.compress).parameters
    assert list(compress)[:2] == ["model", "batches"]
    assert {"loss", "budget", "evaluate"} <= {
        n for n, p in compress.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert [p.kind for p in inspect.signature(eke.load).parameters.values()][:2] == [positional, positional]
    assert callable(eke.sites.find)
    assert next(iter(inspect.signature(eke.cost.flops).parameters)) == "model"
    assert "threads" in inspect.signature(eke.cost.compare_latency).parameters
    assert callable(eke.cost.stored_bytes)
    for attribute in ("model", "plan", "before", "after", "save"):
        assert hasattr(eke.Result, attribute) or attribute in eke.Result.__annotations__


def test_package_is_typed_and_its_version_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (Path(eke.__file__).parent / "py.typed").exists()
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "eke._version.__version__"
    assert f"version: {eke.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"[{eke.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
