"""Are transformer blocks of Kronecker-sparse layers faster end to end than dense ones?

Question: one block and a whole stack of twelve, of the size of ViT-S/16 (384 wide, 197 tokens) and of BERT-base (768
wide, 128 tokens), with the patterns of the paper (those of ViT-S/16; doubled for the wider block).
Goal: eke's layers faster than the dense block and than the same factors as batched products; ratios and density.
Gate: all rivals compute the same function: in float64 outputs agree to 1e-10 of the largest, in float32 to 1e-4.
Rivals: dense `nn.Linear` with query, key and value in one product; `torch.bmm` with entries prepared beforehand, each
factor in the fastest of the ways to write it. Norms,
attention (`scaled_dot_product_attention`) and GELU are the same modules in all.
Method: rivals in turns; for each round the ratio of their times; median and 10th to 90th percentile over rounds.
Processor time of the thread where there is one, wall time otherwise.
Source of the patterns: Gonon, Zheng, Carrivain, Le, "Fast inference with Kronecker-sparse matrices", 2024.

    python benchmarks/ks_networks.py [--threads 1] [--rounds 31] [--json benchmarks/results/ks_networks.json] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from kernels import clock
from kernels_rivals import fastest, ways
from torch import Tensor, nn

from eke import Chain
from eke.cost import environment
from eke.nn import KSLinear
from eke.ops.ks_matmul import describe

EXACT, ROUNDED = 1e-10, 1e-4


def chains(scale: int) -> dict[str, Chain]:
    """Factors of the layers of a block, leftmost first."""
    s = scale
    square = Chain([(1, 192 * s, 48 * s, 2), (2, 48 * s, 192 * s, 1)])
    return {
        "q": square, "k": square, "v": square, "out": square,
        "up": Chain([(1, 768 * s, 192 * s, 2), (6, 64 * s, 64 * s, 1)]),
        "down": Chain([(1, 128 * s, 128 * s, 3), (6, 64 * s, 256 * s, 1)]),
    }  # fmt: skip


class Block(nn.Module):
    """Attention and two layers, each behind a norm and added to what was there."""

    def __init__(self, width: int, heads: int, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.heads, self.layers = heads, nn.ModuleDict(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, (batch, tokens, width)."""
        n, tokens, width = x.shape
        y, layers = self.norms[0](x), self.layers
        parts = layers["qkv"](y).chunk(3, -1) if "qkv" in layers else [layers[name](y) for name in "qkv"]
        q, k, v = (part.reshape(n, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + layers["out"](mixed)
        return x + layers["down"](nn.functional.gelu(layers["up"](self.norms[1](x))))


@functools.cache
def variant(pattern: tuple[int, ...], rows: int) -> str:
    """The fastest way to write one factor as a batched product, for so many rows of float32."""
    a, _, c, d = pattern
    x, found = torch.randn(rows, a * c * d), ways(torch.randn(pattern), last=False, batch=rows, sparse=False)
    runs = {name: (lambda way=way: way[1](x, way[0])) for name, way in found.items() if name.startswith("bmm")}
    return fastest(runs, clock)["bmm"]


class Batched(nn.Module):
    """The factors of a layer as batched products: entries prepared beforehand, each in its fastest way."""

    def __init__(self, layer: KSLinear, rows: int) -> None:
        super().__init__()
        self.weights, self.products, self.bias = nn.ParameterList(), [], layer.bias
        for pattern, blocks in zip(reversed(list(layer.chain)), reversed(list(layer.factors))):
            found = ways(blocks.detach(), last=False, batch=rows, sparse=False)
            entries, product = found[variant(tuple(pattern), rows)]
            self.weights.append(nn.Parameter(entries, requires_grad=False))
            self.products.append(product)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension."""
        y = x.reshape(-1, x.shape[-1])
        for product, weight in zip(self.products, self.weights):
            y = product(y, weight)
        return y.view(*x.shape[:-1], -1) + self.bias


def dense(layers: list[KSLinear]) -> nn.Linear:
    """One linear layer with the weights of several stacked."""
    weight = torch.cat([layer.to_dense().detach() for layer in layers])
    found = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    found.weight.data, found.bias.data = weight.contiguous(), torch.cat([layer.bias.detach() for layer in layers])
    return found


def stacks(width: int, depth: int, rows: int) -> tuple[dict[str, nn.Module], float]:
    """The same stack of blocks with every rival's layers in float64, made for so many rows; the factors' density."""
    factors = chains(width // 384)
    found: dict[str, list[nn.Module]] = {"dense": [], "bmm": [], "eke": []}
    for _ in range(depth):
        layers = {name: KSLinear(c.shape[1], c.shape[0], chain=c) for name, c in factors.items()}
        for layer in layers.values():
            nn.init.normal_(layer.bias, std=0.1)
            layer.double().requires_grad_(False)
        block = Block(width, width // 64, dict(layers)).double()
        whole = {name: dense([layers[name]]) for name in ("out", "up", "down")}
        whole["qkv"] = dense([layers[name] for name in "qkv"])
        for name, parts in (
            ("eke", layers),
            ("bmm", {k: Batched(v, rows) for k, v in layers.items()}),
            ("dense", whole),
        ):
            rival = Block(width, width // 64, dict(parts))
            rival.norms = copy.deepcopy(block.norms)
            found[name].append(rival)
    share = sum(c.parameters for c in factors.values()) / sum(c.shape[0] * c.shape[1] for c in factors.values())
    return {name: nn.Sequential(*blocks).eval() for name, blocks in found.items()}, share


def gate(nets: dict[str, nn.Module], x: Tensor, limit: float) -> None:
    """Stop unless all rivals compute the same."""
    wanted = nets["dense"](x)
    for name, net in nets.items():
        error = float((net(x) - wanted).abs().max() / wanted.abs().max())
        if not error < limit:
            sys.exit(f"gate: {name} is off by {error:.1e} of the largest output in {x.dtype}")


def spread(values: list[float]) -> dict[str, float]:
    """Median and 10th to 90th percentile."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return {"median": statistics.median(ordered), "p10": low, "p90": high}


def case(name: str, width: int, tokens: int, *, batch: int, depth: int, rounds: int) -> dict[str, Any]:
    """Gate and time one size."""
    torch.manual_seed(0)
    nets, density = stacks(width, depth, batch * tokens)
    x = torch.randn(batch, tokens, width, dtype=torch.float64)
    with torch.inference_mode():
        gate(nets, x[:2], EXACT)
        nets, x = {rival: net.float() for rival, net in nets.items()}, x.float()
        gate(nets, x[:2], ROUNDED)
        samples: dict[str, list[float]] = {rival: [] for rival in nets}
        for turn in range(rounds + 1):
            for rival, net in nets.items():
                start = clock()
                net(x)
                if turn:
                    samples[rival].append(clock() - start)
    ratios = {
        rival: spread([other / own for other, own in zip(samples[rival], samples["eke"])]) for rival in ("dense", "bmm")
    }
    row = {
        "network": name, "width": width, "tokens": tokens, "batch": batch, "blocks": depth, "density": density,
        "rounds": rounds, "seconds": {rival: spread(times) for rival, times in samples.items()},
        "times_faster_than": ratios,
    }  # fmt: skip
    shown = {rival: f"{1e3 * statistics.median(times):.1f} ms" for rival, times in samples.items()}
    against = ", ".join(f"{r['median']:.2f} [{r['p10']:.2f}, {r['p90']:.2f}] x {n}" for n, r in ratios.items())
    print(f"{name:10} batch {batch:2}, {depth:2} block(s), density {density:.3f}: {shown} {against}", flush=True)
    return row


def main() -> None:
    """Measure all cases, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--smoke", action="store_true", help="one block, one sample, two rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = (("ViT-S/16", 384, 197), ("BERT-base", 768, 128))
    plan = [(1, 1)] if arguments.smoke else [(1, 1), (8, 1), (1, 12)]
    rows = [
        case(*size, batch=batch, depth=depth, rounds=2 if arguments.smoke else arguments.rounds)
        for size in sizes
        for batch, depth in plan
    ]
    if arguments.json:
        machine = {
            "cpu": environment().cpu, "threads": arguments.threads, "torch": torch.__version__, "python": sys.version,
            "clock": "processor time" if arguments.threads == 1 else "wall",
        }  # fmt: skip
        document = {
            "question": __doc__.splitlines()[0], "machine": machine, "kernel": describe(), "smoke": arguments.smoke,
            "patterns": {str(s): {n: str(c) for n, c in chains(s).items()} for s in (1, 2)}, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
