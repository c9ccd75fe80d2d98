"""Does a Kronecker-sparse structure learn more than other small nets of the same measured latency?

Question: MLP-Mixers on Fashion-MNIST, trained from scratch, whose channel-mixing layers are dense, of low rank,
block-diagonal or Kronecker-sparse, each as wide as the same measured latency allows; three seeds.
Goal: the Kronecker-sparse net has the highest test accuracy, or the table says which has.
Gate: when all widths are chosen, latencies are measured again, interleaved: each within 5 % of the dense net's.
Rivals: the dense net (torch's own layers), and of every other family the best of several shapes in a pilot (one seed,
scored on 5 000 training images that no net is trained on), which also chooses the learning rate of each shape. All nets
share patches of 14 x 14 pixels, depth, expansion 4, dense token mixing, ReLU, initial values (`initial_std`), the last
layer of each branch zero at the start, Adam with `nn.param_groups`, a cosine schedule, images and their order. Low rank
and blocks run on eke's kernels too, so that the structure alone differs.
Method: latency of a batch of 128 by processor time of one thread, in turns with the dense net: medians of the ratios.

    python benchmarks/ks_structure.py --images FOLDER_WITH_IDX_FILES [--epochs 0.6] [--seeds 3]
        [--json benchmarks/results/ks_structure.json] [--smoke]
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eke import Chain
from eke.cost import environment
from eke.nn import KSLinear, initial_std, param_groups
from eke.ops.ks_matmul import describe

PATCH, TOKENS, DEPTH, EXPANSION, BATCH = 14, 4, 3, 4, 128
HELD_OUT, GATE = 5000, 0.05
RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Shape:
    """What a channel-mixing layer is made of.

    Args:
        family: Name in the table.
        factors: Of the weight.
        blocks: On the diagonal of a factor.
        share: Of the smaller side that the interface of two factors keeps.
    """

    family: str
    factors: int = 1
    blocks: int = 1
    share: float = 1.0

    def __str__(self) -> str:
        """Return the name of the shape."""
        return f"{self.family}, {self.factors} factor(s), {self.blocks} block(s), interface {self.share:g}"

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        """Return a new layer."""
        k = self.blocks
        high, wide, middle = outputs // k, inputs // k, max(1, round(self.share * min(inputs, outputs) / k)) * k
        if self.family == "dense":
            return nn.Linear(inputs, outputs)
        if self.factors == 2:
            return KSLinear(inputs, outputs, chain=Chain([(1, high, middle, k), (k, middle, wide, 1)]))
        # Interleaved on the way down: two layers together mix all channels.
        beside = self.family == "block-diagonal" or outputs > inputs
        return KSLinear(inputs, outputs, chain=Chain([(k, high, wide, 1) if beside else (1, high, wide, k)]))


SHAPES = (
    Shape("dense"),
    *(Shape("low rank", 2, 1, share) for share in (0.25, 0.125)),
    *(Shape("block-diagonal", 1, k) for k in (2, 4, 8)),
    *(Shape("Kronecker-sparse", 2, k, share) for k, share in ((4, 0.25), (8, 0.25), (4, 0.125), (8, 0.125))),
    *(Shape("Kronecker-sparse", 1, k) for k in (2, 4, 8)),
)


class Block(nn.Module):
    """Mix tokens, then channels, each added to what was there."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.ModuleList([nn.Linear(TOKENS, 2 * TOKENS), nn.Linear(2 * TOKENS, TOKENS)])
        self.up, self.down = shape.layer(width, EXPANSION * width), shape.layer(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, (batch, tokens, width)."""
        y = self.norms[0](x).transpose(1, 2)
        x = x + self.tokens[1](torch.relu(self.tokens[0](y))).transpose(1, 2)
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


class Mixer(nn.Module):
    """Patches to vectors, blocks, the mean over tokens, classes."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.blocks = nn.Sequential(*(Block(width, shape) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initial_std(module.in_features, module.out_features))
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.tokens[1].weight)
            if isinstance(block.down, KSLinear):
                block.down.zero_output_()
            else:
                nn.init.zeros_(block.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return classes (batch, 10) of patches (batch, tokens, pixels)."""
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


def read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Patches (n, tokens, pixels) and classes of one of the two files of Fashion-MNIST."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    x = (torch.from_numpy(pixels.astype(np.float32)) / 255 - 0.286) / 0.353
    x = x.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, TOKENS, PATCH * PATCH)
    return x.contiguous(), torch.from_numpy(classes)


def latencies(nets: dict[str, nn.Module], seconds: float) -> dict[str, float]:
    """Seconds of each net for a batch of 128: the median of its ratios to the first net, round by round, times that."""
    x = torch.randn(BATCH, TOKENS, PATCH * PATCH)
    samples: dict[str, list[float]] = {name: [] for name in nets}
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end or len(samples[next(iter(nets))]) < 7:
            for name, net in nets.items():
                net.eval()(x)  # untimed: no net pays for the caches that another one filled
                start = time.thread_time()
                net(x)
                samples[name].append(time.thread_time() - start)
    first = samples[next(iter(nets))]
    base = statistics.median(first)
    return {name: base * statistics.median(b / a for a, b in zip(first, found)) for name, found in samples.items()}


def widths(dense: int, shapes: Iterable[Shape], seconds: float) -> dict[Shape, int]:
    """The width of every shape whose latency is nearest to that of the dense net."""
    reference = Mixer(dense, SHAPES[0])
    found = {SHAPES[0]: dense}
    for shape in shapes:
        if shape == SHAPES[0]:
            continue
        step = max(8, shape.blocks)
        low, high = dense // step, 6 * dense // step
        while high - low > 1:
            middle = (low + high) // 2
            times = latencies({"dense": reference, "other": Mixer(middle * step, shape)}, seconds)
            low, high = (middle, high) if times["other"] <= times["dense"] else (low, middle)
        times = latencies({"dense": reference, **{str(w): Mixer(w * step, shape) for w in (low, high)}}, 2 * seconds)
        best = min((low, high), key=lambda w: abs(times[str(w)] - times["dense"]))
        found[shape] = best * step
        print(f"{shape!s:60} width {best * step:4} latency {times[str(best)] / times['dense']:.3f}", flush=True)
    return found


def settled(chosen: dict[Shape, int], seconds: float) -> tuple[dict[Shape, int], dict[str, float]]:
    """Widths and latencies, all measured together, after widths that are off were changed; some rounds at most."""
    found = dict(chosen)
    for _ in range(6):
        times = latencies({str(shape): Mixer(width, shape) for shape, width in found.items()}, seconds)
        ratios = {shape: times[str(shape)] / times[str(SHAPES[0])] for shape in found}
        off = {shape: ratio for shape, ratio in ratios.items() if abs(ratio - 1) > GATE}
        print({f"{shape}, width {found[shape]}": round(ratio, 3) for shape, ratio in ratios.items()}, flush=True)
        if not off:
            break
        for shape, ratio in off.items():
            step = 8 if ratio < 1 else -8
            # Time grows with the square of the width at most.
            found[shape] = max(found[shape] + step, 8 * round(found[shape] * ratio**-0.5 / 8), key=lambda w: w * step)
    return found, times


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right classes."""
    with torch.inference_mode():
        right = [(net(x).argmax(1) == y).sum() for x, y in zip(data[0].split(500), data[1].split(500))]
    return int(sum(right)) / len(data[1])


def train(
    shape: Shape, width: int, data: tuple[Tensor, Tensor], *, rate: float, steps: int, seed: int
) -> tuple[Mixer, dict[str, float]]:
    """Train a net; the images come in the same order for the same seed."""
    torch.manual_seed(seed)
    net = Mixer(width, shape).train()
    optimizer = torch.optim.Adam(param_groups(net, lr=rate), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start, queue = time.thread_time(), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(len(data[1]), generator=order)
        index, queue = queue[:BATCH], queue[BATCH:]
        loss = nn.functional.cross_entropy(net(data[0][index]), data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return net, {"train_loss": sum(last) / len(last), "train_seconds": time.thread_time() - start}


def pilot(
    chosen: dict[Shape, int], train_data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], steps: int
) -> list[dict[str, Any]]:
    """Score every shape and learning rate on held-out images."""
    rows = []
    for shape, width in chosen.items():
        for rate in RATES:
            net, found = train(shape, width, train_data, rate=rate, steps=steps, seed=100)
            rows.append({
                "shape": str(shape),
                "width": width,
                "rate": rate,
                "held_out": accuracy(net, held_out),
                **found,
            })
            print(f"pilot {shape!s:60} width {width:4} rate {rate:g}: held out {rows[-1]['held_out']:.4f}, "
                  f"loss {found['train_loss']:.4f}, {found['train_seconds']:.0f} s", flush=True)  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each family."""
    table = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        entry = {key: mine[0][key] for key in ("family", "shape", "width", "rate", "parameters", "latency")}
        for key in ("test", "train_loss", "train_seconds"):
            values = [row[key] for row in mine]
            entry[key] = statistics.mean(values)
            entry[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
        table.append(entry)
    return sorted(table, key=lambda entry: -entry["test"])


def main() -> None:
    """Choose widths and shapes, gate, train, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the four idx files, gzipped")
    parser.add_argument("--dense", type=int, default=256, help="width of the dense net")
    parser.add_argument("--epochs", type=float, default=0.6)
    parser.add_argument("--pilot", type=float, default=0.3, help="epochs of the pilot")
    parser.add_argument("--pilot-from", type=Path, help="take the pilot from the JSON of an earlier run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, no gate")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything, test = read(arguments.images, "train"), read(arguments.images, "t10k")
    train_data = everything[0][HELD_OUT:], everything[1][HELD_OUT:]
    held_out = everything[0][:HELD_OUT], everything[1][:HELD_OUT]
    epoch = 5 if arguments.smoke else len(train_data[1]) // BATCH
    seconds = 0.02 if arguments.smoke else 0.6
    if arguments.pilot_from:
        tried = json.loads(arguments.pilot_from.read_text())["pilot"]
    else:
        chosen = widths(arguments.dense, SHAPES, seconds)
        tried = pilot(chosen, train_data, held_out, round(arguments.pilot * epoch))
    best = {}
    for family in dict.fromkeys(shape.family for shape in SHAPES):
        mine = [row for row in tried if row["shape"].startswith(f"{family},")]
        row = max(mine, key=lambda row: row["held_out"])
        best[next(shape for shape in SHAPES if str(shape) == row["shape"])] = row
    final, times = settled({shape: row["width"] for shape, row in best.items()}, 0.1 if arguments.smoke else 15.0)
    reference = times[str(SHAPES[0])]
    off = {name: value / reference for name, value in times.items()}
    print(json.dumps({"latency against dense": off}, indent=1), flush=True)
    if not arguments.smoke and max(abs(value - 1) for value in off.values()) > GATE:
        sys.exit(f"gate: latencies differ by more than {GATE:.0%}: {off}")
    rows = []
    for seed in range(arguments.seeds):
        for shape, row in best.items():
            net, found = train(
                shape, final[shape], train_data, rate=row["rate"], steps=round(arguments.epochs * epoch), seed=seed
            )
            rows.append({
                "family": shape.family, "shape": str(shape), "width": final[shape], "rate": row["rate"], "seed": seed,
                "parameters": sum(p.numel() for p in net.parameters()), "latency": times[str(shape)],
                "test": accuracy(net.eval(), test), **found,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    table = summary(rows)
    for entry in table:
        print(f"{entry['shape']:60} width {entry['width']:4} {entry['parameters']:8} parameters "
              f"{1e3 * entry['latency']:.2f} ms, test {entry['test']:.4f} +- {entry['test_spread']:.4f}, loss "
              f"{entry['train_loss']:.4f}, training {entry['train_seconds']:.0f} s")  # fmt: skip
    if arguments.json:
        machine = {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version}
        document = {
            "question": __doc__.splitlines()[0], "machine": machine, "kernel": describe(), "smoke": arguments.smoke,
            "epochs": arguments.epochs, "latency_against_dense": off, "table": table, "runs": rows, "pilot": tried,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
