"""Batches that do not fit the model, loaders that are none, splits that are too small."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import eke

from .row import BUDGET, Row, Wrapped, batches, changed, compress, net, splits


class Image:
    """As PIL's: no tensor."""


Image.__module__ = "PIL.Image"


class Spoken(nn.Module):
    """A model of keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, values, labels=None):
        return self.net(values)


class Broken(Dataset):
    """Samples that cannot be made."""

    def __init__(self, sample) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index):
        return self.sample(index)


class Breaks:
    """A loader that stops in the middle."""

    def __iter__(self):
        yield batches()[0]
        raise RuntimeError("disk on fire")


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*batches())
    return torch.cat(inputs), torch.cat(targets)


def keyed(name: str) -> list:
    return [{name: x, "labels": y} for x, y in batches()]


def inferred() -> list:
    with torch.inference_mode():
        return changed(lambda x: x * 1)


def spoiled(value: float) -> list:
    data = changed(torch.clone)
    data[1][0][2, 3] = value
    return data


def tiny_report():
    return eke.compress(net(), eke.Task(*splits()), budget=eke.Budget(max_drop="1%"))


LOADER = "Statistics, recovery and measurements each read the data again, batch by batch."
WRAP = "`DataLoader(TensorDataset(inputs, targets), batch_size=64)`."
FIT = "What the loader yields goes into the model as it is."

ROWS = [
    Row(
        "an iterator",
        lambda _: compress(data=iter(batches())),
        ValueError,
        "batches is an iterator (list_iterator) that is used up after one pass, and compress reads the data several "
        "times: pass the DataLoader itself, or list(batches).",
        LOADER,
        "Pass the loader, not `iter(loader)`.",
    ),
    Row(
        "a generator",
        lambda _: compress(data=(b for b in batches())),
        ValueError,
        "batches is an iterator (generator)",
        LOADER,
        "`list(generator)`, or a loader.",
    ),
    Row(
        "a function that makes batches",
        lambda _: compress(data=batches),
        TypeError,
        "batches must be a list or a DataLoader, got function ...: call it and pass what it returns.",
        LOADER,
        "Call it.",
    ),
    Row(
        "a dataset",
        lambda _: compress(data=TensorDataset(*whole())),
        TypeError,
        "batches must be a list or a DataLoader, got TensorDataset, a dataset of single samples: "
        "DataLoader(dataset, batch_size=64).",
        LOADER,
        "`DataLoader(dataset, batch_size=64)`.",
    ),
    Row(
        "one tensor",
        lambda _: compress(data=whole()[0]),
        TypeError,
        "batches must be a list or a DataLoader, got one Tensor (96, 8): DataLoader(TensorDataset(inputs, targets), "
        "batch_size=64).",
        LOADER,
        WRAP,
    ),
    Row(
        "one numpy array",
        lambda _: compress(data=np.zeros((96, 8))),
        TypeError,
        "got one ndarray (96, 8): DataLoader(TensorDataset(inputs, targets), batch_size=64).",
        LOADER,
        WRAP,
    ),
    Row(
        "inputs and targets",
        lambda _: compress(data=whole()),
        TypeError,
        "batches must be a list or a DataLoader, got inputs (96, 8) and targets (96,): [(inputs, targets)] is a list "
        "of "
        "one batch",
        LOADER,
        WRAP,
    ),
    Row(
        "a dictionary of splits",
        lambda _: compress(data=dict(zip(("calibration", "selection"), splits()))),
        TypeError,
        "got a dictionary with the keys ['calibration', 'selection']: three splits make an eke.Task(calibration=..., "
        "selection=..., report=...)",
        "In Python, the splits have a class of their own.",
        "`eke.Task(**splits)`.",
    ),
    Row(
        "a name",
        lambda _: compress(data="cifar10"),
        TypeError,
        "batches must be a list or a DataLoader, got str 'cifar10'",
        "eke brings no data but the demo's.",
        "Make a DataLoader.",
    ),
    Row(
        "an empty list",
        lambda _: compress(data=[]),
        ValueError,
        "batches gave 0 batches: pass a list or a DataLoader that is not empty.",
        "A filter may have left nothing, or drop_last=True the only batch.",
        "Print `len(loader)`.",
    ),
    Row(
        "a loader that raises",
        lambda _: compress(data=Breaks()),
        ValueError,
        "Reading calibration batch 1 failed, RuntimeError: disk on fire: mend the dataset or its loader.",
        "The error came from your dataset.",
        "The traceback above the message has its line.",
    ),
    Row(
        "a dataset with a wrong key",
        lambda _: compress(data=DataLoader(Broken(lambda i: {}["image"]))),
        ValueError,
        "Reading calibration batch 0 failed, KeyError: 'image'",
        "The error came from your dataset.",
        "The traceback above the message has its line.",
    ),
    Row(
        "samples of several sizes",
        lambda _: compress(data=DataLoader(Broken(lambda i: (torch.ones(8 + i), 1)), batch_size=3)),
        ValueError,
        "Reading calibration batch 0 failed, RuntimeError: stack expects each tensor to be equal size, but got [8] at "
        "entry 0 and [9] at entry 1: pad the samples to one size in collate_fn=.",
        "A batch is one tensor.",
        "Pad, crop or resize; or batches of one sample.",
    ),
    Row(
        "batches of three things",
        lambda _: compress(data=[[x, y, y] for x, y in batches()]),
        ValueError,
        "A batch must be (inputs, targets), a dictionary or a tensor, got list of 3 items: pass your own forward=, "
        "loss= "
        "and score=.",
        "It is not clear which of them the model takes.",
        "`forward=lambda model, batch: model(batch[0])`, and a loss that looks into the batch too.",
    ),
    Row(
        "dictionaries without labels",
        lambda _: compress(
            Spoken(), [{"values": x, "y": y} for x, y in batches()], forward=lambda model, batch: model(batch["values"])
        ),
        TypeError,
        "The batch has no tensor of targets, got NoneType: yield (inputs, targets) or pass your own loss=. Targets of "
        "a "
        "dictionary are looked for under labels, label, targets, target.",
        "The loss needs them.",
        "Rename the entry, or pass a loss of your own.",
    ),
    Row(
        "dictionaries with other keys",
        lambda _: compress(Spoken(), keyed("pixels")),
        ValueError,
        "got an unexpected keyword argument 'pixels'. Its keys become arguments of Spoken.forward(values, "
        "labels=None).",
        "Entries of a dictionary are passed by name.",
        "Rename the entry, or pass `forward=`.",
    ),
    Row(
        "text",
        lambda _: compress(data=[(["a cat", "a dog"], torch.tensor([0, 1]))]),
        ValueError,
        "The model does not run on calibration batch 0, ((str, str), int64 (2,)) ... Tokenise text first: a model "
        "takes "
        "tensors, such as tokenizer(texts, return_tensors='pt').",
        FIT,
        "Tokenise in the dataset or in collate_fn.",
    ),
    Row(
        "images that are no tensors",
        lambda _: compress(data=[(Image(), 1)]),
        ValueError,
        "The model does not run on calibration batch 0, (Image, int) ... Turn images into tensors in the dataset, "
        "such as "
        "torchvision.transforms.ToTensor(), and stack them.",
        FIT,
        "Give the dataset a transform.",
    ),
    Row(
        "numpy arrays",
        lambda _: compress(data=changed(torch.Tensor.numpy)),
        ValueError,
        "The model does not run on calibration batch 0, (ndarray, int64 (32,)) ... Turn arrays into tensors, "
        "torch.as_tensor(array), or let a DataLoader do it.",
        FIT,
        "`torch.as_tensor(array)`.",
    ),
    Row(
        "lists of numbers",
        lambda _: compress(data=[([[1.0] * 8], [1])]),
        ValueError,
        "There is no tensor in it: torch.utils.data.DataLoader(dataset, batch_size=64) makes batches of tensors.",
        FIT,
        "Use a DataLoader, or `torch.tensor(values)`.",
    ),
    Row(
        "inputs in float64",
        lambda _: compress(data=changed(torch.Tensor.double)),
        ValueError,
        "(float64 (32, 8), int64 (32,)) (parameters are torch.float32): ... Convert the inputs, x.to(torch.float32), "
        "or "
        "the model, model.to(torch.float64).",
        "numpy's numbers are float64, torch's float32.",
        "`x.float()`.",
    ),
    Row(
        "inputs of whole numbers",
        lambda _: compress(data=changed(torch.Tensor.long)),
        ValueError,
        "(int64 (32, 8), int64 (32,)) (parameters are torch.float32): ... Convert whole numbers, x.to(torch.float32).",
        "Layers do not convert.",
        "`x.float()`, for images also `/ 255`.",
    ),
    Row(
        "token numbers as floats",
        lambda _: compress(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(1), nn.Linear(32, 3)), changed(torch.abs)),
        ValueError,
        "An embedding looks up whole numbers: convert its inputs, x.long().",
        "Layers do not convert.",
        "`x.long()`.",
    ),
    Row(
        "inputs of another width",
        lambda _: compress(data=changed(lambda x: x[:, :5])),
        ValueError,
        "The model does not run on calibration batch 0, (float32 (32, 5), int64 (32,)) ... shapes cannot be multiplied "
        "(32x5 and 8x64). Make the loader yield what the model takes, or pass forward=.",
        FIT,
        "Compare the shape in the message with the first layer.",
    ),
    Row(
        "images with other channels",
        lambda _: compress(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            [(torch.ones(4, 1, 8, 8), torch.zeros(4).long())],
        ),
        ValueError,
        "(float32 (4, 1, 8, 8), int64 (4,)) ... to have 3 channels, but got 1 channels instead",
        FIT,
        "Grey images: `x.expand(-1, 3, -1, -1)`.",
    ),
    Row(
        "data on another device",
        lambda _: compress(data=changed(lambda x: x.to("meta"))),
        ValueError,
        "Calibration batch 0 has no values, float32 (32, 8) on meta: give tensors on the model's device.",
        "It has shapes only.",
        "Model and data must be on one real device.",
    ),
    Row(
        "values that are not finite",
        lambda _: compress(data=spoiled(float("inf"))),
        ValueError,
        "Calibration batch 1 holds 1 values that are not finite: clean the data.",
        "One of them makes every statistic useless. (A mask of 0 and -inf is fine.)",
        "Look at that batch.",
    ),
    Row(
        "values too large to square",
        lambda _: compress(data=changed(lambda x: 1e25 * x)),
        ValueError,
        "Inputs of '0' reach ..., and their squares exceed torch.float32, first in batch 0; check that batch, scale "
        "data or "
        "loss down",
        "Second moments overflow.",
        "Normalise the inputs.",
    ),
    Row(
        "tensors made in inference mode",
        lambda _: compress(data=inferred()),
        ValueError,
        "Calibration batch 0 was made under torch.inference_mode(), float32 (32, 8), and cannot be differentiated: "
        "make the "
        "data outside of it, or clone them.",
        "torch refuses gradients through such tensors.",
        "`x.clone()` outside of it.",
    ),
    Row(
        "one-hot targets",
        lambda _: compress(data=changed(targets=lambda y: F.one_hot(y, 3))),
        ValueError,
        "Targets of the logits' shape look one-hot: yield targets.argmax(1).",
        "The default loss takes class numbers.",
        "`targets.argmax(1)`, or a loss of your own.",
    ),
    Row(
        "targets with a column too many",
        lambda _: compress(data=changed(targets=lambda y: y[:, None])),
        ValueError,
        "Targets have one column too many: yield targets.squeeze(1).",
        "The default loss takes class numbers.",
        "`targets.squeeze(1)`.",
    ),
    Row(
        "targets of another dtype",
        lambda _: compress(data=changed(targets=torch.Tensor.float)),
        ValueError,
        "On calibration batch 0, (float32 (32, 8), float32 (32,)), where the model returned float32 (32, 3): "
        "cross_entropy "
        "needs int64 targets",
        "The default loss takes class numbers.",
        "`y.long()`; for regression a loss of your own.",
    ),
    Row(
        "targets counted from 1",
        lambda _: compress(data=changed(targets=lambda y: y + 1)),
        ValueError,
        "Targets must lie in [0, 2] for logits (32, 3), got 1 to 3.",
        "Classes are counted from 0.",
        "Subtract 1, or give the model its last class.",
    ),
    Row(
        "targets of -1",
        lambda _: compress(data=changed(targets=lambda y: y - 1)),
        ValueError,
        "Targets must lie in [0, 2] for logits (32, 3), got -1 to 1.",
        "Unlabelled samples have no loss.",
        "Leave them out.",
    ),
    Row(
        "lists as targets",
        lambda _: compress(data=changed(targets=torch.Tensor.tolist)),
        TypeError,
        "The batch has no tensor of targets, got list: yield (inputs, targets) or pass your own loss=.",
        "A loader of your own did not make tensors.",
        "`torch.tensor(targets)`.",
    ),
    Row(
        "single samples instead of batches",
        lambda _: compress(data=[(x[0], y[0]) for x, y in batches()]),
        ValueError,
        "cross_entropy needs int64 targets (batch, ...) for logits (batch, classes, ...), got targets torch.int64 () "
        "and "
        "logits (3,)",
        "The first dimension counts samples.",
        "Use a DataLoader.",
    ),
    Row(
        "a model that changes its inputs",
        lambda _: compress(Wrapped(lambda inner, x: inner(x.mul_(0.5)))),
        ValueError,
        "Running model and loss changed calibration batch 0, (float32 (32, 8), int64 (32,)), in place, and the next "
        "pass "
        "would read other data: clone what is changed, x = x.clone(), or pass a DataLoader.",
        "A list yields the same tensors each time.",
        "`x = x.clone()`.",
    ),
    Row(
        "a report split too small",
        lambda _: tiny_report(),
        ValueError,
        "96 samples cannot prove a drop of at most 1 points with 95 % confidence, even if the models never differ: at "
        "least 381 are needed. Give more samples or allow a larger drop.",
        "Few samples cannot show a small drop.",
        "More samples, or a larger `max_drop`.",
    ),
    Row(
        "a split that is missing",
        lambda _: eke.compress(net(), eke.Task(batches(), None, batches()), budget=BUDGET),
        TypeError,
        "The selection split must be a list or a DataLoader, got NoneType.",
        "All three have their use.",
        "Split your data in three.",
    ),
    Row(
        "a split that is used up",
        lambda _: eke.compress(net(), eke.Task(batches(), iter([]), batches()), budget=BUDGET),
        ValueError,
        "The selection split is an iterator (list_iterator) that is used up after one pass: pass the "
        "DataLoader itself, or a list.",
        LOADER,
        "Pass the loader, not `iter(loader)`.",
    ),
    Row(
        "two splits",
        lambda _: eke.Task(batches(), batches()),
        TypeError,
        "missing 1 required positional argument: 'report'",
        "The published numbers need samples that nothing else saw.",
        "Split your data in three.",
        python=True,
    ),
]
