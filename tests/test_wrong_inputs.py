"""What people give that is wrong ends in a sentence of eke's own; what merely looks wrong works.

The table is in `wrong`, one file a subject; the page docs/troubleshooting.md is made of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import eke
from compression.conftest import shorten_measurements
from eke._errors import own_words
from eke.cli.main import app
from eke.compression import cross_entropy
from wrong import COMMANDS, SECTIONS, Command, Row, commands
from wrong.data import Breaks
from wrong.row import EASY, STEPS, Wrapped, batches, changed, compress, net, pattern, splits

ROOT = Path(__file__).resolve().parent.parent
ROWS = [(f"{section}: {entry.given}", entry) for section, rows in SECTIONS.items() for entry in rows]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shorten_measurements(monkeypatch.setattr)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("entry", [entry for _, entry in ROWS], ids=[name for name, _ in ROWS])
def test_what_is_wrong_is_said_in_words_of_ekes_own(entry: Row, tmp_path):
    warnings.simplefilter("ignore")
    with pytest.raises(entry.error) as caught:
        entry.call(tmp_path)
    said = " ".join(str(caught.value).split())
    assert re.search(pattern(entry.says), said), f"{said}\nis not\n{entry.says}"
    assert entry.python or own_words(caught.value), caught.getrepr(style="short")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in commands.FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("entry", COMMANDS, ids=[entry.words for entry in COMMANDS])
def test_a_wrong_command_is_answered_without_a_traceback_of_eke(entry: Command, place, monkeypatch):
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, shlex.split(entry.words), prog_name="eke")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == entry.code, done.output
    said = " ".join(done.stderr.split())
    assert re.search(pattern(entry.says), said), f"{said}\nis not\n{entry.says}"
    assert "/src/eke/" not in said


def test_the_table_is_long_and_its_rows_have_names_of_their_own():
    assert len(ROWS) >= 60
    assert len(COMMANDS) >= 40
    names = [name for name, _ in ROWS] + [entry.words for entry in COMMANDS]
    assert len(set(names)) == len(names)


@dataclass
class Known:
    logits: torch.Tensor


torch.export.register_dataclass(Known)


class Scaled(nn.Module):
    """A model whose forward needs a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x, *, scale):
        return self.net(x) * scale


class Masked(nn.Module):
    """A model that adds a mask of 0 and minus infinity to its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x, mask):
        return self.last((self.first(x) + mask).softmax(1))


class Shared(nn.Module):
    """A model with one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.again = self.inner

    def forward(self, x):
        return self.last(self.again(self.inner(self.first(x).relu()).relu()).relu())


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def holding_an_output() -> nn.Module:
    model = net()
    model.last = model(batches()[0][0])
    return model


def pruned_once() -> nn.Module:
    model = nn.Sequential(*net(), nn.ReLU(), nn.Linear(3, 3))
    nn.utils.prune.l1_unstructured(model[4], "weight", 0.5)
    return model.eval()


def normalised_once(function) -> nn.Module:
    model = nn.Sequential(*net(), nn.ReLU(), nn.Linear(3, 3))
    function(model[4])
    return model.eval()


def hooked() -> nn.Module:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return model


def without_gradients():
    with torch.no_grad():
        return compress()


def in_inference_mode():
    model, data = net(), batches()
    with torch.inference_mode():
        return compress(model, data)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


def masked():
    mask = torch.zeros(32, 64)
    mask[:, 5:9] = -torch.inf
    return compress(Masked().eval(), [((x, mask), y) for x, y in batches()])


def larger(score):
    return lambda: compress(evaluate=lambda model: score)


def on(model, **options):
    return lambda: compress(model(), **options)


WORKS = {
    "all parameters frozen": on(frozen),
    "in training mode": on(lambda: net().train()),
    "in bfloat16": on(lambda: net().bfloat16(), data=changed(torch.Tensor.bfloat16)),
    "in float64": on(lambda: net().double(), data=changed(torch.Tensor.double)),
    "torch.compile": on(lambda: torch.compile(net())),
    "DataParallel": on(lambda: nn.DataParallel(net())),
    "torch.fx": on(lambda: torch.fx.symbolic_trace(net())),
    "hooks of the user": on(hooked),
    "one layer under two names": on(lambda: Shared().eval(), budget=EASY),
    "control flow by data": on(lambda: Wrapped(lambda inner, x: inner(x) if x.sum().item() > 0 else inner(-x))),
    "an output kept in the model": on(holding_an_output),
    "one layer pruned by torch": on(pruned_once, budget=EASY),
    "one layer with weight_norm": on(lambda: normalised_once(nn.utils.parametrizations.weight_norm), budget=EASY),
    "one layer with spectral_norm": on(lambda: normalised_once(nn.utils.parametrizations.spectral_norm), budget=EASY),
    "one layer with the older weight_norm": on(lambda: normalised_once(nn.utils.weight_norm), budget=EASY),
    "parameters made in inference mode": on(made_in_inference_mode),
    "outputs in a dictionary": on(
        lambda: Wrapped(lambda inner, x: {"scores": inner(x)}),
        loss=lambda model, batch: F.cross_entropy(model(batch[0])["scores"], batch[1]),
    ),
    "outputs in a registered dataclass": on(lambda: Wrapped(lambda inner, x: Known(inner(x)))),
    "the loss among the outputs": on(
        lambda: Wrapped(lambda inner, x: (inner(x).sum(), inner(x))),
        loss=lambda model, batch: F.cross_entropy(model(batch[0])[1], batch[1]),
    ),
    "a forward with more arguments": on(
        Scaled,
        loss=lambda model, batch: F.cross_entropy(model(batch[0], scale=2.0), batch[1]),
        forward=lambda model, batch: model(batch[0], scale=2.0),
    ),
    "a mask of minus infinity": masked,
    "inputs that require gradients": lambda: compress(data=changed(lambda x: x.clone().requires_grad_())),
    "batches of several sizes": lambda: compress(data=batches(75)),
    "a generator of structures": lambda: compress(structures=(s for s in [eke.structures.UniformGrid(4)])),
    "no structures": lambda: compress(structures=[]),
    "a score in a tensor": larger(torch.tensor(0.5)),
    "a score of numpy's": larger(np.float32(0.5)),
    "a whole number as score": larger(1),
    "under torch.no_grad()": without_gradients,
    "under torch.inference_mode()": in_inference_mode,
    "spaces in a limit": lambda: compress(budget=eke.Budget(size=" 60 % ")),
}


@pytest.mark.parametrize("name", WORKS)
def test_what_only_looks_wrong_works(name):
    warnings.simplefilter("ignore")
    result = WORKS[name]()
    assert result.evidence.after["size"] < result.evidence.before["size"]
    assert result.met


def test_a_task_that_calls_the_model_its_own_way_needs_no_example():
    task = eke.Task(*splits(), forward=lambda model, batch: model(batch[0], scale=2.0))
    result = eke.compress(Scaled(), task, budget=EASY, recovery=STEPS, seconds=0.02)
    assert result.met


def test_a_result_is_printed_as_its_verdict():
    result = compress()
    assert repr(result).startswith("<Result of Sequential: ")
    assert repr(result).endswith("Not yet reloaded in a fresh process.>")
    assert len(repr(result)) < 300


def test_flags_and_modes_are_as_before():
    model = net().train()
    model[0].weight.requires_grad_(False)
    compress(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compress(data=changed(targets=torch.zeros_like)), "The first 96 calibration targets are all 0, and"),
        (lambda: on_one_split(), "The calibration and the report split are the same data"),
        (lambda: compress(pruned_once(), budget=EASY), "Left as it is: 4: weight is masked by torch.nn.utils.prune"),
    ],
    ids=["sorted", "one split", "pruned"],
)
def test_what_may_be_a_mistake_is_a_warning(call, words):
    with pytest.warns(UserWarning, match=re.escape(words)):
        call()


def on_one_split():
    data = batches()
    return eke.compress(net(), eke.Task(data, batches(seed=5), data), budget=EASY, recovery=STEPS, seconds=0.02)


def test_a_split_that_is_used_twice_stands_in_the_report():
    with pytest.warns(UserWarning, match="are the same data"):
        result = on_one_split()
    assert any("are the same data" in note for note in result.evidence.notes)


def test_a_loss_that_changes_parameters_leaves_the_users_alone():
    model = net()
    before = [p.clone() for p in model.parameters()]

    def loss(inner, batch):
        with torch.no_grad():
            next(inner.parameters()).zero_()
        return cross_entropy(inner, batch)

    with pytest.raises(ValueError, match="changed parameters"):
        compress(model, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_what_an_error_was_caused_by_stays_in_the_chain():
    with pytest.raises(ValueError, match="Reading calibration batch 1 failed") as caught:
        compress(data=Breaks())
    assert isinstance(caught.value.__cause__, RuntimeError)


def page():
    spec = importlib.util.spec_from_file_location("troubleshooting", ROOT / "tools" / "troubleshooting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_table():
    written = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert written == page().text(), "run tools/troubleshooting.py"
    for entry in itertools.chain(*SECTIONS.values()):
        assert entry.given in written
