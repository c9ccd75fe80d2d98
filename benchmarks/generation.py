"""Is a linear transformer faster than a softmax one at generating on a CPU?

Question: eight layers, 256 wide, 8 heads, feed-forward 1 024, vocabulary 256, 3 072 tokens: seconds to generate them
with linear attention (a state), with softmax attention and a preallocated key-value cache, and with softmax attention
that reads the whole prefix again for every token.
Goals: >= 300 times recomputing; against the cache >= 3 times at batch 32, >= 1.5 times at batch 1.
Gates: token by token gives what the whole sequence gives, for every network and both ways (1e-4).
Method: the same network, written once, float32; only attention differs. Both attentions run as one native step for all
layers (`eke.ops.decode`: the same code but for attention) and in eager torch (preallocated cache and
scaled_dot_product_attention); recomputing is eager. Random weights: speed does not depend on them. Steps are timed in
turns at 25 positions spread over the 3 072, recomputing at 6 lengths; totals are integrals over positions (trapezoids).
One thread: time of the thread, median; more: wall time.

    python benchmarks/generation.py [--tokens 3072] [--threads 1] [--json benchmarks/results/generation.json] [--smoke]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eke.cost import environment
from eke.nn import TransformerBlock, fuse
from eke.ops.decode import KeyValues, native

WIDTH, HEADS, DEPTH, INNER, VOCABULARY = 256, 8, 8, 1024, 256
REPEATS = 7
KINDS = {"linear": "linear_attention", "cache": "full_attention"}


class Network(nn.Module):
    """A transformer with either attention.

    Args:
        kind: Of `KINDS`.
        batch: Sequences.
        tokens: Positions that the cache has room for.
    """

    def __init__(self, kind: str, batch: int, tokens: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(WIDTH, HEADS, inner=INNER, kind=KINDS[kind]) for _ in range(DEPTH))
        fused = fuse(self.blocks, last=self.norm, head=self.head)
        assert fused is not None
        self.step = fused.decoder
        self.fused = self.step.states(batch, capacity=tokens)
        self.eager: list[Any] = [KeyValues(s.keys, s.values) if isinstance(s, KeyValues) else None for s in self.fused]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, length, vocabulary) of whole prefixes."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))

    def by_native_step(self, token: Tensor, at: int) -> Tensor:
        """Return logits of one token behind `at` others, as one call; a state of linear attention just goes on."""
        for state in self.fused:
            if isinstance(state, KeyValues):
                state.filled = at
        return self.step(self.embedding(token[:, 0]), self.fused)[:, None]

    def by_eager_torch(self, token: Tensor, at: int) -> Tensor:
        """Return the same by torch's own operations, layer by layer."""
        x = self.embedding(token)
        for i, block in enumerate(self.blocks):
            room = self.eager[i]
            if isinstance(room, KeyValues):
                x, _ = block(x, keep=lambda k, v, room=room: kept(room, k, v, at))
            else:
                x, self.eager[i] = block(x, state=room if at else None)
        return self.head(self.norm(x))


def kept(room: KeyValues, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Write into preallocated memory and return what is seen."""
    room.keys[:, :, at : at + 1], room.values[:, :, at : at + 1] = k, v
    return room.keys[:, :, : at + 1], room.values[:, :, : at + 1]


def gate(name: str, net: Network, batch: int, length: int) -> None:
    """Stop unless token by token gives what the whole gives, both ways."""
    tokens = torch.randint(VOCABULARY, (batch, length))
    whole = net(tokens)
    for way in (net.by_native_step, net.by_eager_torch):
        steps = torch.cat([way(tokens[:, t : t + 1], t) for t in range(length)], 1)
        error = float((whole - steps).abs().max())
        if not error < 1e-4:
            sys.exit(f"gate: {name}, {way.__name__} is off by {error:.1e}")


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median by a clock."""
    run()
    times = []
    for _ in range(REPEATS):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def integral(points: list[tuple[int, float]]) -> float:
    """Sum over positions of what was measured at some of them."""
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(points))


def case(batch: int, tokens: int, *, recompute: bool, clock: Callable[[], float]) -> dict[str, Any]:
    """Time one batch."""
    nets = {name: Network(name, batch, tokens).eval() for name in KINDS}
    found: dict[str, Any] = {"batch": batch, "tokens": tokens}
    with torch.inference_mode():
        for name, net in nets.items():
            gate(name, net, batch, min(40, tokens))
        token = torch.randint(VOCABULARY, (batch, 1))
        ways = {name: net.by_native_step for name, net in nets.items()}
        ways |= {f"{name}, eager": net.by_eager_torch for name, net in nets.items()}
        times: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
        for i in range(25):
            at = round(i * (tokens - 1) / 24)
            for name, way in ways.items():
                times[name].append((at, seconds(lambda way=way, at=at: way(token, at), clock)))
        if recompute:
            lengths = [round(1 + i * (tokens - 1) / 5) for i in range(6)]
            prefix = torch.randint(VOCABULARY, (batch, tokens))
            times["recomputing"] = [(n, seconds(lambda n=n: nets["cache"](prefix[:, :n]), clock)) for n in lengths]
    totals = {name: integral(points) for name, points in times.items()}
    found["seconds"] = totals
    found["tokens_per_second"] = {name: batch * tokens / total for name, total in totals.items()}
    found["times_faster"] = {name: total / totals["linear"] for name, total in totals.items() if name != "linear"}
    found["first_step_milliseconds"] = {name: 1e3 * points[0][1] for name, points in times.items()}
    found["last_step_milliseconds"] = {name: 1e3 * points[-1][1] for name, points in times.items()}
    found["numbers_kept"] = {
        name: sum(x.numel() for state in net.fused for x in numbers(state)) for name, net in nets.items()
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def numbers(state: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a state."""
    return (state.keys, state.values) if isinstance(state, KeyValues) else tuple(state)


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="64 tokens: seconds, no conclusions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens = 64 if arguments.smoke else arguments.tokens
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    cases = [case(batch, tokens, recompute=batch == 1, clock=clock) for batch in (1, 32)]
    document = {
        "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "kernel": native.describe(),
        "threads": arguments.threads,
        "environment": environment().to_json(), "cases": cases,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
