"""Train the demo's network on Fashion-MNIST and package it with its data splits.

Run once, by hand; the demo itself never trains. Needs Debian's package dataset-fashion-mnist (or any folder with the
four original IDX files). Writes weights, images, indices and checksums to src/eke/demo/data/.

    python tools/train_demo.py --images /usr/share/datasets/fashion-mnist

Training: first 55 000 of the 60 000 training images, 6 epochs of SGD with Nesterov momentum and a one-cycle learning
rate, random flips and shifts of up to two pixels, batch 128, one seed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import pathlib
import struct
import sys
import time

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from eke.demo.network import Network  # noqa: E402

MEAN, DEVIATION = 0.2860, 0.3530
TRAINED_ON, CALIBRATION, SELECTION, REPORT = 55_000, 5_000, 2_000, 5_000


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Read one gzipped IDX file of bytes."""
    with gzip.open(path) as file:
        _, dimensions = struct.unpack(">HBB", file.read(4))[0::2]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape).copy()


def normalise(images: Tensor) -> Tensor:
    """Turn bytes (n, 28, 28) into normalised floats (n, 1, 28, 28)."""
    return (images.float().div(255).sub(MEAN).div(DEVIATION))[:, None]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to two pixels in both directions."""
    n = images.shape[0]
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / DEVIATION)
    top, left = torch.randint(0, 5, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(28)
    columns = left[:, None] + torch.arange(28)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correctly classified images, in evaluation mode."""
    model.eval()
    right = sum(int((model(normalise(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500)))
    model.train()
    return right / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """Train a network with fresh random weights and return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(memory_format=torch.channels_last).train()
    batch = 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.25, total_steps=steps, pct_start=0.25)
    step, start = 0, time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order[: steps // epochs * batch].split(batch):
            x = augment(normalise(images[index]), generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                sys.stderr.write(
                    f"epoch {epoch} step {step}/{steps} loss {loss.item():.4f} {time.perf_counter() - start:.0f}s\n"
                )
    return model.to(memory_format=torch.contiguous_format).eval()


def main() -> None:
    """Train, evaluate and write the package files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "src/eke/demo/data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    images = torch.from_numpy(read_idx(arguments.images / "train-images-idx3-ubyte.gz"))
    labels = torch.from_numpy(read_idx(arguments.images / "train-labels-idx1-ubyte.gz")).long()
    test_images = torch.from_numpy(read_idx(arguments.images / "t10k-images-idx3-ubyte.gz"))
    test_labels = torch.from_numpy(read_idx(arguments.images / "t10k-labels-idx1-ubyte.gz")).long()
    torch.manual_seed(arguments.seed)
    model = train(Network(), images[:TRAINED_ON], labels[:TRAINED_ON], epochs=arguments.epochs, seed=arguments.seed)
    held_out = accuracy(model, images[TRAINED_ON:], labels[TRAINED_ON:])
    tested = accuracy(model, test_images, test_labels)
    sys.stderr.write(f"held-out {held_out:.4f} test {tested:.4f}\n")

    generator = torch.Generator().manual_seed(arguments.seed)
    indices = {
        "calibration": torch.randperm(TRAINED_ON, generator=generator)[:CALIBRATION].sort().values,
        "selection": TRAINED_ON
        + torch.randperm(len(images) - TRAINED_ON, generator=generator)[:SELECTION].sort().values,
        "report": torch.randperm(len(test_images), generator=generator)[:REPORT].sort().values,
    }
    sources = {"calibration": (images, labels), "selection": (images, labels), "report": (test_images, test_labels)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = {"weights.safetensors": None}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, arguments.output / "weights.safetensors")
    for split, index in indices.items():
        pixels, classes = sources[split]
        name = f"{split}.npz"
        np.savez_compressed(
            arguments.output / name,
            images=pixels[index].numpy(),
            labels=classes[index].numpy().astype(np.uint8),
            indices=index.numpy().astype(np.int32),
        )
        files[name] = None
    digests = {name: hashlib.sha256((arguments.output / name).read_bytes()).hexdigest() for name in files}
    manifest = {
        "sha256": digests,
        "source": "Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), MIT licence; split 'report' from its test set",
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "torch": torch.__version__,
        "accuracy": {"held_out_5000": held_out, "test_10000": tested},
    }
    (arguments.output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
