"""`eke solve`: sparse x with A x = b for every b in a file, with a solver that is chosen for the problem.

A.npy holds (m, n), or (batch, m, n) for one matrix a sample; b.npy holds (batch, m), or (m,) for one problem. The
answer says which solver ran and why, how far it came, and with a penalty how near the lasso's minimum it is: the
violation of the optimality conditions and the duality gap, both measured.
"""

from __future__ import annotations

import pathlib
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DebugOption, JsonOption, ThreadsOption
from .progress import shown
from .session import UsageError, emit, session

if TYPE_CHECKING:
    from torch import Tensor

    from ..unrolled import Solution
    from ..unrolled.auto import Choice


class _Solver(Enum):
    """Solvers that have a name here."""

    AUTO = "auto"
    EXACT = "exact"
    VAMP = "vamp"
    HTP = "htp"
    OMP = "omp"
    FISTA = "fista"
    ISTA = "ista"
    HYPERLISTA = "hyperlista"


def solve(
    matrix: Annotated[pathlib.Path, typer.Argument(metavar="A.npy", help="(m, n), or one matrix a sample.")],
    right: Annotated[pathlib.Path, typer.Argument(metavar="b.npy", help="(batch, m), or (m,) for one problem.")],
    *,
    solver: Annotated[_Solver, typer.Option(help="Which solver; auto tries and chooses.")] = _Solver.AUTO,
    penalty: Annotated[
        float | None, typer.Option(min=0.0, help="Solve the lasso with this weight of |x|_1.", show_default=False)
    ] = None,
    sparsity: Annotated[
        int | None, typer.Option(min=1, help="Number of nonzeros, if it is known.", show_default=False)
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="b has no noise: answers to rounding.")] = False,
    out: Annotated[
        pathlib.Path | None, typer.Option(metavar="x.npy", help="Write the answers.", show_default=False)
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Solve sparse linear problems b = A x, a whole batch at once.

    Prints which solver ran and why, and how near the optimum its answers are.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        import numpy as np

        from ..cost import pinned_threads

        if out is not None and not out.absolute().parent.is_dir():
            raise UsageError(f"--out {out}: there is no folder {out.parent}; make it first.")
        a, b = _read(matrix), _read(right)
        if a.ndim not in (2, 3) or b.ndim not in (1, 2):
            raise UsageError(
                f"solve needs A (m, n) or (batch, m, n) and b (batch, m) or (m,), got {tuple(a.shape)} in {matrix} and "
                f"{tuple(b.shape)} in {right}."
            )
        single = b.ndim == 1
        a, b = _alike(a, b[None] if single else b)
        with pinned_threads(threads), shown() as progress:
            progress("choose", 0.0, "which solver fits")
            choice = _choice(solver, a, b, penalty=penalty, sparsity=sparsity, exact=exact)
            name = type(choice.solver).__name__

            def tell(state: Any) -> None:
                text = (
                    f"{name}: step {state.iteration}, {state.running} of {state.batch} run, change {state.change:.1e}"
                )
                progress("solve", state.iteration / state.total, text)

            found = choice.solver.solve(b, tolerance=choice.tolerance, callback=tell)
            answer = _answer(a, b, found, choice, penalty)
        if out is not None:
            with out.open("wb") as file:
                np.save(file, (found.x[0] if single else found.x).numpy())
    if as_json:
        emit(answer)
        return
    for key, value in answer.items():
        typer.echo(f"{key.replace('_', ' '):<34}{value}")
    if out is not None:
        typer.echo(str(out))


def _choice(
    solver: _Solver, a: Tensor, b: Tensor, *, penalty: float | None, sparsity: int | None, exact: bool
) -> Choice:
    """Return the solver asked for.

    Args:
        solver: Its name.
        a: A.
        b: (batch, m).
        penalty: As given.
        sparsity: As given.
        exact: As given.

    Returns:
        The choice.

    Raises:
        UsageError: if it needs a number that is not given, or does not know what to do with one that is.
    """
    from .. import unrolled
    from ..unrolled.auto import Choice, choose

    if penalty is not None and sparsity is not None:
        raise UsageError(f"solve takes --penalty or --sparsity, got both: {penalty:g} and {sparsity}.")
    if solver is _Solver.AUTO:
        return choose(a, b, penalty=penalty, sparsity=sparsity, exact=exact)
    needs = {_Solver.FISTA: "penalty", _Solver.ISTA: "penalty", _Solver.HTP: "sparsity", _Solver.OMP: "sparsity"}
    given = "penalty" if penalty is not None else "sparsity" if sparsity is not None else None
    if given != needs.get(solver):
        wanted = f"--{needs[solver]}" if solver in needs else "neither --penalty nor --sparsity"
        raise UsageError(f"--solver {solver.value} takes {wanted}, got {f'--{given}' if given else 'neither'}.")
    asked = "asked for"
    if penalty is not None:
        lasso = unrolled.FISTA if solver is _Solver.FISTA else unrolled.ISTA
        return Choice(lasso(a, penalty=penalty, iterations=20_000), 1e-8, asked)
    if sparsity is not None and solver is _Solver.HTP:
        return Choice(unrolled.HTP(a, sparsity=sparsity), 0.0, asked)
    if sparsity is not None:
        return Choice(unrolled.OMP(a, sparsity=sparsity), 1e-6 if "32" in str(b.real.dtype) else 1e-12, asked)
    if solver is _Solver.EXACT:
        return Choice(unrolled.Exact(a), 0.0, asked)
    if solver is _Solver.VAMP:
        return Choice(unrolled.VAMP(a, iterations=20, polish=3 if exact else 0), None, asked)
    return Choice(unrolled.HyperLISTA(a), None, asked)


def _answer(a: Tensor, b: Tensor, found: Solution, choice: Choice, penalty: float | None) -> dict[str, Any]:
    import torch

    from ..unrolled.auto import optimality

    size = torch.linalg.vector_norm(b, dim=-1).clamp_min(torch.finfo(b.real.dtype).tiny)
    answer = {
        "solver": found.method,
        "reason": choice.reason,
        "problems": len(b),
        "shape": list(a.shape[-2:]),
        "iterations": [int(found.iterations.min()), int(found.iterations.max())],
        "converged": int(found.converged.sum()),
        "diverged": int(found.diverged.sum()),
        "nonzeros_mean": float((found.x != 0).sum(-1).double().mean()),
        "residual_over_b_median": float((found.residual / size).median()),
        "residual_over_b_worst": float((found.residual / size).max()),
    }
    if "noise_variance" in found.details:
        # message passing that settles on nonsense takes most of b for noise
        noise = (b.shape[1] * found.details["noise_variance"]).sqrt()
        answer["noise_over_b_worst"] = float((noise / size).max())
    if "settled" in found.details:
        answer["settled"] = int(found.details["settled"].sum())
    if penalty:
        near = optimality(a, b, found.x, penalty=penalty)
        answer["violation_over_penalty_worst"] = float(near.violation.max())
        answer["duality_gap_over_objective_worst"] = float((near.gap / near.objective.clamp_min(1e-300)).max())
    return answer


def _read(path: pathlib.Path) -> Tensor:
    """Return the numbers of a file, those of another size in double precision."""  # noqa: DOC501
    import zipfile

    import numpy as np
    import torch

    # Without pickle nothing in the file can run.
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no file of numbers as numpy.save writes it; save it again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iubfc":
        raise UsageError(
            f"solve needs an array of numbers in {path}, got {getattr(array, 'dtype', type(array).__name__)}."
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype not in ("f4", "f8", "c8", "c16"):
        native = native.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return torch.from_numpy(native)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their dtypes."""
    import torch

    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
