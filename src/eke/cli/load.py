"""Models and data from what a person types: FILE.py:FUNCTION, a library's name (`sources`), or the demo.

A file is run as a module whose folder is on the import path, as if Python had been started with it; files that import
one another meet the same modules. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._errors import suggest
from . import sources
from .exported import is_exported
from .names import check_all
from .recipe import Recipe
from .session import MARK, UsageError

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Task

SPLITS = ("calibration", "selection", "report")


def resolve(spec: str, places: Sequence[pathlib.Path] = (pathlib.Path(),)) -> str:
    """Return a FILE.py:FUNCTION with the path at which the file was found; other forms as they are.

    Args:
        spec: As typed or as a recipe has it.
        places: Folders that a relative path may start from, in this order.

    Returns:
        The spec with a path that exists.

    Raises:
        FileNotFoundError: if the file is at none of them.
        UsageError: if the spec has no function.
    """
    if sources.is_named(spec):
        return sources.located(spec, places)
    file, colon, function = (spec, "", "") if is_exported(spec) else spec.rpartition(":")
    if not is_exported(spec) and not (colon and file and function):
        raise UsageError(
            f"Write FILE.py:FUNCTION, such as my_model.py:build, or torchvision:NAME, timm:NAME, hf:NAME; got {spec!r}."
        )
    for place in places:
        if (place / file).is_file():
            return f"{place / file}{colon}{function}"
    folder = (places[0] / file).parent
    near = suggest(pathlib.Path(file).name, [path.name for path in folder.glob("*.py")]) if folder.is_dir() else ""
    looked = ", ".join(str(place.absolute()) for place in places)
    raise FileNotFoundError(f"There is no file {file!r} (looked in {looked}).{near}")


def places(folder: pathlib.Path | None) -> tuple[pathlib.Path, ...]:
    """Return the folders that the paths of a recipe may start from: here, where the recipe is, and above that."""
    here = pathlib.Path()
    return (here,) if folder is None else (here, folder, folder.absolute().parent)


def call(spec: str) -> Any:
    """Run the function that a spec names; a model, a task or a dictionary stands for itself.

    Args:
        spec: FILE.py:FUNCTION, resolved.

    Returns:
        What the function returns. A model is a copy, so that the file's own stays as it is.

    Raises:
        UsageError: if the file has no such function.
        TypeError: if it needs arguments.
    """
    from torch import nn

    from ..compression import Task

    file, _, name = spec.rpartition(":")
    module = _module(pathlib.Path(file), spec)
    function = getattr(module, name, None)
    if isinstance(function, nn.Module):
        return copy.deepcopy(function)
    if isinstance(function, (Task, Mapping)):
        return function
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        found = "has no function" if function is None else f"has {type(function).__name__}, not a function,"
        raise UsageError(f"{file} {found} {name!r}.{suggest(name, own)}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TypeError(f"{spec} is called without arguments, but it needs some: {error}.") from error
    except ValueError:
        pass  # Some callables have no signature; calling them will tell.
    return function()


def _module(path: pathlib.Path, spec: str) -> ModuleType:
    """Return a file as a module that was run, once."""  # noqa: DOC501
    path = path.resolve()
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            vars(known).setdefault(MARK, spec)
            return known
        name = f"{path.stem} in {path.parent}"
        if name in sys.modules:
            return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    source = importlib.util.spec_from_file_location(name, path)
    if source is None or source.loader is None:
        raise UsageError(f"{path} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(source)
    vars(module)[MARK] = spec
    sys.modules[name] = module
    try:
        source.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_model(recipe: Recipe, *, folder: pathlib.Path | None = None) -> nn.Module:
    """Build the model of a recipe.

    Args:
        recipe: Names a model or the demo.
        folder: Where the recipe was read from.

    Returns:
        The model.

    Raises:
        UsageError: if the recipe names none.
        TypeError: if the function returns something else.
    """
    from torch import nn

    if recipe.task is not None:
        from ..demo import WITNESSES

        return WITNESSES[recipe.task].build()
    if recipe.model is None:
        raise UsageError(
            f"No model was given, got {recipe.model!r}: write FILE.py:FUNCTION (my_model.py:build) or --task demo."
        )
    spec = resolve(recipe.model, places(folder))
    if is_exported(spec):
        raise UsageError(
            f"{spec} is an exported program: its operations are fixed, sizes included, so nothing in it can be cut or "
            "replaced. Give what it was exported from, FILE.py:FUNCTION; eke inspect reads the program as it is."
        )
    model = sources.build(spec) if sources.is_named(spec) else call(spec)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def load_task(recipe: Recipe, *, folder: pathlib.Path | None = None) -> Task:
    """Load the data of a recipe.

    Args:
        recipe: Names data or the demo.
        folder: Where the recipe was read from.

    Returns:
        Data in three splits, with loss and score.

    Raises:
        UsageError: if the recipe names none.
        TypeError: if the function returns something else.
        ValueError: if a split can be read once only.
    """
    from ..compression import Task

    if recipe.task is not None:
        from ..demo import WITNESSES

        return WITNESSES[recipe.task].task()
    if recipe.data is None:
        raise UsageError(f"No data were given, got {recipe.data!r}: add --data FILE.py:FUNCTION (my_data.py:loaders).")
    if sources.is_named(recipe.data):
        raise UsageError(f"--data needs FILE.py:FUNCTION, got {recipe.data!r}.")
    spec = resolve(recipe.data, places(folder))
    data = call(spec)
    if isinstance(data, Mapping):
        allowed = [f.name for f in fields(Task)]
        check_all(data, allowed, f"{spec} returned an unknown key")
        if missing := [name for name in SPLITS if name not in data]:
            raise ValueError(f"{spec} returned no {' and no '.join(missing)}: all of {', '.join(SPLITS)} are needed.")
        data = Task(**data)
    if not isinstance(data, Task):
        raise TypeError(
            f"{spec} must return an eke.Task or a dictionary with {', '.join(SPLITS)}, got {type(data).__name__}."
        )
    for name in SPLITS:
        split = getattr(data, name)
        if isinstance(split, Iterator):
            raise ValueError(
                f"{spec}: {name} is an iterator ({type(split).__name__}) that is used up after one pass: "
                "return the DataLoader itself, or a list."
            )
    return data
