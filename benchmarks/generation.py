"""Is a linear transformer faster than a softmax one at generating on a CPU?

Question: eight layers, 256 wide, 8 heads, feed-forward 1 024, vocabulary 256, 3 072 tokens: seconds to generate them
with linear attention (a state), with softmax attention and a preallocated key-value cache, and with softmax attention
that reads the whole prefix again for every token.
Goals: >= 300 times recomputing; against the cache >= 3 times at batch 32, >= 1.5 times at batch 1.
Gates: token by token gives what the whole sequence gives, for both networks (1e-4).
Method: the same network, written once, in eager torch, float32; only attention differs. Random weights: speed does not
depend on them. Steps are timed in turns at 25 positions spread over the 3 072, recomputing at 6 lengths; totals are
integrals over positions (trapezoids). Time of the thread, median.

    python benchmarks/generation.py [--tokens 3072] [--json benchmarks/results/generation.json] [--smoke]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eke.cost import environment
from eke.nn import LinearAttention
from eke.ops.linear_attention import native

WIDTH, HEADS, DEPTH, INNER, VOCABULARY = 256, 8, 8, 1024, 256
REPEATS = 7


class Cached(nn.Module):
    """Softmax attention with keys and values in preallocated memory."""

    def __init__(self, batch: int, tokens: int) -> None:
        super().__init__()
        self.projections, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        shape = (batch, HEADS, tokens, WIDTH // HEADS)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor, at: int | None) -> Tensor:
        """Read a whole prefix (at None), or one token at a position."""
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.projections(x).chunk(3, -1))
        if at is not None:
            self.keys[:, :, at : at + 1], self.values[:, :, at : at + 1] = k, v
            k, v = self.keys[:, :, : at + 1], self.values[:, :, : at + 1]
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=at is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """Linear attention with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = LinearAttention(WIDTH, HEADS, causal=True)
        self.state: Any = None

    def forward(self, x: Tensor, at: int | None) -> Tensor:
        """Read a whole prefix (at None), or one token after those before."""
        y, self.state = self.attention(x, state=None if at is None or at == 0 else self.state)
        return y


class Network(nn.Module):
    """A transformer with either attention."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.attentions = nn.ModuleList(attentions)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * DEPTH))
        self.up = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(DEPTH))
        self.down = nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(DEPTH))

    def forward(self, tokens: Tensor, at: int | None = None) -> Tensor:
        """Return logits (batch, length, vocabulary)."""
        x = self.embedding(tokens)
        for i, attention in enumerate(self.attentions):
            x = x + attention(self.norms[2 * i](x), at)
            x = x + self.down[i](nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x)


def gate(name: str, net: Network, batch: int) -> None:
    """Stop unless token by token gives what the whole gives."""
    tokens = torch.randint(VOCABULARY, (batch, 40))
    whole = net(tokens)
    steps = torch.cat([net(tokens[:, t : t + 1], t) for t in range(40)], 1)
    error = float((whole - steps).abs().max())
    if not error < 1e-4:
        sys.exit(f"gate: {name} is off by {error:.1e}")


def seconds(run: Any) -> float:
    """Median of the thread's time."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def integral(points: list[tuple[int, float]]) -> float:
    """Sum over positions of what was measured at some of them."""
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(points))


def case(batch: int, tokens: int, *, recompute: bool) -> dict[str, Any]:
    """Time one batch."""
    nets = {
        "linear": Network([Recurrent() for _ in range(DEPTH)]).eval(),
        "cache": Network([Cached(batch, tokens) for _ in range(DEPTH)]).eval(),
    }
    found: dict[str, Any] = {"batch": batch, "tokens": tokens}
    with torch.inference_mode():
        for name, net in nets.items():
            gate(name, net, batch)
        token = torch.randint(VOCABULARY, (batch, 1))
        positions = [round(i * (tokens - 1) / 24) for i in range(25)]
        times: dict[str, list[tuple[int, float]]] = {name: [] for name in nets}
        for at in positions:
            for name, net in nets.items():
                # The linear network's state is that of the gate: its step does not know the position.
                times[name].append((at, seconds(lambda net=net, at=at, name=name: net(token, at or 1))))
        if recompute:
            lengths = [round(1 + i * (tokens - 1) / 5) for i in range(6)]
            prefix = torch.randint(VOCABULARY, (batch, tokens))
            times["recomputing"] = [(n, seconds(lambda n=n: nets["cache"](prefix[:, :n]))) for n in lengths]
    totals = {name: integral(points) for name, points in times.items()}
    found["seconds"] = totals
    found["tokens_per_second"] = {name: batch * tokens / total for name, total in totals.items()}
    found["times_faster"] = {name: total / totals["linear"] for name, total in totals.items() if name != "linear"}
    found["last_step_milliseconds"] = {name: 1e3 * points[-1][1] for name, points in times.items()}
    found["numbers_kept"] = {
        "linear": DEPTH * batch * (WIDTH * WIDTH // HEADS + WIDTH), "cache": DEPTH * batch * 2 * WIDTH * tokens,
    }  # fmt: skip
    print(json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--smoke", action="store_true", help="64 tokens: seconds, no conclusions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = 64 if arguments.smoke else arguments.tokens
    cases = [case(1, tokens, recompute=True), case(32, tokens, recompute=False)]
    document = {
        "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "kernel": native.describe(), "threads": 1,
        "environment": environment().to_json(), "cases": cases,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
