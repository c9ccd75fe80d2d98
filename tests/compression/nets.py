"""Nets and data that compress in seconds: 8x8 images whose classes small residual nets can learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke.compression import Recovery, Task
from eke.compression.task import evaluating

STEPS = Recovery(steps=4, batch_size=32)


class Tiny(nn.Module):
    """Two convolutions with batch normalisation around a residual sum, and a classifier."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(x + y), 1).flatten(1))


class Unit(nn.Module):
    """A residual block: two normalised convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.two, self.norm2 = nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


class Blocky(nn.Module):
    """Two residual blocks between a strided stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first, self.second, self.head = Unit(16), Unit(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(F.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def samples(count: int, *, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Noise with a pattern for each class added; the patterns are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return torch.randn(count, 3, 8, 8, generator=generator) + 0.2 * patterns[labels], labels


def batches(count: int = 192, *, seed: int = 0, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    images, labels = samples(count, seed=seed)
    return list(zip(images.split(size), labels.split(size)))


def trained(*, seed: int = 0, steps: int = 60) -> Tiny:
    """A net that has learned the task; the global random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tiny()
    images, labels = samples(256, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        index = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def tiny_task() -> Task:
    return Task(batches(192, seed=1), batches(128, seed=2), batches(160, seed=3), name="tiny")


def outputs(model: nn.Module, *, seed: int = 8) -> Tensor:
    with evaluating(model):
        return model(samples(16, seed=seed)[0])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and a.shape == second[name].shape and bool(torch.equal(a, second[name]))
        for name, a in first.items()
    )
