"""Does attention sampling classify megapixel images as well as a network that sees all of them, and for how much less?

Question: images of 1 500 x 1 500 pixels hold five small objects, three of one class, and 50 pieces of noise; the label
is the class of the three (the construction of the method's paper, on scikit-learn's digits and on Fashion-MNIST). Test
accuracy of attention sampling with ten patches (corrected and Murthy's estimator, the published derivative), ten
patches drawn uniformly, iterative patch selection, and multiple-instance learning on all 900 patches; time and memory
of a training step and of an inference on one image against a network that reads it whole; memory of one from
a memory map as images grow.
Goals: attention sampling within 2 points of multiple-instance learning, >= 8 times less time and >= 10 times less
memory than the network on the whole image, memory flat up to 8 000 x 8 000.
Method: all have one encoder of patches, which has learned beforehand to name single objects of the training set and
noise in crops of 50 x 50, as one would take a published encoder (from random weights attention sampling had not left
chance after ten epochs of 800 images; the paper gives 500 epochs of 5 000), one optimizer (Adam, 1e-3 for the encoder
and 1e-2 for what is new, falling to 0 along a cosine), the same images and epochs. Multiple-instance learning encodes
the empty patches of a batch once, which changes nothing but its time; its time is told without that. Time: rounds
interleaved, time of the thread, medians. Memory: anonymous memory of a fresh process above what it had after a step on
an image of 200 x 200 with a view of 24 x 24, sampled every millisecond.
Digits come from the folder of scikit-learn, which need not be installed with eke: --packages says where that lies.

    python benchmarks/mega_images.py [--packages DIR] [--images /usr/share/datasets/fashion-mnist]
        [--json benchmarks/results/mega_images.json] [--only digits|fashion|costs] [--smoke]
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eke.cost import environment
from eke.nn.attention_sampling import (
    AttentionSampling,
    CrossAttentionPool,
    IterativePatchSelection,
    NumpyImage,
    entropy_penalty,
    gather,
)  # fmt: skip

SIZE, VIEW, PATCH, OBJECT, SAMPLES = 1500, 180, 50, 28, 10
ENTROPY = 1e-3
SHARP = 10.0
"""Features have norm 1: without a larger scale the softmax of a head stays flat for long."""
METHODS = (
    "sampling, murthy",
    "sampling, corrected",
    "sampling, paper_code",
    "uniform patches",
    "IPS",
    "all patches",
    "all patches, overlapping",
)


def objects(name: str, options: argparse.Namespace) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Small grey images (n, 28, 28) and their classes, shuffled once."""
    if name == "fashion":
        files = [options.images / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        with gzip.open(files[0]) as a, gzip.open(files[1]) as b:
            small = np.frombuffer(a.read(), np.uint8, offset=16).reshape(-1, 28, 28)
            labels = np.frombuffer(b.read(), np.uint8, offset=8)
    else:
        table = np.loadtxt(options.packages / "sklearn/datasets/data/digits.csv.gz", delimiter=",")
        pictures = table[:, :-1].reshape(-1, 8, 8)
        large = np.kron(pictures / 16 * 255, np.ones((3, 3))).round().astype(np.uint8)
        small, labels = np.pad(large, ((0, 0), (2, 2), (2, 2))), table[:, -1]
    order = np.random.default_rng(0).permutation(len(small))
    return small[order], labels[order].astype(np.int64)


def noise(count: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Patterns of two straight lines, (count, 28, 28)."""
    found = np.zeros((count, OBJECT, OBJECT), np.uint8)
    along = np.linspace(-OBJECT, OBJECT, 4 * OBJECT)
    for pattern in found:
        for _ in range(2):
            slope, start = math.tan(random.uniform(0, math.pi / 2.5)), random.uniform(0, OBJECT, 2)
            x, y = np.round(start[0] + along).astype(int), np.round(start[1] + slope * along).astype(int)
            inside = (x >= 0) & (x < OBJECT) & (y >= 0) & (y < OBJECT)
            lines = np.zeros_like(pattern)
            lines[y[inside], x[inside]] = int(255 * random.uniform(0.8, 1))
            for axis in (0, 1):
                lines = np.flip(lines, axis) if random.random() < 0.33 else lines
            pattern[:] = np.maximum(pattern, lines)
    return found


def canvases(small: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 1500, 1500), uint8, and the class of the majority."""
    random = np.random.default_rng(seed)
    patterns = noise(50, np.random.default_rng(7))
    images = np.zeros((count, 1, SIZE, SIZE), np.uint8)
    classes = random.integers(0, 10, count)
    cells = SIZE // OBJECT
    for image, label in zip(images, classes):
        own = random.choice(np.flatnonzero(labels == label), 3, replace=False)
        kinds = random.choice(np.setdiff1d(np.arange(10), label), 2, replace=False)
        others = [random.choice(np.flatnonzero(labels == kind)) for kind in kinds]
        things = [*small[own], *small[others], *patterns[random.integers(0, 50, 50)]]
        # Cells of 56 pixels with room to move: nothing overlaps.
        places = random.choice((cells // 2) ** 2, len(things), replace=False)
        for thing, place in zip(things, places):
            y, x = (2 * OBJECT * int(part) + int(random.integers(0, OBJECT)) for part in divmod(place, cells // 2))
            image[0, y : y + OBJECT, x : x + OBJECT] = thing
    return torch.from_numpy(images), torch.from_numpy(classes)


def encoder() -> nn.Sequential:
    """From patches or whole images to 32 features of norm 1."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3),
        nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


def looker() -> nn.Sequential:
    """The paper's attention network: from the small view to a grid of logits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 1, 3, padding=1),
    )


def beforehand(small: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], steps: int) -> dict[str, Tensor]:
    """Weights of an encoder that names single objects, or noise, in crops."""
    torch.manual_seed(0)
    random = np.random.default_rng(3)
    patterns = noise(50, np.random.default_rng(7))
    body, head = encoder(), nn.Linear(32, 11)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for step in range(steps):
        picked = random.integers(0, len(small), 64)
        things, names = small[picked].copy(), labels[picked].copy()
        noisy = random.random(64) < 1 / 6
        things[noisy], names[noisy] = patterns[random.integers(0, 50, int(noisy.sum()))], 10
        crops = np.zeros((64, 1, PATCH, PATCH), np.uint8)
        for crop, thing in zip(crops, things):
            y, x = random.integers(0, PATCH - OBJECT + 1, 2)
            crop[0, y : y + OBJECT, x : x + OBJECT] = thing
        features = nn.functional.normalize(body(torch.from_numpy(crops).float() / 255), dim=1)
        loss = nn.functional.cross_entropy(head(SHARP * features), torch.from_numpy(names))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 499:
            print(f"  encoder: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return body.state_dict()


class Uniform(nn.Module):
    """Attention that is the same everywhere."""

    def forward(self, view: Tensor) -> Tensor:
        """Return a grid of zeros."""
        return torch.zeros_like(view)


class AllPatches(nn.Module):
    """Multiple-instance learning with attention on all patches of a grid; empty ones are encoded once if asked."""

    def __init__(self, *, once: bool, stride: int = PATCH) -> None:
        super().__init__()
        self.encoder, self.once, self.stride = encoder(), once, stride
        self.gate = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, images: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and attention."""
        line = torch.arange(0, images.shape[-1] - PATCH + 1, self.stride)
        places = torch.cartesian_prod(line, line)
        kept = torch.ones(len(images), len(places), dtype=torch.bool)
        if self.once:
            highest = nn.functional.max_pool2d(images.float(), PATCH, self.stride)
            kept = highest.flatten(1) > 0
        found = [gather(image[None], places[seen][None], (PATCH, PATCH))[0] for image, seen in zip(images, kept)]
        features = nn.functional.normalize(self.encoder(torch.cat(found).float() / 255), dim=1)
        kept = kept.flatten()
        if self.once:
            empty = nn.functional.normalize(self.encoder(torch.zeros(1, 1, PATCH, PATCH)), dim=1)
            where = torch.where(kept, kept.cumsum(0) - 1, len(features))
            features = torch.cat([features, empty])[where]
        features = features.reshape(len(images), -1, 32)
        attention = torch.softmax(self.gate(features).squeeze(-1), -1)
        return torch.einsum("bn,bnd->bd", attention, features), attention


class WholeImage(nn.Module):
    """The same encoder on the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, images: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and attention."""
        return nn.functional.normalize(self.encoder(images.float() / 255), dim=1), view.new_zeros(0)


class Sees(nn.Module):
    """A layer of eke as (features, attention)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and attention."""
        seen = self.layer(images, view)
        return seen.features, seen.attention


class Normalized(nn.Sequential):
    """The encoder with features of norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features of norm 1."""
        return nn.functional.normalize(super().forward(x), dim=1)


def made(method: str, size: int = SIZE) -> nn.Module:
    """The part of a network before its head, for images of a size."""
    if method.startswith(("sampling", "uniform")):
        estimator = method.removeprefix("sampling, ") if method.startswith("sampling") else "murthy"
        attention = looker() if method.startswith("sampling") else Uniform()
        return Sees(
            AttentionSampling(
                attention, encoder(), patch=PATCH, samples=SAMPLES, normalize=True, estimator=estimator,  # type: ignore[arg-type]
                smoothing=1e-5, evaluation="sample",
            )
        )  # fmt: skip
    if method == "IPS":
        grid = (size // PATCH, size // PATCH)
        pool = CrossAttentionPool(32, heads=4)
        return Sees(
            IterativePatchSelection(
                Normalized(*encoder()), dim=32, patch=PATCH, grid=grid, pool=pool, memory=SAMPLES, chunk=100
            )
        )
    if method.startswith("all"):
        return AllPatches(once="900" not in method, stride=PATCH // 2 if "overlapping" in method else PATCH)
    return WholeImage()


def train(
    method: str, data: tuple[Tensor, ...], weights: dict[str, Tensor], *, epochs: int, batch: int, seed: int
) -> dict[str, Any]:
    """Train one network and return what it reached."""
    images, views, labels, test_images, test_views, test_labels = data
    torch.manual_seed(seed)
    body, head = made(method), nn.Linear(32, 10)
    known = next(part for name, part in body.named_modules() if name.endswith("encoder"))
    known.load_state_dict(weights)
    new = [p for p in [*body.parameters(), *head.parameters()] if not any(p is q for q in known.parameters())]
    optimizer = torch.optim.Adam([{"params": list(known.parameters()), "lr": 1e-3}, {"params": new, "lr": 1e-2}])
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve, began = [], time.thread_time()
    for epoch in range(epochs):
        order, total = torch.randperm(len(images)), 0.0
        for part in order.split(batch)[: len(images) // batch]:
            features, attention = body(images[part], views[part])
            loss = nn.functional.cross_entropy(head(SHARP * features), labels[part])
            whole = loss + ENTROPY * entropy_penalty(attention) if "sampling" in method else loss
            optimizer.zero_grad()
            whole.backward()
            nn.utils.clip_grad_norm_(list(body.parameters()), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        curve.append(total / (len(images) // batch))
        if epoch % 10 == 9 or epoch == epochs - 1:
            print(
                f"  {method}: epoch {epoch + 1}, loss {curve[-1]:.3f}, {time.thread_time() - began:.0f} s", flush=True
            )
    seconds = time.thread_time() - began
    body.eval()
    right = []
    with torch.no_grad():
        for i in range(0, len(test_images), batch):
            features, _ = body(test_images[i : i + batch], test_views[i : i + batch])
            right.append(head(SHARP * features).argmax(1) == test_labels[i : i + batch])
    share = float(torch.cat(right).float().mean())
    print(f"  {method}: seed {seed}, accuracy {share:.3f}", flush=True)
    return {"accuracy": share, "loss": curve, "training_seconds": seconds, "seed": seed}


def task(name: str, options: argparse.Namespace) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Images, views and labels to train and to test, and weights of an encoder."""
    small, labels = objects(name, options)
    cut = len(small) * 3 // 4  # objects of the test are no objects of the training
    train_count, test_count = (40, 20) if options.smoke else (options.count, options.count // 2)
    found: list[Tensor] = []
    for kept, count, seed in ((slice(cut), train_count, 1), (slice(cut, None), test_count, 2)):
        images, classes = canvases(small[kept], labels[kept], count, seed)
        views = torch.cat([
            nn.functional.adaptive_avg_pool2d(image[None].float() / 255, (VIEW, VIEW)) for image in images
        ])
        found += [images, views, classes]
    return tuple(found), beforehand(small[:cut], labels[:cut], 20 if options.smoke else 2500)


def step_of(method: str, size: int = SIZE, view_size: int = VIEW) -> Callable[[bool], None]:
    """A training step (True) or an inference (False) on one image."""
    torch.manual_seed(0)
    body, head = made(method, size), nn.Linear(32, 10)
    image = (torch.rand(1, 1, size, size) * 255).to(torch.uint8)
    view = nn.functional.adaptive_avg_pool2d(image.float() / 255, (view_size, view_size))

    def step(training: bool) -> None:
        body.train(training)
        with torch.set_grad_enabled(training):
            out = head(body(image, view)[0])
            if training:
                out.sum().backward()

    return step


COSTS = ("sampling, corrected", "sampling, murthy", "IPS", "all 900 patches", "whole image")


def times(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the thread for one image."""
    steps = {method: step_of(method) for method in COSTS}
    found: dict[str, dict[str, list[float]]] = {method: {"training": [], "inference": []} for method in COSTS}
    for turn in range(rounds + 1):
        for method, step in steps.items():
            for kind in ("training", "inference"):
                began = time.thread_time()
                step(kind == "training")
                if turn:
                    found[method][kind].append(time.thread_time() - began)
    return {
        method: {kind: statistics.median(values) for kind, values in kinds.items()} for method, kinds in found.items()
    }


class Watch:
    """The most anonymous memory of this process while it is entered, above what there was before."""

    def __enter__(self) -> Watch:
        self.before = self.most = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = max(self.most, self._now()) - self.before

    def _look(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def memory(kind: str, what: str) -> int:
    """Bytes of one job, in a fresh process."""
    said = subprocess.run(
        [sys.executable, __file__, "--job", kind, what], capture_output=True, text=True, check=True
    ).stdout
    return int(said.split()[-1])


def job(kind: str, what: str) -> None:
    """What the fresh process does: prints bytes."""
    torch.set_num_threads(1)
    if kind == "mapped":
        layer = made("sampling, corrected").layer.eval()  # type: ignore[union-attr, operator]
        layer.view_size = (VIEW, VIEW)
        with torch.no_grad():
            layer([NumpyImage(np.zeros((1, 200, 200), np.uint8))])  # what the first call of all allocates for ever
            with Watch() as watch:
                layer([NumpyImage(what)])
    else:
        step = step_of(what)
        step_of(what, 200, 24)(kind == "training")  # what the first call of all allocates for ever
        with Watch() as watch:
            step(kind == "training")
    print(watch.bytes)


def growth(sizes: tuple[int, ...]) -> dict[str, int]:
    """Bytes of an inference from a memory map."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder, f"{size}.npy")
            image = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(1, size, size))
            random = np.random.default_rng(0)
            for start in range(0, size, 500):
                image[:, start : start + 500] = random.integers(0, 256, image[:, start : start + 500].shape, np.uint8)
            image.flush()
            del image
            found[str(size)] = memory("mapped", str(path))
            print(f"  memory map of {size} x {size}: {found[str(size)] / 1e6:.1f} MB", flush=True)
            path.unlink()
    return found


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--packages", type=Path, default=Path("."))
    parser.add_argument("--only", nargs="*", default=["digits", "fashion", "costs"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--count", type=int, default=400, help="images to train on; half as many for the test")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--job", nargs=2)
    options = parser.parse_args()
    if options.job:
        job(*options.job)
        return
    torch.set_num_threads(1)
    if options.smoke:
        options.epochs, options.rounds = 1, 1
    written: dict[str, Any] = {"question": __doc__.split("\n")[0], "smoke": options.smoke, "tasks": {}}
    if options.json and options.json.exists():
        written = json.loads(options.json.read_text())
    written["environment"] = environment().to_json()

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(written, indent=1) + "\n")

    for name in (name for name in options.only if name != "costs"):
        data, weights = task(name, options)
        rows = written["tasks"].setdefault(name, {})
        for method in options.methods:
            runs = rows.setdefault(method, [])
            for seed in range(len(runs), options.seeds):
                runs.append(train(method, data, weights, epochs=options.epochs, batch=options.batch, seed=seed))
                save()
        written["tasks"][name] = rows
    if "costs" in options.only:
        spent = times(options.rounds)
        for method in COSTS:
            row: dict[str, float] = {f"{kind}_seconds": value for kind, value in spent[method].items()}
            row |= {f"{kind}_bytes": memory(kind, method) for kind in ("training", "inference")}
            written.setdefault("costs", {})[method] = row
            print(method, {key: f"{value:.3g}" for key, value in row.items()}, flush=True)
        written["memory_map_bytes"] = growth((500, 1000) if options.smoke else (1500, 3000, 8000))
        save()


if __name__ == "__main__":
    main()
