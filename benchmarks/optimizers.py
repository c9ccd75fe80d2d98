"""How many steps and how much processor time does each optimizer need to a loss that tuned AdamW reaches?

Question: three workloads: a deep autoencoder (784-256-128-64-16 and back, ReLU, binary cross entropy summed over
pixels), a small convolutional net on Fashion-MNIST, a small transformer over the characters of `pydoc_data.topics`.
Goal: EKFAC has the best seconds on at least one, and at most a quarter of AdamW's steps on the autoencoder.
Gate: every optimizer lowers the loss of a small net on its first batch; the target is known before any rival runs.
Rivals: AdamW, SGD (torch), Muon (pytorch-optimizer, with AdamW for vectors, first and last layers), SOAP
(pytorch-optimizer), ScheduleFree AdamW (schedulefree), eigenvalue-corrected Shampoo (written here: basis by QR where
the factor is not diagonal in it, Eschenhagen et al. 2025) and K-FAC (eke's engine). Each has 8 settings (`trials`),
chosen with seed 100, and then three other seeds. All share data order, initial values, constant rates after 20 steps of
warm-up, no weight decay.
Method: the target is the median over seeds of AdamW's loss at 75 % of its steps; its setting is the one with the lowest
loss there. A rival's setting is the one that gets to the target of seed 100 in the fewest seconds; 10 % more,
the noise of the clock, count as equal, and the lower loss decides (where none does, the one with the lowest loss); a
trial ends when it has taken longer than the best. Runs end at the target, at AdamW's number of steps, or at twice
AdamW's seconds. Loss: on 500 training examples (64 windows of text) every 10 steps,
not timed. Seconds are those of the thread, one thread; `--costs` measures steps of all optimizers in turns.

    python benchmarks/optimizers.py --images FOLDER_WITH_IDX_FILES [--rivals FOLDER_OF_PACKAGES]
        [--json benchmarks/results/optimizers.json] [--only autoencoder] [--smoke]

Finished runs are kept in the JSON and not run again.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke.cost import environment
from eke.optim import EKFAC

EVERY, WARM_UP, TUNING, SEEDS, LONGEST, EQUAL = 10, 20, 100, (0, 1, 2), 2.0, 1.1


@dataclass(frozen=True)
class Workload:
    """A net, its data and its loss."""

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int

    def value(self, net: nn.Module) -> float:
        """Loss on the held examples."""
        with torch.no_grad():
            parts = [
                self.loss(net(x), y).item() * len(x) for x, y in zip(self.held[0].split(250), self.held[1].split(250))
            ]
        return sum(parts) / len(self.held[0])


def autoencoder() -> nn.Module:
    """784-256-128-64-16 and back."""
    sizes = [784, 256, 128, 64, 16, 64, 128, 256, 784]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Characters(nn.Module):
    """A decoder of two layers over characters."""

    def __init__(self, kinds: int, width: int = 96, length: int = 64) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(kinds, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, length, kinds) of what follows each character."""
        length = x.shape[1]
        h = self.table(x) + self.places(torch.arange(length).expand(len(x), length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Training images (60000, 784) in [0, 1] and classes."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels.astype(np.float32)) / 255, torch.from_numpy(classes)


def workloads(folder: Path) -> dict[str, Workload]:
    """The three of them."""
    x, y = images(folder)
    maps = ((x - 0.286) / 0.353).reshape(-1, 1, 28, 28)
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    kinds = sorted(set(text))
    code = {kind: number for number, kind in enumerate(kinds)}
    stream = torch.tensor([code[kind] for kind in text])

    def draw(inputs: Tensor, targets: Tensor, count: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
        def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            index = torch.randint(len(inputs), (count,), generator=generator)
            return inputs[index], targets[index]

        return batch

    windows = stream.unfold(0, 65, 1)
    fixed = torch.linspace(0, len(windows) - 1, 64).long()
    return {
        "autoencoder": Workload(
            autoencoder, draw(x, x, 128), (x[:500], x[:500]),
            lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(t), 800,
        ),
        "cnn": Workload(convolutional, draw(maps, y, 128), (maps[:500], y[:500]), F.cross_entropy, 200),
        "characters": Workload(
            lambda: Characters(len(kinds)), draw(windows[:, :-1], windows[:, 1:], 16),
            (windows[fixed, :-1], windows[fixed, 1:]), lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), 200,
        ),
    }  # fmt: skip


class Shampoo(torch.optim.Optimizer):
    """Second moments of mean gradients in the eigenbasis of E[G G^T] and E[G^T G]; momentum outside the basis.

    A basis is renewed, by one QR of the factor times itself, where the factor's part off the diagonal in it exceeds a
    share of its norm, looked at every 10 steps.
    """

    def __init__(self, params: Any, lr: float, beta: float, off: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "off": off, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step; the first one only sets the bases."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, beta, g = self.state[p], group["beta"], p.grad.reshape(p.shape[0], -1)
                pair = p.dim() > 1
                if not state:
                    state["t"], state["m"], state["v"] = 0, torch.zeros_like(g), torch.zeros_like(g)
                    if pair:
                        state["factors"] = [g @ g.T, g.T @ g]
                        # In float32 LAPACK fails on the factor of a first gradient of low rank.
                        state["bases"] = [torch.linalg.eigh(f.double())[1].flip(1).to(f) for f in state["factors"]]
                    continue
                state["t"] += 1
                if pair:
                    for factor, new in zip(state["factors"], (g @ g.T, g.T @ g)):
                        factor.lerp_(new, 1 - beta)
                    if state["t"] % 10 == 0:
                        self._renew(state, group["off"])
                left, right = state["bases"] if pair else (None, None)
                turned = left.T @ g @ right if pair else g
                state["m"].lerp_(g, 0.1)
                state["v"].lerp_(turned.square(), 1 - beta)
                m = left.T @ state["m"] @ right if pair else state["m"]
                root = (state["v"] / (1 - beta ** state["t"])).sqrt_().add_(group["eps"])
                step = m / (1 - 0.9 ** state["t"]) / root
                step = left @ step @ right.T if pair else step
                p.add_(step.reshape(p.shape), alpha=-group["lr"])

    @staticmethod
    def _renew(state: dict[str, Any], off: float) -> None:
        turns = []
        for number, factor in enumerate(state["factors"]):
            basis = state["bases"][number]
            inside = basis.T @ factor @ basis
            if (inside - inside.diagonal().diag()).norm() <= off * inside.norm():
                turns.append(torch.arange(len(factor)))
                continue
            order = inside.diagonal().argsort(descending=True)
            state["bases"][number] = torch.linalg.qr(factor @ basis[:, order])[0]
            turns.append(order)
        state["v"] = state["v"][turns[0]][:, turns[1]]


class Several:
    """Optimizers that step together."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        """Step all."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for part in self.parts:
            part.zero_grad()


def muon(net: nn.Module, lr: float, others: float) -> Any:
    """Muon for hidden matrices, AdamW for the rest, as its authors advise."""
    from pytorch_optimizer import Muon

    modules = [m for m in net.modules() if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.dim() > 1]
    outer = {id(modules[-1].weight)} | {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    if not any(isinstance(m, nn.Embedding) for m in modules):
        outer.add(id(modules[0].weight))
    inner = [p for p in net.parameters() if p.dim() > 1 and id(p) not in outer]
    known = {id(p) for p in inner}
    rest = [p for p in net.parameters() if id(p) not in known]
    groups = [{"params": inner, "lr": lr, "use_muon": True}, {"params": rest, "lr": others, "use_muon": False}]
    return Muon(groups, use_adjusted_lr=True, weight_decay=0.0, adamw_wd=0.0, adamw_lr=others)


def soap(net: nn.Module, lr: float, frequency: int) -> Any:
    """SOAP with its own defaults."""
    from pytorch_optimizer import SOAP

    return SOAP(net.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=frequency)


def schedule_free(net: nn.Module, lr: float, beta: float) -> Any:
    """ScheduleFree AdamW."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(net.parameters(), lr=lr, betas=(beta, 0.999), warmup_steps=WARM_UP)


def grid(make: Callable[..., Any], first: tuple[float, ...], second: tuple[float, ...]) -> list[tuple[Any, Any, Any]]:
    """Eight settings: (make, one number, another)."""
    found = [(make, a, b) for a in first for b in second]
    assert len(found) == 8
    return found


def ekfac(variant: Any) -> Callable[..., Any]:
    """EKFAC or K-FAC, the rest as it is by default (64 directions a side, tokens by the loss)."""

    def make(net: nn.Module, lr: float, damping: float) -> EKFAC:
        return EKFAC(net, lr=lr, damping=damping, variant=variant)

    return make


def trials() -> dict[str, list[tuple[Any, Any, Any]]]:
    """The settings of every optimizer."""
    adamw = lambda net, lr, beta: torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, beta), weight_decay=0.0)  # noqa: E731
    sgd = lambda net, lr, beta: torch.optim.SGD(net.parameters(), lr=lr, momentum=beta)  # noqa: E731
    shampoo = lambda net, lr, beta: Shampoo(net.parameters(), lr, beta)  # noqa: E731
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    return {
        "AdamW": grid(adamw, rates, (0.999, 0.95)),
        "EKFAC": grid(ekfac("ekfac"), (0.05, 0.1, 0.2, 0.3), (0.3, 1.0)),
        "EKFAC-ra": grid(ekfac("ekfac_ra"), (0.05, 0.1, 0.2, 0.3), (0.3, 1.0)),
        "Muon": grid(muon, (2e-3, 5e-3, 1e-2, 2e-2), (1e-3, 4e-3)),
        "ScheduleFree": grid(schedule_free, (2e-3, 5e-3, 1e-2, 2e-2), (0.9, 0.95)),
        "SOAP": grid(soap, (1e-3, 3e-3, 6e-3, 1.2e-2), (10, 50)),
        "Shampoo, corrected": grid(shampoo, rates, (0.95, 0.99)),
        "SGD": grid(sgd, (1e-4, 1e-3, 1e-2, 1e-1), (0.9, 0.99)),
        "K-FAC": grid(ekfac("kfac"), (0.05, 0.1, 0.2, 0.3), (0.3, 1.0)),
    }  # fmt: skip


def run(
    work: Workload, setting: tuple[Any, Any, Any], *, seed: int, target: float | None, longest: float
) -> dict[str, Any]:
    """Train; losses every 10 steps, and steps and seconds at the target, None if it was not reached."""
    torch.manual_seed(seed)
    net = work.make().train()
    order = torch.Generator().manual_seed(seed)
    make, one, two = setting
    optimizer = make(net, one, two)
    own_warm_up = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    rates = [group["lr"] for group in optimizer.param_groups]
    curve, seconds, reached = [], 0.0, None
    for step in range(1, work.steps + 1):
        x, y = work.batch(order)
        start = time.thread_time()
        if own_warm_up:
            optimizer.train()
        else:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * min(1.0, step / WARM_UP)
        optimizer.zero_grad()
        loss = work.loss(net(x), y)
        loss.backward()
        optimizer.step()
        seconds += time.thread_time() - start
        if step % EVERY:
            continue
        if own_warm_up:
            optimizer.eval()
        value = work.value(net.eval())
        net.train()
        curve.append(value if math.isfinite(value) else None)
        if target is not None and value <= target and reached is None:
            reached = (step, seconds)
            break
        if not math.isfinite(value) or seconds > longest:
            break
    best = min((v for v in curve if v is not None), default=None)
    return {
        "seed": seed, "setting": [one, two], "curve": curve, "seconds": seconds, "steps": len(curve) * EVERY,
        "best": best,
        "steps_to_target": reached and reached[0], "seconds_to_target": reached and reached[1],
    }  # fmt: skip


def gate(work: dict[str, Workload]) -> None:
    """Every optimizer's first setting lowers the loss of one batch within 30 steps."""
    one = work["cnn"]
    for name, settings in trials().items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Tanh(), nn.Linear(30, 10), nn.LayerNorm(10))
        x, y = one.batch(torch.Generator().manual_seed(0))
        optimizer = settings[0][0](net, *settings[0][1:])
        values = []
        for _ in range(30):
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        if not values[-1] < values[0]:
            sys.exit(f"gate: {name} does not lower the loss: {values[0]} to {values[-1]}")


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the fewest seconds to the target (of equal ones the lowest loss), else the lowest loss."""
    there = [r for r in runs if r["seconds_to_target"] is not None]
    if there:
        fewest = min(r["seconds_to_target"] for r in there)
        return min((r for r in there if r["seconds_to_target"] <= EQUAL * fewest), key=lambda r: r["curve"][-1])
    return min(runs, key=lambda r: math.inf if r["best"] is None else r["best"])


def at(entry: dict[str, Any], steps: int) -> float:
    """Loss of a whole run at a step."""
    curve = entry["curve"]
    value = curve[steps // EVERY - 1] if len(curve) >= steps // EVERY else None
    return math.inf if value is None else value


def race(name: str, work: Workload, kept: dict[str, Any], save: Callable[[], None]) -> dict[str, Any]:
    """All runs of a workload, AdamW's first, and their table."""
    document = kept.setdefault(name, {"runs": {}})
    runs: dict[str, Any] = document["runs"]
    mark = work.steps * 3 // 4 // EVERY * EVERY

    def done(key: str, setting: Any, **options: Any) -> dict[str, Any]:
        if key not in runs or runs[key]["setting"] != list(setting[1:]):
            runs[key] = run(work, setting, **options)
            found = runs[key]
            print(f"{name:12} {key:42} {found['setting']} best {found['best']} steps {found['steps_to_target']} "
                  f"seconds {found['seconds_to_target']} of {found['seconds']:.1f}", flush=True)  # fmt: skip
            save()
        return runs[key]

    settings = trials()
    tuned = [
        done(f"AdamW, trial {i}", s, seed=TUNING, target=None, longest=math.inf)
        for i, s in enumerate(settings["AdamW"])
    ]
    number = min(range(8), key=lambda i: at(tuned[i], mark))
    finals = [done(f"AdamW, seed {s}", settings["AdamW"][number], seed=s, target=None, longest=math.inf) for s in SEEDS]
    target = statistics.median(at(entry, mark) for entry in finals)
    aim = at(tuned[number], mark)
    longest = LONGEST * statistics.median(entry["seconds"] for entry in finals)
    document |= {"target": target, "target_of_tuning": aim, "steps": work.steps, "mark": mark, "longest": longest}
    rows = []
    for rival, options in settings.items():
        if rival == "AdamW":
            mine = []
            for entry in finals:
                first = next((i + 1 for i, v in enumerate(entry["curve"]) if v is not None and v <= target), None)
                steps = None if first is None else first * EVERY
                share = None if steps is None else entry["seconds"] * steps / entry["steps"]
                mine.append((steps, share))
        else:
            tried, shortest = [], longest
            for i, s in enumerate(options):
                tried.append(done(f"{rival}, trial {i}", s, seed=TUNING, target=aim, longest=shortest))
                shortest = min(shortest, tried[-1]["seconds_to_target"] or math.inf)
            number_here = tried.index(best_of(tried))
            mine = [
                (entry["steps_to_target"], entry["seconds_to_target"])
                for entry in (
                    done(f"{rival}, seed {s}", options[number_here], seed=s, target=target, longest=longest)
                    for s in SEEDS
                )
            ]
        chosen = settings[rival][number if rival == "AdamW" else number_here][1:]
        step_list = [math.inf if s is None else s for s, _ in mine]
        second_list = [math.inf if s is None else s for _, s in mine]
        rows.append({
            "optimizer": rival, "setting": list(chosen), "reached": sum(math.isfinite(s) for s in step_list),
            "steps": _number(statistics.median(step_list)), "steps_of_seeds": [s for s, _ in mine],
            "seconds": _number(statistics.median(second_list)), "seconds_of_seeds": [s for _, s in mine],
        })  # fmt: skip
        document["table"] = rows
        save()
    return document


def costs(work: Workload, settings: dict[str, list[int]], rounds: int) -> dict[str, float]:
    """Milliseconds a step of every optimizer with its chosen setting: medians of 50 steps each, in turns."""
    running = {}
    options = trials()
    for name, chosen in settings.items():
        torch.manual_seed(0)
        net = work.make().train()
        running[name] = (net, options[name][0][0](net, *chosen), torch.Generator().manual_seed(0))
    samples: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name, (net, optimizer, order) in running.items():
            if hasattr(optimizer, "train"):
                optimizer.train()
            start = time.thread_time()
            # A whole period of bases, so that each sample has its share of them.
            for _ in range(50):
                x, y = work.batch(order)
                optimizer.zero_grad()
                work.loss(net(x), y).backward()
                optimizer.step()
            if turn:
                samples[name].append((time.thread_time() - start) / 50)
    return {name: 1e3 * statistics.median(found) for name, found in samples.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    """Run what is not in the JSON yet and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the idx files, gzipped")
    parser.add_argument("--rivals", type=Path, help="folder with pytorch-optimizer and schedulefree")
    parser.add_argument("--only", choices=["autoencoder", "cnn", "characters"])
    parser.add_argument("--costs", type=int, default=0, help="only measure steps in turns, so many rounds")
    parser.add_argument("--smoke", action="store_true", help="20 steps of everything")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.rivals:
        sys.path.append(str(arguments.rivals))
    work = workloads(arguments.images)
    if arguments.smoke:
        work = {key: Workload(w.make, w.batch, w.held, w.loss, 20) for key, w in work.items()}
    gate(work)
    kept: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())["workloads"]
    machine = {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version}

    def save() -> None:
        if arguments.json:
            document = {
                "question": __doc__.splitlines()[0],
                "machine": machine,
                "smoke": arguments.smoke,
                "workloads": kept,
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")

    for name, entry in work.items():
        if arguments.costs and name in kept and arguments.only in (None, name):
            chosen = {row["optimizer"]: row["setting"] for row in kept[name]["table"]}
            kept[name]["milliseconds_a_step"] = costs(entry, chosen, arguments.costs)
            print(name, kept[name]["milliseconds_a_step"])
            save()
        elif arguments.only in (None, name):
            document = race(name, entry, kept, save)
            print(f"\n{name}: target {document['target']:.4f} (AdamW at {document['mark']} steps)")
            for row in sorted(document["table"], key=lambda r: r["seconds"] or math.inf):
                print(f"{row['optimizer']:20} {row['setting']!s:16} steps {row['steps']} seconds {row['seconds']} "
                      f"reached {row['reached']} of {len(SEEDS)}")  # fmt: skip


if __name__ == "__main__":
    main()
