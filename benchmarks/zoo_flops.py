"""FLOPs of one model by eke and by three other counters, and why they differ, operation by operation.

Every counter is called as its manual says, on the same model and inputs. A difference is split into causes that were
read off the counters' own tables: what each counted for which operation. What no cause covers is `unexplained`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Counts = dict[str, int]

ATTENTION = ("scaled_dot_product", "native_multi_head_attention", "transformer_encoder_layer")
CONVOLUTION = ("conv",)
RECURRENT = ("rnn", "lstm", "gru")


def classes(by_operation: Counts) -> Counts:
    """Sum counts over operations into convolution, attention, recurrent and matrix."""
    found: Counts = defaultdict(int)
    for name, count in by_operation.items():
        if any(word in name for word in ATTENTION):
            found["attention"] += count
        elif any(word in name for word in CONVOLUTION):
            found["convolution"] += count
        elif any(word in name for word in RECURRENT):
            found["recurrent"] += count
        else:
            found["matrix"] += count
    return dict(found)


def by_eke(model: nn.Module, inputs: tuple[Any, ...]) -> Counts:
    """Return eke's FLOPs by operation."""
    from eke.cost.flops import _counted

    return {str(op): int(n) for op, n in _counted(model, inputs).get_flop_counts().get("Global", {}).items()}


class _Names(TorchDispatchMode):
    """Note which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def by_torch(model: nn.Module, call: Callable[[], Any]) -> tuple[Counts, set[str]]:
    """Return what torch.utils.flop_counter counts by operation, and the operations that ran."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    with torch.no_grad(), _Names() as ran:
        call()
    return {str(op): int(n) for op, n in counter.get_flop_counts().get("Global", {}).items()}, ran.names


def by_fvcore(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Counts, list[str]]:
    """Return what fvcore counts by operation (multiply-adds), and the operations that it has no formula for."""
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with torch.no_grad():
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = {name: int(n) for name, n in analysis.by_operator().items()}
    return counts, sorted(analysis.unsupported_ops())


DROPPED = "layers inside a module that has a formula of its own are dropped"


def by_ptflops(model: nn.Module, inputs: Any) -> Counts:
    """Return what ptflops counts with its default settings (multiply-adds), by the module or function that it saw.

    Its tables are wrapped, so that each entry notes what it adds; the total is the one that it returns.
    """
    from ptflops import get_model_complexity_info, pytorch_ops

    found: Counts = defaultdict(int)

    def noted_module(kind: type[nn.Module], hook: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(module: Any, given: Any, output: Any) -> None:
            before = module.__flops__
            hook(module, given, output)
            found[f"nn.{kind.__name__}"] += int(module.__flops__ - before)

        return wrapped

    def noted_function(function: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count = hook(*args, **kwargs)
            found[getattr(function, "__qualname__", str(function))] += int(count)
            return count

        return wrapped

    modules = {kind: noted_module(kind, hook) for kind, hook in pytorch_ops.MODULES_MAPPING.items()}
    tables = (pytorch_ops.FUNCTIONAL_MAPPING, pytorch_ops.TENSOR_OPS_MAPPING)
    before = [dict(table) for table in tables]
    for table in tables:
        for function, hook in list(table.items()):
            table[function] = noted_function(function, hook)
    said = io.StringIO()
    try:
        with torch.no_grad(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            total, _ = get_model_complexity_info(
                model, (1,), input_constructor=lambda _: inputs, as_strings=False, print_per_layer_stat=False,
                custom_modules_hooks=modules, ost=said,
            )  # fmt: skip
    finally:
        for table, original in zip(tables, before):
            table.update(original)
    if total is None:
        raise RuntimeError(said.getvalue().strip().splitlines()[-1][:300] if said.getvalue() else "it returned nothing")
    found[DROPPED] = int(total) - sum(found.values())
    return dict(found)


def _batch(inputs: Any) -> int:
    return next((int(leaf.shape[0]) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 1)


FUSED = "inside the fused nn.MultiheadAttention or encoder layer, which has no formula"


def explain_torch(eke: Counts, torch_: Counts, ran: set[str]) -> Counts:
    """Split eke - torch by kind of product: what one has a formula for and the other has none."""
    if any(word in name for name in ran for word in ATTENTION[1:]):
        return {FUSED: sum(eke.values()) - sum(torch_.values())}
    own, theirs = classes(eke), classes(torch_)
    causes: Counts = {}
    for kind in sorted({*own, *theirs}):
        if difference := own.get(kind, 0) - theirs.get(kind, 0):
            missing = ", ".join(sorted({*eke} ^ {*torch_}))
            causes[f"no formula for {kind} ({missing})" if missing else f"unexplained {kind}"] = difference
    return causes


_FV_PRODUCTS = {"conv": "convolution", "linear": "matrix", "addmm": "matrix", "matmul": "matrix", "bmm": "matrix",
                "mm": "matrix", "einsum": "matrix", "lstm": "recurrent", "gru": "recurrent"}  # fmt: skip


def explain_fvcore(eke: Counts, fvcore: Counts, unsupported: list[str]) -> Counts:
    """Split eke - fvcore: the factor 2, operations without formula, additions and norms that fvcore counts."""
    own, theirs = classes(eke), defaultdict(int)
    elementwise = 0
    for name, count in fvcore.items():
        if name in _FV_PRODUCTS:
            theirs[_FV_PRODUCTS[name]] += count
        else:
            elementwise += count
    causes = {
        "a multiply-add counts 1": sum(theirs.values()),
        "norms, pooling, resizing are counted": -elementwise,
    }
    fused = any(word in name for name in unsupported for word in ATTENTION[1:])
    for kind in sorted({*own, *theirs}):
        if rest := own.get(kind, 0) - 2 * theirs[kind]:
            missing = [op for op in unsupported if _belongs(op, kind)]
            if kind == "matrix" and not missing:  # attention that torch computed by matrix products
                kind, missing = "attention", [op for op in unsupported if _belongs(op, "attention")]
            cause = f"no formula for {kind} ({', '.join(missing)})" if missing and rest > 0 else f"unexplained {kind}"
            if (missing == [] or rest < 0) and 0 < abs(rest) <= 2e-3 * fvcore.get("einsum", 0):
                cause = "einsum is read off numpy's report, which has four digits"
            cause = FUSED if fused and kind in ("attention", "matrix") and rest > 0 else cause
            causes[cause] = causes.get(cause, 0) + rest
    return {cause: count for cause, count in causes.items() if count}


def _belongs(operation: str, kind: str) -> bool:
    words = {"attention": ATTENTION, "convolution": CONVOLUTION, "recurrent": RECURRENT}
    if kind == "matrix":
        return bool(re.search(r"mm|matmul|einsum|linear|dot|baddbmm|cdist", operation)) and not _belongs(
            operation, "attention"
        )
    return any(word in operation for word in words[kind])


_PT_MATRIX = ("matmul", "mm", "bmm", "addmm", "baddbmm")


def explain_ptflops(eke: Counts, ptflops: Counts) -> Counts:
    """Split eke - ptflops: the factor 2, biases, layers seen twice or not at all, elementwise work."""
    own, theirs = classes(eke), defaultdict(int)
    for name, count in ptflops.items():
        short = name.rpartition(".")[2]
        if name.startswith("nn.Conv") or "Conv" in name:
            theirs["convolution"] += count
        elif name == "nn.Linear":
            theirs["linear modules"] += count
        elif name == "linear":
            theirs["linear functions"] += count
        elif short in _PT_MATRIX:
            theirs["products"] += count
        elif name in ("nn.MultiheadAttention", "nn.Attention"):
            theirs["attention"] += count
        elif any(name.startswith(f"nn.{kind}") for kind in ("RNN", "LSTM", "GRU")):
            theirs["recurrent"] += count
        elif name != DROPPED:
            theirs["elementwise"] += count
    twice = min(theirs["linear modules"], theirs["linear functions"])
    seen = sum(theirs.values()) - theirs["elementwise"] - twice
    causes = {
        "a multiply-add counts 1": seen,
        "elementwise work, norms and pooling are counted": -theirs["elementwise"],
        DROPPED: -ptflops.get(DROPPED, 0),
        "linear layers are counted twice (module and function)": -twice,
        "convolutions: biases are counted, functions and subclasses are not": own.get("convolution", 0)
        - 2 * theirs["convolution"],
        "attention and other products are not seen where a fused or unlisted function computes them": (
            sum(own.values()) - own.get("convolution", 0) - 2 * (seen - theirs["convolution"])
        ),
    }
    return {cause: count for cause, count in causes.items() if count}


def compared(model: nn.Module, arguments: Any) -> dict[str, Any]:
    """Count with every counter that is installed.

    Args:
        model: In evaluation mode.
        arguments: A tuple of positional inputs, or a dictionary.

    Returns:
        FLOPs or multiply-adds as each counter gives them, errors, and causes of the differences.
    """
    positional = (arguments,) if isinstance(arguments, dict) else arguments
    eke = by_eke(model, positional)
    row: dict[str, Any] = {"eke": sum(eke.values()), "by_class": classes(eke), "causes": {}, "errors": {}}

    def run() -> Any:
        return model(**arguments) if isinstance(arguments, dict) else model(*arguments)

    def attempt(name: str, work: Callable[[], tuple[int, Counts]]) -> None:
        try:
            row[name], row["causes"][name] = work()
        except ImportError:
            row[name] = None
        except Exception as error:
            row[name] = None
            row["errors"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def torch_() -> tuple[int, Counts]:
        theirs, ran = by_torch(model, run)
        return sum(theirs.values()), explain_torch(eke, theirs, ran)

    def fvcore() -> tuple[int, Counts]:
        given = tuple(arguments.values()) if isinstance(arguments, dict) else arguments
        theirs, unsupported = by_fvcore(model, given)
        return sum(theirs.values()), explain_fvcore(eke, theirs, unsupported)

    def ptflops() -> tuple[int, Counts]:
        if isinstance(arguments, dict):
            given: Any = arguments
        else:
            given = arguments[0]
        theirs = by_ptflops(model, given)
        return sum(theirs.values()), explain_ptflops(eke, theirs)

    attempt("torch", torch_)
    attempt("fvcore", fvcore)
    attempt("ptflops", ptflops)
    if _batch(arguments) != 1:
        row["errors"]["ptflops"] = "divides by the batch size"
    return row
