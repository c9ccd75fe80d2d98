"""Is causal linear attention on the CPU faster than what else computes it, and as exact?

Question: forward, and forward with derivatives, of eke's native kernel against plain chunked torch (the fastest of
chunks of 64, 128 and 256, in the layout that suits it), the C++ kernel of the paper's repository with its normaliser
(as its setup builds it, and with `-march=native`), and causal softmax attention (`scaled_dot_product_attention`); how
time grows with the length; and whether all members of the family agree with published reference functions.
Goals: >= 2 times plain chunked torch and >= 5 times the paper's C++, at lengths 4 096 and 16 384; >= 10 times softmax
attention at 16 384; time linear up to 100 000.
Gates: every rival agrees with the sum over all pairs in float64 (1e-5) before it is timed; with --oracles, the naive
functions of flash-linear-attention agree with eke's engine within 1e-5 of the largest output.
Method: 8 heads of 64, float32, rivals in turns, time of the thread, median and lower quartile. Features are given, so
that no rival pays for the map; one row shows eke with elu + 1 inside.

    python benchmarks/linear_attention.py [--paper-kernels "as shipped"=causal_product_cpu.so ...]
        [--oracles SITE_PACKAGES] [--seconds 3] [--json benchmarks/results/linear_attention.json] [--smoke]
"""

from __future__ import annotations

import argparse
import importlib.util
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

HEADS, SIZE = 8, 64
Runs = dict[str, Callable[[], Any]]


def module_from(path: Path, name: str) -> Any:
    """Import one file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} cannot be imported")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Chunked attention in torch: (batch, heads, length, size), the length a multiple of the chunk."""
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
    states, sums = (k.mT @ v).cumsum(2), k.sum(3).cumsum(2)
    inside = (q @ k.mT).tril_() if not q.requires_grad else (q @ k.mT).tril()
    before = torch.nn.functional.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    earlier = torch.nn.functional.pad(sums[:, :, :-1], (0, 0, 1, 0))
    top = inside @ v + q @ before
    bottom = inside.sum(-1) + (q @ earlier.unsqueeze(-1)).squeeze(-1)
    return (top / (bottom.unsqueeze(-1) + 1e-6)).flatten(2, 3)


def paper(kernel: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The paper's kernel with the normaliser of its repository, (batch, heads, length, size)."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.zeros_like(v)
            kernel.causal_dot_product(q, k, v, out)
            ctx.save_for_backward(q, k, v)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            q, k, v = ctx.saved_tensors
            found = [torch.zeros_like(x) for x in (q, k, v)]
            kernel.causal_dot_backward(q, k, v, grad.contiguous(), *found)
            return tuple(found)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bottom = torch.einsum("bhld,bhld->bhl", q, k.cumsum(2)) + 1e-6
        return Product.apply(q, k, v) / bottom.unsqueeze(-1)

    return run


def interleaved(runs: Runs, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of every run: in turns until the time is over, at least thrice."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(1e3 * (time.thread_time() - start))
    return {
        name: {"median": statistics.median(values), "quartile": sorted(values)[len(values) // 4], "runs": len(values)}
        for name, values in times.items()
    }


def gate(outputs: dict[str, Tensor], expected: Tensor) -> None:
    """Stop unless every rival is right."""
    for name, out in outputs.items():
        error = float((out.double() - expected).abs().max() / expected.abs().max())
        if not error < 1e-5:
            sys.exit(f"gate: {name} is off by {error:.1e}")


def case(length: int, kernels: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time one length."""
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(1, length, HEADS, SIZE, generator=generator) for _ in range(3)]
    q, k, v = (torch.nn.functional.elu(raw[0]) + 1, torch.nn.functional.elu(raw[1]) + 1, raw[2])
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    grad = torch.randn(1, length, HEADS, SIZE, generator=generator)
    turned_grad = grad.transpose(1, 2).contiguous()
    ways: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]] = {
        "eke": (lambda *x: linear_attention(*x, causal=True, feature_map="identity")[0], [q, k, v], grad),
        "eke, elu + 1 inside": (lambda *x: linear_attention(*x, causal=True)[0], raw, grad),
    }
    for chunk in (64, 128, 256):
        if length % chunk == 0:
            ways[f"torch, chunks of {chunk}"] = (lambda *x, c=chunk: plain(*x, c), turned, turned_grad)
    for name, kernel in kernels.items():
        ways[f"paper's C++, {name}"] = (paper(kernel), turned, turned_grad)
    small = [x[:, :256].double() for x in (q, k, v)]
    weights = torch.einsum("bihd,bjhd->bhij", *small[:2]).tril()
    expected = torch.einsum("bhij,bjhm->bihm", weights / (weights.sum(-1, keepdim=True) + 1e-6), small[2])
    forward: Runs = {name: (lambda way=way, x=x: way(*x)) for name, (way, x, _) in ways.items()}
    with torch.no_grad():
        out = {name: run() for name, run in forward.items()}
        gate({n: (o if n.startswith("eke") else o.transpose(1, 2))[:, :256] for n, o in out.items()}, expected)
        softmax = lambda: torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True)  # noqa: E731
        times = interleaved({**forward, "softmax attention": softmax}, seconds)
    both: Runs = {}
    for name, (way, x, g) in ways.items():
        leaves = [t.clone().requires_grad_() for t in x]
        both[name] = lambda way=way, leaves=leaves, g=g: torch.autograd.grad(way(*leaves), leaves, g)
    derivatives = interleaved(both, seconds)
    found = {"length": length, "forward": times, "forward and backward": derivatives}
    for what in ("forward", "forward and backward"):
        entry = found[what]
        best = min((n for n in entry if n.startswith("torch")), key=lambda n: entry[n]["median"])
        found[f"gains, {what}"] = {
            n: entry[n]["median"] / entry["eke"]["median"]
            for n in entry
            if n in {best, "softmax attention"} or n.startswith("paper")
        }
        print(length, what, {n: round(t["median"], 2) for n, t in entry.items()}, flush=True)
        print("   times slower than eke:", {n: round(g, 2) for n, g in found[f"gains, {what}"].items()}, flush=True)
    return found


def growth(lengths: list[int], seconds: float) -> list[dict[str, float]]:
    """Microseconds a position at several lengths."""
    found = []
    for length in lengths:
        q, k, v = (torch.randn(1, length, HEADS, SIZE) for _ in range(3))
        with torch.no_grad():
            run = lambda x=(q, k, v): linear_attention(*x, causal=True)  # noqa: E731
            median = interleaved({"eke": run}, seconds)["eke"]["median"]
        found.append({"length": length, "milliseconds": median, "microseconds_a_position": 1e3 * median / length})
    print("growth", [(g["length"], round(g["microseconds_a_position"], 3)) for g in found], flush=True)
    return found


def oracles(site: Path) -> dict[str, float]:
    """Largest differences to the naive functions of flash-linear-attention, relative to the largest output."""
    sys.path.insert(0, str(site))

    def naive(name: str) -> Any:
        return module_from(site / "fla" / "ops" / name / "naive.py", f"naive_{name}")

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 192, 4, 16) for _ in range(3))
    unit = torch.nn.functional.normalize(k, dim=-1)
    scalar, vector, beta = -torch.rand(2, 192, 4), -torch.rand(2, 192, 4, 16), torch.rand(2, 192, 4)
    f = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    scale = 16**-0.5

    def eke(*x: Tensor, **options: Any) -> Tensor:
        return linear_attention(*x, causal=True, feature_map=None, **options)[0]

    by_head = [x.transpose(1, 2) for x in (q, k, unit, v, beta)]
    retention = 1 - 2.0 ** -(5 + torch.arange(4.0))
    pairs = {
        "linear_attn, recurrent": (
            naive("linear_attn").naive_recurrent_linear_attn(*f, v, scale=1.0, normalize=True)[0],
            eke(*f, v, normalize=True),
        ),
        "linear_attn, chunks": (
            naive("linear_attn").naive_chunk_linear_attn(*f, v, scale=1.0, normalize=True),
            eke(*f, v, normalize=True),
        ),
        "retention": (
            naive("retention").naive_retention(by_head[0], by_head[1], by_head[3]).transpose(1, 2),
            scale * eke(q, k, v, decay=retention),
        ),
        "simple_gla": (
            naive("simple_gla").naive_recurrent_simple_gla(q, k, v, scalar)[0], scale * eke(q, k, v, decay=scalar.exp())
        ),
        "gla": (naive("gla").naive_recurrent_gla(q, k, v, vector)[0], scale * eke(q, k, v, decay=vector.exp())),
        "delta_rule": (
            naive("delta_rule").delta_rule_recurrence(by_head[0], *by_head[2:])[0].transpose(1, 2),
            scale * eke(q, unit, v, beta=beta),
        ),
        "gated_delta_rule": (
            naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, unit, v, beta, scalar)[0],
            scale * eke(q, unit, v, beta=beta, decay=scalar.exp()),
        ),
    }  # fmt: skip
    found = {}
    for name, (theirs, ours) in pairs.items():
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        found[name] = float((theirs - ours).abs().max() / theirs.abs().max())
        print(f"{name:24} {found[name]:.1e}", flush=True)
        if not found[name] < 1e-5:
            sys.exit(f"gate: {name} differs by {found[name]:.1e}")
    return found


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--paper-kernels",
        nargs="*",
        default=[],
        help="NAME=PATH of builds of causal_product_cpu, each under a module name of its own",
    )
    parser.add_argument(
        "--oracles", type=Path, help="folder into which flash-linear-attention and einops were installed"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each set of rivals")
    parser.add_argument("--smoke", action="store_true", help="one short length: seconds, no conclusions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    builds = [text.partition("=") for text in arguments.paper_kernels]
    kernels = {name: module_from(Path(path), Path(path).stem) for name, _, path in builds}
    differences = oracles(arguments.oracles) if arguments.oracles else None
    lengths = [256] if arguments.smoke else [1024, 4096, 16384]
    cases = [case(length, kernels, arguments.seconds) for length in lengths]
    longer = [512, 1024] if arguments.smoke else [1000, 10_000, 100_000]
    document = {
        "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "kernel": native.describe(),
        "environment": environment().to_json(), "heads": HEADS, "size": SIZE, "threads": 1,
        "differences_to_naive_functions": differences, "cases": cases, "growth": growth(longer, arguments.seconds),
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
