"""Models by name: torchvision:NAME[:WEIGHTS], timm:NAME[:none] and hf:NAME_OR_FOLDER[:none].

Trained weights are the default; ":none" takes random ones, always the same, so that another process builds the same
model. The packages are extras and imported when one is asked for. Code that comes with weights is never run.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._errors import require
from .names import check
from .session import UsageError

if TYPE_CHECKING:
    from torch import nn

NONE = ":none"
_SEED = 0


def is_named(spec: str) -> bool:
    """Return whether a spec names a model of a library."""
    return spec.partition(":")[0] in _BUILDERS and ":" in spec


def located(spec: str, places: Sequence[pathlib.Path]) -> str:
    """Return a spec with the folder at which it was found; one that names no folder as it is.

    Args:
        spec: As typed or as a recipe has it.
        places: Folders that a relative path may start from, in this order.

    Returns:
        The spec.
    """
    library, _, name = spec.partition(":")
    if library != "hf":
        return spec
    bare = name.removesuffix(NONE)
    found = next((place / bare for place in places if (place / bare / "config.json").is_file()), None)
    return spec if found is None else f"hf:{found}{NONE if name.endswith(NONE) else ''}"


def build(spec: str) -> nn.Module:
    """Build the model that a spec names, in evaluation mode.

    Args:
        spec: With a prefix that `is_named` knows.

    Returns:
        The model.

    Raises:
        UsageError: if the library does not know the name.
        OSError: if trained weights cannot be fetched.
        MissingExtraError: if the library is not installed.
    """  # noqa: DOC502
    library, _, name = spec.partition(":")
    model: nn.Module = _BUILDERS[library](spec, name)
    return model.eval()


def _same_each_time(make: Callable[[], Any]) -> Any:
    """Return what is made with a fixed seed; the caller's generator stays where it is."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return make()


def _torchvision(spec: str, name: str) -> Any:
    name, _, weights = name.partition(":")
    models = require("torchvision.models", extra="vision", purpose=f"The model {spec!r}")
    check(name, models.list_models(), "torchvision has no model")
    weights = weights or "DEFAULT"
    if weights == "none":
        return _same_each_time(lambda: models.get_model(name, weights=None, **_untrained(name)))
    known = [*models.get_model_weights(name).__members__, "DEFAULT", "none"]
    chosen = check(weights, known, f"torchvision's {name} has no weights")
    try:
        return models.get_model(name, weights=chosen)
    except OSError as error:
        raise _unreachable(spec, f"torchvision:{name}:none takes random weights", error) from error


def _untrained(name: str) -> dict[str, Any]:
    """Return arguments without which torchvision warns, or fetches the trained weights of a part."""
    if name in {"inception_v3", "googlenet"}:
        return {"init_weights": True}
    return {"weights_backbone": None} if "rcnn" in name or name.startswith(_WITH_BACKBONE) else {}


_WITH_BACKBONE = ("fcos", "retinanet", "ssd", "deeplab", "fcn_", "lraspp")


def _timm(spec: str, name: str) -> Any:
    timm = require("timm", extra="vision", purpose=f"The model {spec!r}")
    if random := name.endswith(NONE):
        name = name.removesuffix(NONE)
    check(name.partition(".")[0], timm.list_models(), "timm has no model")
    if random:
        return _same_each_time(lambda: timm.create_model(name))
    trained = timm.list_models(pretrained=True)
    if name not in trained and not any(one.startswith(f"{name}.") for one in trained):
        raise UsageError(f"timm has no trained weights for {name!r}: timm:{name}:none takes random ones.")
    try:
        return timm.create_model(name, pretrained=True)
    except OSError as error:
        raise _unreachable(spec, f"timm:{name}:none takes random weights", error) from error


def _transformers(spec: str, name: str) -> Any:
    transformers = require("transformers", extra="hf", purpose=f"The model {spec!r}")
    if random := name.endswith(NONE):
        name = name.removesuffix(NONE)
    if not name:
        raise UsageError(f"Write hf:NAME or hf:FOLDER, such as hf:google-bert/bert-base-uncased, got {spec!r}.")
    config = _configuration(transformers, spec, name, random=random)
    # Keys and values kept for generation are no part of one forward pass, and no output to be proved.
    config.use_cache = False
    chosen = next((c for c in config.architectures or () if hasattr(transformers, c)), None)
    kind = getattr(transformers, chosen) if chosen else transformers.AutoModel
    if random:
        return _same_each_time(lambda: kind(config) if chosen else kind.from_config(config))
    import torch

    try:
        return kind.from_pretrained(name, config=config, dtype=torch.float32, trust_remote_code=False)
    except OSError as error:
        raise _unreachable(spec, f"hf:FOLDER reads a folder, hf:{name}:none takes random weights", error) from error


def _configuration(transformers: Any, spec: str, name: str, *, random: bool) -> Any:
    """Return the configuration of a folder, of a model on the hub, or of a kind of model."""  # noqa: DOC501
    kinds = transformers.CONFIG_MAPPING
    if random and name in kinds and not pathlib.Path(name, "config.json").is_file():
        return kinds[name]()
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        others = "hf:FOLDER reads a folder, and hf:KIND:none (bert, vit) builds a kind of model with random weights"
        raise _unreachable(spec, others, error) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(
            f"{spec} brings code of its own, which eke does not run: build the model in a file, FILE.py:FUNCTION."
        ) from error


def _unreachable(spec: str, instead: str, error: OSError) -> OSError:
    reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return OSError(
        f"{spec} could not be fetched ({reason}). That needs a network, or a cache that holds it; {instead}."
    )


_BUILDERS: dict[str, Callable[[str, str], Any]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}
