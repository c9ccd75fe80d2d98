"""Is eke's linear attention as fast as ggml's operation at the same shapes?

Question: 8 heads, one position of 32 sequences (decoding) and whole sequences (reading a prompt), float32, one thread:
seconds of eke's kernel (no denominator, features given), of the same through `eke.ops.linear_attention`, and of
`ggml_gated_linear_attn`, the operation of ggml's CPU library for this family. ggml has none without gates: its gates
are ones, which costs it a multiplication.
Goal: >= 1.0 times ggml. Gate: both give the same outputs and states (1e-4 of the largest).
Method: ggml from the wheel libggml-python on PyPI (prebuilt), a graph of this one operation called through ctypes, as
eke's kernel is; memory for results is there before, and a state may be changed in place, as decoding does (ggml's
operation writes another one). In turns, time of the thread, median.

    pip download --no-deps libggml-python && unzip libggml_python*.whl -d FOLDER
    python benchmarks/linear_attention_ggml.py --ggml FOLDER/libggml/lib64 [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eke.cost import environment
from eke.ops import linear_attention
from eke.ops.linear_attention import native

HEADS = 8
ROOM = 64 << 20


class Parameters(ctypes.Structure):
    """What ggml_init takes."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The few functions of ggml that are needed.

    Args:
        folder: Of the libraries.
    """

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for library, name, result, takes in (
            (self.base, "ggml_init", pointer, (Parameters,)),
            (self.base, "ggml_free", None, (pointer,)),
            (self.base, "ggml_new_tensor_4d", pointer, (pointer, ctypes.c_int, number, number, number, number)),
            (self.base, "ggml_gated_linear_attn", pointer, (*(pointer,) * 6, ctypes.c_float)),
            (self.base, "ggml_new_graph", pointer, (pointer,)),
            (self.base, "ggml_build_forward_expand", None, (pointer, pointer)),
            (self.base, "ggml_get_data", pointer, (pointer,)),
            (self.cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, (pointer, pointer, ctypes.c_int)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, takes

    def instructions(self) -> list[str]:
        """Return what the library was built to use."""
        return [name for name in ("avx2", "avx512") if getattr(self.cpu, f"ggml_cpu_has_{name}")()]

    def run(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Callable[[], None], Callable[[], Any]]:
        """Return a call of the operation, and one that reads outputs (as v) and states (as state)."""
        batch, length, heads, size = v.shape
        context = self.base.ggml_init(Parameters(ROOM + 16 * (5 * v.numel() + 2 * state.numel()), None, False))
        tensors = []
        # ggml lists dimensions from the fastest on; positions of all sequences lie one after the other.
        for x in (k, v, q, torch.ones_like(q)):
            made = self.base.ggml_new_tensor_4d(context, 0, size, heads, batch * length, 1)
            ctypes.memmove(self.base.ggml_get_data(made), x.contiguous().data_ptr(), 4 * x.numel())
            tensors.append(made)
        made = self.base.ggml_new_tensor_4d(context, 0, size * size * heads, batch, 1, 1)
        ctypes.memmove(self.base.ggml_get_data(made), state.data_ptr(), 4 * state.numel())
        out = self.base.ggml_gated_linear_attn(context, *tensors, made, 1.0)
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, out)

        def compute() -> None:
            if self.cpu.ggml_graph_compute_with_ctx(context, graph, 1):
                sys.exit("ggml refused the graph")

        def read() -> tuple[Tensor, Tensor]:
            found = torch.empty(v.numel() + state.numel())
            ctypes.memmove(found.data_ptr(), self.base.ggml_get_data(out), 4 * found.numel())
            return found[: v.numel()].reshape(v.shape), found[v.numel() :].reshape(state.shape)

        return compute, read


def prepared(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], *, in_place: bool) -> Callable[[], None]:
    """Return a call of eke's kernel with memory for its results, as ggml's graph has it."""
    state = (state[0].clone(), state[1].clone())
    library, call = native.library(), native._call(q, k, v, *state, (native.MAPS["identity"], False))
    results = [
        torch.empty_like(v),
        v.new_empty(*q.shape[::2], q.shape[1]),
        *(state if in_place else map(torch.empty_like, state)),
    ]
    call.out, call.bottom, call.last_memory, call.last_keys = (x.data_ptr() for x in results)
    call.threads = 1
    held = (q, k, v, state, results)  # the kernel reads and writes there

    def run() -> None:
        if library.eke_attention(native.level(), False, ctypes.byref(call)) or not held:
            sys.exit("eke's kernel found no memory")

    return run


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of the thread's seconds a call, in turns; a sample fills two milliseconds with calls."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.thread_time()
        call()
        counts[name] = max(1, round(2e-3 / max(time.thread_time() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(counts[name]):
                call()
            times[name].append((time.thread_time() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def case(ggml: Ggml, batch: int, length: int, size: int, rounds: int) -> dict[str, Any]:
    """Gate and time one shape."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(batch, length, HEADS, size, generator=generator) - 0.3 for _ in range(3))
    state = torch.rand(batch, HEADS, size, size, generator=generator)
    keys = torch.zeros(batch, HEADS, size)

    def eke() -> Any:
        return linear_attention(
            q, k, v, causal=True, feature_map="identity", normalize=False, initial_state=(state, keys)
        )

    compute, read = ggml.run(q, k, v, state)
    compute()
    out, after = eke()
    for mine, other in zip((out, after.memory), read()):
        error = float((mine - other).abs().max())
        if not error < 1e-4 * float(mine.abs().max()):
            sys.exit(f"gate: {batch, length, size}: off by {error:.1e}")
    with torch.inference_mode():
        calls = {
            "eke": prepared(q, k, v, (state, keys), in_place=False),
            "eke in place": prepared(q, k, v, (state, keys), in_place=True), "eke from Python": eke, "ggml": compute,
        }  # fmt: skip
        found = timed(calls, rounds)
    gains = {name: found["ggml"] / took for name, took in found.items() if name != "ggml"}
    result = {"batch": batch, "length": length, "size": size, "seconds": found, "gains": gains}
    print(result, flush=True)
    return result


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, required=True, help="folder with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="short sequences: seconds, no conclusions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ggml = Ggml(arguments.ggml)
    rounds = 3 if arguments.smoke else 15
    lengths = (64,) if arguments.smoke else (128, 1024, 4096)
    shapes = [(b, 1, size) for b in (1, 32) for size in (32, 64)] + [(1, n, 64) for n in lengths]
    document = {
        "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "threads": 1, "kernel": native.describe(),
        "ggml instructions": ggml.instructions(), "environment": environment().to_json(),
        "cases": [case(ggml, *shape, rounds) for shape in shapes],
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
