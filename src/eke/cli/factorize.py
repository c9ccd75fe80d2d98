"""`eke factorize`: a matrix in a file as a product of Kronecker-sparse factors, with its error and bounds.

Chains are named here, and only here, by words: butterfly, mixed_radix, monarch:K, low_rank:R, or patterns such as
1,2,2,6/2,2,3,3/6,3,3,1, leftmost first; without one the best chain within a limit is chosen. The factors go into a
safetensors file under the names 0, 1, ..., leftmost first, complex ones as 0.real and 0.imag.
"""

from __future__ import annotations

import pathlib
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DebugOption, JsonOption, ThreadsOption
from .session import UsageError, emit, session

if TYPE_CHECKING:
    from torch import Tensor

    from ..linalg import Factorization
    from ..patterns import Chain

_WORDS = ("butterfly", "mixed_radix", "monarch", "low_rank")


class _Order(Enum):
    """Orders that have a name."""

    LEFT = "left"
    RIGHT = "right"
    BALANCED = "balanced"


def factorize(
    matrix: Annotated[pathlib.Path, typer.Argument(metavar="MATRIX.npy", help="A matrix as NumPy saves it.")],
    *,
    chain: Annotated[
        str | None,
        typer.Option(
            metavar="CHAIN",
            help="butterfly, mixed_radix, monarch:BLOCKS, low_rank:RANK or patterns 1,2,2,6/2,2,3,3/6,3,3,1.",
            show_default=False,
        ),
    ] = None,
    max_params: Annotated[
        int | None, typer.Option(min=1, help="Instead of a chain: the best one within it.", show_default=False)
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Instead of a chain: the smallest of this relative error.", show_default=False),
    ] = None,
    order: Annotated[_Order, typer.Option(help="In which order interfaces are split.")] = _Order.LEFT,
    refine: Annotated[int, typer.Option(min=0, help="Sweeps afterwards that can only lower the error.")] = 0,
    bit_reversal: Annotated[
        bool, typer.Option("--bit-reversal", help="Put the columns in the order of reversed digits first.")
    ] = False,
    out: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.safetensors", help="Write the factors.", show_default=False)
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Approximate a matrix by a product of Kronecker-sparse factors.

    Prints the relative error, measured; the bounds that are proved; parameters and operations beside those of the
    matrix.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        from .. import linalg
        from ..cost import pinned_threads

        if sum(given is not None for given in (chain, max_params, tolerance)) != 1:
            raise UsageError(
                "factorize needs one of --chain, --max-params and --tolerance, got "
                f"{chain!r}, {max_params} and {tolerance}."
            )
        with pinned_threads(threads):
            dense = _read(matrix)
            if bit_reversal:
                dense = dense[:, linalg.bit_reversal(dense.shape[1])]
            if chain is not None:
                patterns = chain_of(chain, (dense.shape[0], dense.shape[1]))
                found = linalg.factorize(dense, patterns, order=order.value, refine=refine)
                answer = _answer(found)
            else:
                choice = linalg.best_chain(dense, max_params=max_params, tolerance=tolerance)
                found = choice.factorization
                if order is not _Order.LEFT or refine:
                    found = linalg.factorize(dense, choice.chain, order=order.value, refine=refine)
                if tolerance is not None and found.error > tolerance:
                    raise ValueError(
                        f"The chain {choice.chain}, chosen from left to right, has an error of {found.error:.6g} with "
                        f"--order {order.value}, more than --tolerance {tolerance:g}; leave --order out."
                    )
                answer = _answer(found)
                answer["least_error"], answer["least_parameters"] = choice.least_error, choice.least_parameters
        if out is not None:
            _write(out, found.blocks)
    if as_json:
        emit(answer)
        return
    _draw(answer, found, out)


def chain_of(text: str, shape: tuple[int, int]) -> Chain:
    """Return the chain that a text names for matrices of a shape.

    Args:
        text: As described above.
        shape: (m, n).

    Returns:
        The chain.

    Raises:
        UsageError: if the text names none.
    """  # noqa: DOC501
    from .._errors import suggest
    from ..patterns import Chain, four

    word, colon, number = text.partition(":")
    if "," in text:
        try:
            return Chain([four(tuple(int(part) for part in factor.split(","))) for factor in text.split("/")])
        except ValueError as error:
            raise UsageError(f"--chain {text}: {error}") from error
    if word not in _WORDS:
        raise UsageError(f"--chain names no chain with {text!r}.{suggest(word, _WORDS)}")
    wants = word in ("monarch", "low_rank")
    if wants != bool(colon) or (wants and not number.isdigit()):
        example = f"{word}:4" if wants else word
        raise UsageError(f"--chain {word} is written {example}, got {text!r}.")
    try:
        if word == "butterfly" and shape[0] == shape[1]:
            return Chain.butterfly(shape[0])
        if word == "butterfly":
            raise ValueError(f"a butterfly is square, the matrix is {shape[0]} x {shape[1]}; use mixed_radix.")
        if word == "mixed_radix":
            return Chain.mixed_radix(*shape)
        return (Chain.monarch if word == "monarch" else Chain.low_rank)(*shape, int(number))
    except ValueError as error:
        raise UsageError(f"--chain {text}: {error}") from error


def _read(path: pathlib.Path) -> Tensor:
    """Return the matrix of a file, in double precision where it holds integers or float16."""  # noqa: DOC501
    import numpy as np
    import torch

    # Without pickle nothing in the file can run.
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path} is no file of numbers as numpy.save writes it; save the matrix again.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        shape = array.shape if isinstance(array, np.ndarray) else type(array).__name__
        raise UsageError(f"factorize needs a matrix (m, n) in {path}, got {shape}.")
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind in "iub" or (kind, size) == ("f", 2):
        return torch.from_numpy(array.astype(np.float64))
    if (kind, size) not in {("f", 4), ("f", 8), ("c", 8), ("c", 16)}:
        raise UsageError(
            f"factorize needs whole, real or complex numbers of up to 64 bits each in {path}, got {array.dtype}; "
            "save matrix.astype('float64') or matrix.astype('complex128')."
        )
    # The byte order of another machine becomes that of this one.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _write(path: pathlib.Path, blocks: list[Tensor]) -> None:
    from safetensors.torch import save

    from ..cost import write_bytes

    tensors = {}
    for i, block in enumerate(blocks):
        if block.is_complex():
            tensors[f"{i}.real"], tensors[f"{i}.imag"] = block.real.contiguous(), block.imag.contiguous()
        else:
            tensors[str(i)] = block
    write_bytes(path, save(tensors))


def _answer(found: Factorization) -> dict[str, Any]:
    rows, cols = found.chain.shape
    return {
        "shape": [rows, cols],
        "dtype": str(found.matrix.dtype).removeprefix("torch."),
        "chain": [list(pattern) for pattern in found.chain],
        "error": found.error,
        "lower_bound": found.lower_bound,
        "upper_bound": found.upper_bound,
        "parameters": found.parameters,
        "dense_parameters": rows * cols,
        "flops": found.chain.flops,
        "dense_flops": 2 * rows * cols,
    }


def _draw(answer: dict[str, Any], found: Factorization, out: pathlib.Path | None) -> None:
    rounded = ", up to rounding to 32 bits" if answer["dtype"] in ("float32", "complex64") else ""
    upper = "not proved for this order" if found.upper_bound is None else f"{found.upper_bound:.6g} (proved{rounded})"
    lines = {
        "matrix": f"{answer['shape'][0]} x {answer['shape'][1]} {answer['dtype']}",
        "chain": str(found.chain),
        "relative error": f"{found.error:.6g} (measured)",
        "lower bound": f"{found.lower_bound:.6g} (proved, for every product of this chain)",
        "upper bound": upper,
        "parameters": f"{found.parameters} of {answer['dense_parameters']}",
        "FLOPs a vector": f"{answer['flops']} of {answer['dense_flops']}",
    }
    if answer.get("least_error") is not None:
        lines["least error"] = f"{answer['least_error']:.6g} (proved, for every chain within the limit)"
    if answer.get("least_parameters") is not None:
        lines["least parameters"] = f"{answer['least_parameters']} (proved, for every chain of that tolerance)"
    for name, value in lines.items():
        typer.echo(f"{name:<16}{value}")
    if out is not None:
        typer.echo(str(out))
