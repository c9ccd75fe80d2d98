"""Folders in use or out of reach, results that are damaged or of another model."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch
from torch import nn

import eke

from .row import Row, compress, net, saved


def a_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder / "notes.txt"


def resumed(folder: Path, **options):
    compress(folder=folder / "run")
    return compress(folder=folder / "run", resume=True, **options)


def other_weights() -> nn.Module:
    model = net()
    model[0].weight.data.add_(0.1)
    return model


def damaged(folder: Path, name: str, content: bytes | None) -> nn.Module:
    place = saved(folder)
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(content)
    return eke.load(place, net())


def tampered(folder: Path, **entries) -> nn.Module:
    place = saved(folder)
    plan = json.loads((place / "plan.json").read_text())
    (place / "plan.json").write_text(json.dumps({**plan, **entries}))
    return eke.load(place, net())


def cut_short(folder: Path) -> nn.Module:
    return damaged(folder, "model.safetensors", (saved(folder / "whole") / "model.safetensors").read_bytes()[:200])


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def locked() -> nn.Module:
    model = net()
    model.lock = threading.Lock()
    return model


CHANGED = "The plan names the digest of the weights, so that no other file can take their place."
RESTORE = "Restore the file from where it came, or compress again."
SAME = "`eke.load` replays the changes on the architecture that was compressed."
BUILD = "Build the same architecture, with any weights."

ROWS = [
    Row(
        "a file as the run's folder",
        lambda at: compress(folder=a_file(at)),
        OSError,
        "notes.txt cannot be made (...notes.txt is a file): give the path of a folder where you may write",
        "Stages are kept in a folder.",
        "Give a new path.",
    ),
    Row(
        "a folder inside a file",
        lambda at: compress(folder=a_file(at) / "run"),
        OSError,
        "run cannot be made (...notes.txt is a file): give the path of a folder where you may write",
        "Stages are kept in a folder.",
        "Give a new path.",
    ),
    Row(
        "a folder that cannot be written",
        lambda at: compress(folder="/proc/eke"),
        OSError,
        "/proc/eke cannot be made (No such file or directory): give the path of a folder where you may write",
        "The system does not allow it.",
        "Give a path where you may write.",
    ),
    Row(
        "a folder in use",
        lambda at: compress(folder=a_file(at).parent),
        ValueError,
        "holds files that are not of a run (notes.txt, ...): give a new or empty folder.",
        "Stages of a new run replace what is there.",
        "Give a new path.",
    ),
    Row(
        "a number as the folder",
        lambda at: compress(folder=3),
        TypeError,
        "folder must be a path, got 3.",
        "It is no path.",
        "Text or a `pathlib.Path`.",
    ),
    Row(
        "resume without a folder",
        lambda at: compress(resume=True),
        ValueError,
        "resume=True needs folder=, where the interrupted run was kept.",
        "Stages are kept in a folder.",
        "`folder=` in both calls.",
    ),
    Row(
        "resume with another recipe",
        lambda at: resumed(at, seed=3),
        ValueError,
        "was started with another recipe; seed was 0 and is now 3. Resume with the same, or start again without "
        "resume.",
        "A run that is continued ends as an uninterrupted one would.",
        "Pass what was passed before.",
    ),
    Row(
        "resume with other weights",
        lambda at: resumed(at, model=other_weights()),
        ValueError,
        "was started with another recipe; weights was ... and is now ...",
        "A run that is continued ends as an uninterrupted one would.",
        "Load the same weights.",
    ),
    Row(
        "a file as the result's folder",
        lambda at: compress().save(a_file(at)),
        OSError,
        "notes.txt cannot be made (...notes.txt is a file)",
        "A result is a folder.",
        "Give a new path.",
    ),
    Row(
        "a folder that is not there",
        lambda at: eke.load(at / "nowhere", net()),
        FileNotFoundError,
        "nowhere is not an eke artifact: there is no such folder, and so no plan.json.",
        "A path may be relative to another folder.",
        "Print `Path(folder).absolute()`.",
    ),
    Row(
        "a file of the result",
        lambda at: eke.load(saved(at) / "model.safetensors", net()),
        FileNotFoundError,
        "model.safetensors is a file: give the artifact's folder, ",
        "Weights alone do not say what was cut.",
        "Give the folder.",
    ),
    Row(
        "model and folder exchanged",
        lambda at: eke.load(net(), saved(at)),
        TypeError,
        "load(folder, model) takes the path of the artifact first, got Sequential.",
        "Their order is fixed.",
        "`eke.load(folder, model)`.",
    ),
    Row(
        "no model to load into",
        lambda at: eke.load(saved(at)),
        TypeError,
        "load() missing 1 required positional argument: 'model'",
        SAME,
        BUILD,
        python=True,
    ),
    Row(
        "the function that builds the model",
        lambda at: eke.load(saved(at), net),
        TypeError,
        "eke needs a torch.nn.Module, got function 'net': call it and pass the module that it returns.",
        SAME,
        "Call it.",
    ),
    Row(
        "a model without values",
        lambda at: eke.load(saved(at), on_meta()),
        ValueError,
        "Parameter '0.weight' is on the meta device and has no values",
        SAME,
        BUILD,
    ),
    Row(
        "a model that cannot be copied",
        lambda at: eke.load(saved(at), locked()),
        ValueError,
        "The model cannot be copied, ... attribute 'lock' is lock",
        "Your object stays as it is: a copy is filled.",
        "Keep locks, files and generators elsewhere.",
    ),
    Row(
        "another architecture",
        lambda at: eke.load(saved(at), nn.Conv2d(3, 4, 3)),
        ValueError,
        "build the ... architecture",
        SAME,
        BUILD,
    ),
    Row(
        "another number of classes",
        lambda at: eke.load(saved(at), net(classes=5)),
        ValueError,
        "'2.bias' is torch.float32 (5,) in the model and torch.float32 (3,) in the artifact: build the architecture "
        "that was "
        "compressed, in its dtype.",
        SAME,
        BUILD,
    ),
    Row(
        "another dtype",
        lambda at: eke.load(saved(at), net().double()),
        ValueError,
        "'0.bias' is torch.float64 (64,) in the model and torch.float32 (64,) in the artifact",
        SAME,
        "Build it in the dtype that was compressed, and convert the result.",
    ),
    Row(
        "weights cut short",
        cut_short,
        ValueError,
        "model.safetensors was changed: its SHA-256 is ..., the plan names ...; restore the file or compress again.",
        CHANGED,
        RESTORE,
    ),
    Row(
        "another digest",
        lambda at: tampered(at, sha256={"model.safetensors": "0" * 64}),
        ValueError,
        "model.safetensors was changed: its SHA-256 is ..., the plan names 000000000000...",
        CHANGED,
        RESTORE,
    ),
    Row(
        "no plan",
        lambda at: damaged(at, "plan.json", None),
        FileNotFoundError,
        "saved is not an eke artifact: it has no plan.json.",
        "Copying may have been interrupted.",
        RESTORE,
    ),
    Row(
        "no weights",
        lambda at: damaged(at, "model.safetensors", None),
        FileNotFoundError,
        "saved is not an eke artifact: it has no model.safetensors.",
        "Copying may have been interrupted.",
        RESTORE,
    ),
    Row(
        "a plan that is no JSON",
        lambda at: damaged(at, "plan.json", b"{not json"),
        ValueError,
        "plan.json is not valid JSON (...); restore it or start again in a new folder.",
        "It was edited or cut short.",
        RESTORE,
    ),
    Row(
        "a plan that is no text",
        lambda at: damaged(at, "plan.json", b"\xff\xfe\x00"),
        ValueError,
        "plan.json is not valid JSON ('utf-8' codec can't decode byte 0xff",
        "It was overwritten.",
        RESTORE,
    ),
    Row(
        "a plan of another format",
        lambda at: damaged(at, "plan.json", b'{"format": "eke artifact 1"}'),
        ValueError,
        "plan.json must have the format 'eke artifact ...', got 'eke artifact 1'.",
        "Another version of eke wrote it.",
        "Load it with that version, or compress again.",
    ),
    Row(
        "a plan with a damaged entry",
        lambda at: tampered(at, structures={"0": "UniformGrid(8)"}),
        ValueError,
        "plan.json is damaged (...): restore it or compress again.",
        "It was edited.",
        RESTORE,
    ),
    Row(
        "a plan with a damaged surgery",
        lambda at: tampered(at, surgery="none"),
        ValueError,
        "plan.json: This is not a surgery",
        "It was edited.",
        RESTORE,
    ),
]
