"""Is a layer with few weights faster than a dense one, and from which sparsity on?

Question: linear layers with entries anywhere, as unstructured pruning leaves them, in float32: a three-layer network
1024-1024-1024-1024 with ReLU at several sparsities and batches; where the native kernel crosses over against the dense
product, batch by batch; masks with structure (rows that share their columns, rows and columns without entries);
convolutions with kernels of 1 x 1, 3 x 3 and 5 x 5; a training step.
Rivals: `nn.Linear`; torch's CSR matrices, the faster of `W @ x^T` with activations kept turned through the whole
network (turned once on the way in and once on the way out) and of CSR weights in `nn.functional.linear`; eke's
`SparseLinear` by its native kernel, and by the way it measured to be fastest ("auto").
Goals: three layers, 90 % sparse, batch 32, one thread: >= 3 times dense, >= 1.3 times CSR; at 70 % >= 1.0 times dense.
Gate: every rival agrees with the product in float64 to 1e-4 of the largest output.
Method: rivals interleaved, lower quartiles; time of the thread where there is one, wall time otherwise. The crossing is
found by bisection between sparsities at which each side was faster, to 1 %.

    python benchmarks/sparse_runtime.py [--threads 1] [--seconds 0.4] [--json benchmarks/results/sparse_runtime.json]
        [--crossings | --kernels] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels import clock, kept_memory, peak_rate
from kernels_rivals import interleaved
from torch import Tensor, nn

import eke
from eke.cost import environment
from eke.nn import SparseConv2d, SparseLinear
from eke.ops.sparse_matmul import describe

ROUNDED = 1e-4
GOALS = {
    "dense_over_eke_at_90_batch_32": 3.0,
    "csr_over_eke_at_90_batch_32": 1.3,
    "dense_over_eke_at_70_batch_32": 1.0,
}
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BATCHES = (1, 8, 32, 256, 2048)
LEAST = 0.05
"""Sparsity from which crossings are looked for."""


def random_mask(rows: int, columns: int, sparsity: float, *, block: int = 1) -> Tensor:
    """Entries anywhere; groups of `block` rows on the same columns."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(rows // block, columns, generator=generator) >= sparsity).repeat_interleave(block, 0)


def gate(outputs: dict[str, Tensor], expected: Tensor, case: str) -> float:
    """Stop unless every rival is right; return the largest error, relative to the largest output."""
    scale, worst = float(expected.abs().max()), 0.0
    for name, found in outputs.items():
        error = float((found.double() - expected).abs().max()) / scale
        worst = max(worst, error)
        if not error < ROUNDED:
            sys.exit(f"gate: {name} is off by {error:.1e} of the largest output at {case}")
    return worst


def masked(linears: list[nn.Linear], masks: list[Tensor]) -> nn.Sequential:
    """The dense network with zeros."""
    layers: list[nn.Module] = []
    for linear, mask in zip(linears, masks):
        layer = copy.deepcopy(linear)
        with torch.no_grad():
            layer.weight.mul_(mask)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def csr_runs(dense: nn.Sequential) -> dict[str, Callable[[Tensor], Tensor]]:
    """Compressed rows of torch, two ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layers = [(m.weight.detach().to_sparse_csr(), m.bias.detach()) for m in dense if isinstance(m, nn.Linear)]

    def turned(x: Tensor) -> Tensor:
        z = x.t().contiguous()
        for index, (weight, bias) in enumerate(layers):
            z = (weight @ z).add_(bias[:, None])
            if index + 1 < len(layers):
                z = z.relu_()
        return z.t().contiguous()

    def plain(x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(layers):
            x = nn.functional.linear(x, weight, bias)
            if index + 1 < len(layers):
                x = x.relu_()
        return x

    return {"turned": turned, "linear": plain}


def sparse_net(linears: list[nn.Linear], masks: list[Tensor], way: Any) -> nn.Sequential:
    """Layers of eke."""
    layers: list[nn.Module] = []
    for linear, mask in zip(linears, masks):
        layers += [SparseLinear.from_dense(linear, mask, way=way), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def network_case(size: int, sparsity: float, batch: int, *, depth: int, block: int, seconds: float) -> dict[str, Any]:
    """Time one network."""
    torch.manual_seed(0)
    linears = [nn.Linear(size, size) for _ in range(depth)]
    masks = [random_mask(size, size, sparsity, block=block) for _ in linears]
    x = torch.randn(batch, size)
    dense = masked(linears, masks)
    with torch.no_grad():
        expected = copy.deepcopy(dense).double()(x.double())
        nets = {"dense": dense, "eke": sparse_net(linears, masks, "native"), "auto": sparse_net(linears, masks, None)}
        runs: dict[str, Callable[[], Tensor]] = {name: (lambda net=net: net(x)) for name, net in nets.items()}
        ways = {name: (lambda run=run: run(x)) for name, run in csr_runs(dense).items()}
        short = interleaved(ways, 0.0, clock=clock)
        best = min(short, key=lambda name: short[name])
        runs["csr"] = ways[best]
        error = gate({name: run() for name, run in runs.items()}, expected, f"{sparsity} {batch}")
        timed = interleaved(runs, seconds, clock=clock)
    row = {
        "size": size, "layers": depth, "sparsity": sparsity, "batch": batch, "rows_that_share_columns": block,
        "microseconds": {name: round(value * 1e6, 1) for name, value in timed.items()}, "csr": best,
        "auto": nets["auto"][0].fastest(batch), "error": float(f"{error:.1e}"),
        "dense_over_eke": round(timed["dense"] / timed["eke"], 3),
        "csr_over_eke": round(timed["csr"] / timed["eke"], 3),
        "dense_over_auto": round(timed["dense"] / timed["auto"], 3),
        "eke_gflops": round(2 * batch * sum(int(m.sum()) for m in masks) / timed["eke"] / 1e9, 1),
    }  # fmt: skip
    print(
        f"batch {batch:5d} sparsity {sparsity:.2f} block {block}: dense {row['dense_over_eke']:6.2f} csr "
        f"{row['csr_over_eke']:5.2f} times as long as eke, auto ({row['auto']}) {row['dense_over_auto']:5.2f}; "
        f"{row['eke_gflops']} GF/s", flush=True,
    )  # fmt: skip
    return row


def crossing(size: int, batch: int, *, seconds: float) -> dict[str, Any]:
    """The sparsity from which on the native kernel takes less time than the dense layer."""
    torch.manual_seed(0)
    linear, x = nn.Linear(size, size), torch.randn(batch, size)

    def gain(sparsity: float) -> float:
        layer = SparseLinear.from_dense(linear, random_mask(size, size, sparsity), way="native")
        with torch.no_grad():
            timed = interleaved({"dense": lambda: linear(x), "eke": lambda: layer(x)}, seconds, clock=clock)
        return timed["dense"] / timed["eke"]

    # Not from 0 on: a full matrix has rows that share their columns, which is another question.
    low, high = LEAST, 0.99
    if gain(low) >= 1:
        print(f"batch {batch}: native is faster than dense at {low:.0%} sparsity already", flush=True)
        return {"batch": batch, "sparsity": low}
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) >= 1 else (middle, high)
    print(f"batch {batch}: native is faster than dense from {high:.0%} sparsity on", flush=True)
    return {"batch": batch, "sparsity": round(high, 3)}


def crossings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Crossings for every batch."""
    size, batches = (128, (32,)) if arguments.smoke else (1024, (1, 2, 4, 8, 16, *BATCHES[2:]))
    return [crossing(size, batch, seconds=arguments.seconds / 2) for batch in batches]


def compact_case(size: int, batch: int, *, seconds: float) -> dict[str, Any]:
    """Half of the rows and half of the columns keep everything, the rest nothing."""
    torch.manual_seed(0)
    linear, x = nn.Linear(size, size), torch.randn(batch, size)
    mask = torch.zeros(size, size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator)[: size // 2] for _ in range(2))
    mask[rows[:, None], columns] = True
    dense = masked([linear], [mask])
    ways = {way: SparseLinear.from_dense(linear, mask, way=way) for way in ("native", "csr", "compact")}
    auto = SparseLinear.from_dense(linear, mask)
    with torch.no_grad():
        expected = copy.deepcopy(dense).double()(x.double())
        runs = {name: (lambda net=net: net(x)) for name, net in {"dense": dense, **ways}.items()}
        gate({name: run() for name, run in runs.items()}, expected, "compact")
        timed = interleaved(runs, seconds, clock=clock)
        chosen = auto.fastest(batch)
    row = {
        "batch": batch, "microseconds": {name: round(v * 1e6, 1) for name, v in timed.items()}, "auto": chosen,
        "dense_over_compact": round(timed["dense"] / timed["compact"], 3),
    }  # fmt: skip
    print(f"half of rows and columns, batch {batch}: {row}", flush=True)
    return row


def convolution_case(
    channels: int, side: int, batch: int, *, seconds: float, kernel: int = 1, sparsity: float = 0.9
) -> dict[str, Any]:
    """A convolution in both memory formats, larger kernels by the native product."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    mask = random_mask(channels, channels * kernel**2, sparsity).view_as(conv.weight)
    layer = SparseConv2d.from_dense(conv, mask, way=None if kernel == 1 else "native")
    with torch.no_grad():
        conv.weight.mul_(mask)
    images = torch.randn(batch, channels, side, side)
    lasts = images.to(memory_format=torch.channels_last)
    conv_last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    with torch.no_grad():
        runs = {
            "dense, contiguous": lambda: conv(images), "dense, channels last": lambda: conv_last(lasts),
            "eke, contiguous": lambda: layer(images), "eke, channels last": lambda: layer(lasts),
        }  # fmt: skip
        gate({name: run() for name, run in runs.items()}, copy.deepcopy(conv).double()(images.double()), "convolution")
        timed = interleaved(runs, seconds, clock=clock)
    best = min(timed[name] for name in timed if name.startswith("dense"))
    row = {
        "kernel": kernel, "sparsity": sparsity, "channels": channels, "side": side, "batch": batch,
        "microseconds": {name: round(v * 1e6, 1) for name, v in timed.items()},
        "best_dense_over_eke": {
            name.partition(", ")[2]: round(best / timed[name], 3) for name in timed if name.startswith("eke")
        },
    }  # fmt: skip
    print(f"{kernel} x {kernel} convolution: {row}", flush=True)
    return row


def kernels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Convolutions with larger kernels: (kernel, channels, side, batch) as in residual nets."""
    shapes = [(3, 64, 32, 1), (3, 64, 32, 8), (3, 128, 16, 8), (3, 256, 8, 8), (3, 512, 4, 1), (3, 512, 4, 8)]
    shapes = [(3, 8, 6, 2)] if arguments.smoke else [*shapes, (5, 64, 16, 8)]
    return [
        convolution_case(c, side, n, kernel=k, sparsity=s, seconds=arguments.seconds)
        for k, c, side, n in shapes for s in ((0.9,) if arguments.smoke else (0.7, 0.8, 0.9, 0.95))
    ]  # fmt: skip


def training_case(size: int, sparsity: float, batch: int, *, seconds: float) -> dict[str, Any]:
    """Forward and both derivatives of one layer."""
    torch.manual_seed(0)
    linear, x = nn.Linear(size, size), torch.randn(batch, size, requires_grad=True)
    layer, grad = SparseLinear.from_dense(linear, random_mask(size, size, sparsity)), torch.randn(batch, size)

    def step(net: nn.Module) -> None:
        torch.autograd.grad(net(x), [x, *net.parameters()], grad)

    timed = interleaved({"dense": lambda: step(linear), "eke": lambda: step(layer)}, seconds, clock=clock)
    row = {
        "sparsity": sparsity, "batch": batch,
        "microseconds": {name: round(v * 1e6, 1) for name, v in timed.items()},
        "dense_over_eke": round(timed["dense"] / timed["eke"], 3),
    }  # fmt: skip
    print(f"forward and backward: {row}", flush=True)
    return row


def measured(threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run with so many threads."""
    torch.set_num_threads(threads)
    smoke, seconds = arguments.smoke, arguments.seconds
    size = 128 if smoke else 1024
    sparsities, batches = ((0.7, 0.9), (32,)) if smoke else (SPARSITIES, BATCHES)
    peak = max((rate for rate in (peak_rate() for _ in range(1 if smoke else 3)) if rate), default=None)
    print(f"{threads} thread(s), kernel {describe()}, peak {(peak or 0) * threads / 1e9:.0f} GF/s", flush=True)
    nets = [
        network_case(size, s, n, depth=3, block=1, seconds=seconds * (3 if n == 32 else 1))
        for n in batches for s in sparsities
    ]  # fmt: skip
    blocks = [network_case(size, s, 32, depth=3, block=4, seconds=seconds) for s in sparsities]
    at = {(row["sparsity"], row["batch"]): row for row in nets}
    summary = {
        "dense_over_eke_at_90_batch_32": at[0.9, 32]["dense_over_eke"],
        "csr_over_eke_at_90_batch_32": at[0.9, 32]["csr_over_eke"],
        "dense_over_eke_at_70_batch_32": at[0.7, 32]["dense_over_eke"],
        "crossings": crossings(arguments),
    }  # fmt: skip
    print(json.dumps(summary, indent=1), flush=True)
    return {
        "threads": threads, "clock": "thread" if threads == 1 else "wall", "kernel": describe(),
        "peak_gflops": peak and round(peak * threads / 1e9, 1), "summary": summary, "networks": nets,
        "rows_that_share_columns": blocks,
        "compact": [compact_case(size, n, seconds=seconds) for n in ((32,) if smoke else (1, 32, 256))],
        "convolutions": [
            convolution_case(c, s, n, seconds=seconds)
            for c, s, n in ([(32, 7, 2)] if smoke else [(256, 14, 1), (256, 14, 8), (512, 7, 8)])
        ],
        "kernels": kernels(arguments),
        "training": [
            training_case(size, s, n, seconds=seconds)
            for n in ((32,) if smoke else (32, 256)) for s in ((0.9,) if smoke else (0.7, 0.9, 0.98))
        ],
    }  # fmt: skip


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each case")
    parser.add_argument("--smoke", action="store_true", help="small sizes: seconds, no conclusions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crossings", action="store_true", help="measure them alone and put them into the file")
    parser.add_argument("--kernels", action="store_true", help="likewise larger kernels")
    arguments = parser.parse_args()
    kept_memory()
    if arguments.crossings or arguments.kernels:
        document = json.loads(arguments.json.read_text())
        for run in document["runs"]:
            torch.set_num_threads(run["threads"])
            if arguments.crossings:
                run["summary"]["crossings"] = crossings(arguments)
            if arguments.kernels:
                run["kernels"] = kernels(arguments)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        return
    runs = [measured(threads, arguments) for threads in arguments.threads]
    if arguments.json:
        document = {
            "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "goals": GOALS, "eke": eke.__version__,
            "environment": environment().to_json(), "settings": {"seconds": arguments.seconds}, "runs": runs,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
