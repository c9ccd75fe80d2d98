"""The main job end to end on a tiny net: what it promises, what it leaves alone, what it continues."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import eke
from eke import Budget, Counts, compress, load
from eke.compression import InfeasibleError, Recovery, Task, accuracy, cross_entropy
from eke.compression.artifact import WEIGHTS
from eke.compression.solver import quick as quick_solver
from eke.structures import UniformGrid

from .conftest import shorten_measurements
from .nets import STEPS, Tiny, batches, outputs, same, state, tiny_task, trained

BUDGET = Budget(size="0.25x", macs="0.5x")
STAGES = ("statistics", "candidates", "calibration", "costs", "plan", "recover", "verify")


def run(model, task=None, **options):
    return compress(model, task or tiny_task(), **{"budget": BUDGET, "recovery": STEPS, **options})


@pytest.fixture(scope="module")
def model():
    return trained(seed=1)


@pytest.fixture(scope="module")
def result(model):
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch.setattr)
        return run(model)


@pytest.fixture(scope="module")
def reference(result, tmp_path_factory) -> bytes:
    """The weights file of an uninterrupted run."""
    return (result.save(tmp_path_factory.mktemp("reference")) / WEIGHTS).read_bytes()


def test_bytes_and_work_keep_the_budget(result):
    assert result.met
    assert {line.name for line in result.budget_lines} == {"size", "macs"}
    assert result.after.bytes <= 0.25 * result.before.bytes
    assert result.after.flops <= 0.5 * result.before.flops
    assert result.after.flops == eke.cost.flops(result.model, batches()[0][0])
    assert result.before.flops == eke.cost.flops(trained(seed=1), batches()[0][0])


def test_the_quoted_bytes_are_those_of_the_file(result, tmp_path):
    folder = result.save(tmp_path / "a")
    assert result.after.bytes == (folder / WEIGHTS).stat().st_size
    assert result.before.bytes == eke.cost.model_bytes(trained(seed=1))


def test_the_quoted_scores_are_those_of_the_models(result, model):
    report = tiny_task().report
    assert result.before.score.correct == accuracy(model, report).correct
    assert result.after.score.correct == accuracy(result.model, report).correct
    assert result.before.score.total == 160


def test_a_saved_result_is_loaded_bit_for_bit(result, tmp_path):
    folder = result.save(tmp_path / "a")
    torch.manual_seed(9)
    loaded = load(folder, Tiny())
    assert same(state(loaded), state(result.model))
    assert torch.equal(outputs(loaded), outputs(result.model))
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html"}
    report = json.loads((folder / "report.json").read_text())
    uses = {split["name"]: split for split in report["splits"]}
    assert uses["report"]["opened"] == 1


def watch(model: nn.Module) -> dict:
    """Everything about a model that a caller could miss."""
    return {
        "state": state(model),
        "objects": [id(p) for p in (*model.parameters(), *model.buffers())],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "strides": [p.stride() for p in model.parameters()],
    }


def unchanged(before: dict, after: dict) -> bool:
    plain = [key for key in before if key not in ("state", "grads")]
    grads = zip(before["grads"], after["grads"], strict=True)
    return (
        same(before["state"], after["state"])
        and all(before[key] == after[key] for key in plain)
        and all((a is None and b is None) or torch.equal(a, b) for a, b in grads)
    )


@pytest.mark.parametrize("training", [True, False])
def test_model_and_global_random_state_are_left_alone(quick, model, training):
    mine = copy.deepcopy(model).train(training)
    mine.bn2.eval()
    mine.conv1.weight.requires_grad_(False)
    cross_entropy(mine, batches()[0]).backward()
    before, random = watch(mine), torch.get_rng_state()
    result = run(mine)
    assert unchanged(before, watch(mine))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m.training for m in result.model.modules())
    own = {p.data_ptr() for p in mine.parameters()}
    assert not own & {p.data_ptr() for p in result.model.parameters()}


def test_a_model_in_training_mode_gives_the_same_result(quick, model, reference, tmp_path):
    mine = copy.deepcopy(model).train()
    assert (run(mine).save(tmp_path) / WEIGHTS).read_bytes() == reference


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(quick, model, reference, tmp_path):
    torch.manual_seed(1234)
    assert (run(model).save(tmp_path / "same") / WEIGHTS).read_bytes() == reference
    assert (run(model, seed=1).save(tmp_path / "other") / WEIGHTS).read_bytes() != reference


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call of progress."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, []

    def __call__(self, stage: str, share: float, text: str) -> None:
        self.calls.append((stage, share))
        if len(self.calls) - 1 == self.at:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupt_at_any_stage_can_be_resumed(quick, model, reference, tmp_path):
    steps = Interrupt()
    whole = tmp_path / "whole"
    assert (run(model, folder=whole, progress=steps).save(tmp_path / "saved") / WEIGHTS).read_bytes() == reference
    assert {stage for stage, _ in steps.calls} == set(STAGES)
    stages = [stage for stage, _ in steps.calls]
    for at in sorted({stages.index(s) for s in stages} | {len(stages) - 1 - stages[::-1].index(s) for s in stages}):
        folder = tmp_path / f"run{at}"
        with pytest.raises(KeyboardInterrupt):
            run(model, folder=folder, progress=Interrupt(at))
        result = run(model, folder=folder, resume=True)
        assert (result.save(tmp_path / f"saved{at}") / WEIGHTS).read_bytes() == reference, steps.calls[at]


def test_what_was_measured_before_an_interrupt_is_not_measured_again(quick, model, tmp_path):
    seen = {}
    first = run(model, folder=tmp_path / "run", progress=lambda stage, *_: seen.setdefault(stage, 0))
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    again = run(model, folder=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "costs.json").read_text()) == costs
    exact = {name: value for name, value in first.evidence.before.items() if name != "latency"}
    assert exact.items() <= again.evidence.before.items()
    assert again.plan.picks == first.plan.picks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"budget": Budget(size="0.3x")}, "budget was"),
        ({"recovery": Recovery(steps=5)}, "recovery was"),
        ({"structures": (UniformGrid(8),)}, "structures was"),
        ({"skip": ("conv1",)}, r"skip was \[\] and is now \['conv1'\]"),
        ({"recipe": {"data": "other"}}, "data was None and is now 'other'"),
    ],
)
def test_another_recipe_cannot_be_resumed(quick, model, tmp_path, options, named):
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path / "run", progress=Interrupt(1))
    with pytest.raises(ValueError, match=rf"was started with another recipe; {named}.* Resume with the same, or start"):
        run(model, folder=tmp_path / "run", resume=True, **options)


def test_another_model_cannot_be_resumed(quick, model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path / "run", progress=Interrupt(1))
    with pytest.raises(ValueError, match="was started with another recipe"):
        run(trained(seed=2, steps=3), folder=tmp_path / "run", resume=True)


class Counting:
    """An evaluation that remembers which models it saw."""

    def __init__(self, data, answer=accuracy) -> None:
        self.data, self.answer, self.seen = data, answer, []

    def __call__(self, model: nn.Module) -> float | Counts:
        self.seen.append(state(model))
        assert not model.training
        return self.answer(model, self.data)


def plain(model, evaluate=None, report=None, **options):
    return compress(
        model, batches(192, seed=1), loss=cross_entropy, evaluate=evaluate, report=report,
        **{"budget": BUDGET, "recovery": STEPS, **options},
    )  # fmt: skip


def test_the_report_split_is_opened_once_for_original_result_and_folded_original(quick, model):
    selection, report = Counting(batches(128, seed=2)), Counting(batches(160, seed=3))
    result = plain(model, selection, report)
    original, compressed, folded = report.seen
    assert same(original, state(model))
    assert same(compressed, state(result.model))
    assert "bn1.weight" not in folded
    assert len(selection.seen) >= 2
    assert {split.name: split.opened for split in result.evidence.splits}["report"] == 1


def test_a_task_and_its_parts_give_the_same_bytes(quick, model, reference, tmp_path):
    task = tiny_task()
    result = plain(model, lambda net: accuracy(net, task.selection), lambda net: accuracy(net, task.report))
    assert (result.save(tmp_path) / WEIGHTS).read_bytes() == reference


def test_scores_may_be_plain_numbers(quick, model):
    def negative_loss(net: nn.Module) -> float:
        return -float(sum(cross_entropy(net, b) for b in batches(64, seed=2)))

    result = plain(model, negative_loss, budget=Budget(size="0.25x", max_drop="50%"))
    assert result.before.score.value == pytest.approx(negative_loss(model), rel=1e-5)
    assert result.before.score.correct is None
    assert any("No report split was given" in note for note in result.evidence.notes)


def test_without_an_evaluation_the_calibration_loss_is_the_score(quick, model):
    result = plain(model)
    data = batches(192, seed=1)
    with torch.no_grad():
        wanted = -float(sum(cross_entropy(model, b) for b in data)) / len(data)
    assert result.before.score.value == pytest.approx(wanted, rel=1e-5)


def test_a_skipped_module_keeps_its_channels_and_its_floats(quick, model):
    result = run(model, skip=("classifier", "conv2"), budget=Budget(size="0.7x"))
    assert "classifier" not in result.blueprint.structures
    assert "conv2" not in result.blueprint.structures
    assert result.model.conv2.weight.shape == model.conv2.weight.shape


def test_no_recovery_is_a_choice(quick, model):
    result = run(model, recovery=Recovery(steps=0))
    assert result.met


def test_recovery_that_makes_the_score_worse_is_set_aside(quick, model):
    def unscored(**options):
        return compress(model, batches(), loss=cross_entropy, budget=BUDGET, **options)

    found = unscored(
        recovery=Recovery(steps=30, learning_rate=0.01, match=lambda own, other: -(own - other).square().mean())
    )
    scores = found.evidence.scores
    assert scores["selection after"] == pytest.approx(scores["before recovery"], abs=1e-5)
    assert any("Recovery made the score of the selection split worse, by" in note for note in found.evidence.notes)
    assert any("below 0.01" in note for note in found.evidence.notes)
    assert same(state(found.model), state(unscored(recovery=Recovery(steps=0), solver=quick_solver).model))


def test_parameters_can_be_limited(quick, model):
    result = run(model, budget=Budget(parameters="0.7x"))
    assert result.after.parameters == eke.cost.parameters(result.model) <= 0.7 * eke.cost.parameters(model)


def test_a_compiled_model_is_unwrapped_and_it_is_said(quick, model, reference, tmp_path):
    result = run(torch.compile(model))
    assert (result.save(tmp_path) / WEIGHTS).read_bytes() == reference
    assert any("wrapped in OptimizedModule: the wrapper was taken off" in note for note in result.evidence.notes)


def test_a_distributed_model_is_unwrapped_and_it_is_said(quick, model, reference, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        result = run(nn.parallel.DistributedDataParallel(copy.deepcopy(model)))
    finally:
        torch.distributed.destroy_process_group()
    assert (result.save(tmp_path) / WEIGHTS).read_bytes() == reference
    assert any("wrapped in DistributedDataParallel" in note for note in result.evidence.notes)


def test_dictionary_batches_and_outputs_work(quick, model):
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, *, pixels):
            return {"logits": self.net(pixels)}

    def keyed(data):
        return [{"pixels": x, "labels": y} for x, y in data]

    task = Task(keyed(batches(96, seed=1)), keyed(batches(64, seed=2)), keyed(batches(64, seed=3)))
    result = run(Keyword().eval(), task)
    assert result.met


def test_ragged_batches_work(quick, model):
    data = [(x[..., : 8 - i % 2], y) for i, (x, y) in enumerate(batches(96, seed=1))]
    assert run(model, Task(data, batches(64, seed=2), batches(64, seed=3))).met


def test_an_impossible_budget_names_the_nearest_and_it_is_feasible(quick, model):
    with pytest.raises(
        InfeasibleError, match=r"below the smallest plan\. Nearest feasible: size .* \(limit .*\), macs"
    ) as error:
        run(model, budget=Budget(size="0.001x", macs="0.001x"))
    nearest = error.value.nearest
    result = run(model, budget=Budget(size=1.02 * nearest["size"], macs=1.02 * nearest["macs"]))
    assert result.met


def test_unknown_keywords_are_refused_by_name():
    with pytest.raises(TypeError, match="bugdet"):
        compress(Tiny(), batches(), bugdet=BUDGET)
    assert not [p for p in inspect.signature(compress).parameters.values() if p.kind is p.VAR_KEYWORD]


def test_a_full_disk_while_saving_leaves_the_old_artifact_readable(quick, result, tmp_path, monkeypatch):
    folder = result.save(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\); what was there before stays"):
        result.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_during_a_run_loses_nothing(quick, model, reference, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fill(stage, *_):
        if stage == "recover":
            monkeypatch.setattr(Path, "replace", full)

    with pytest.raises(OSError, match="No space left on device"):
        run(model, folder=tmp_path / "run", progress=fill)
    monkeypatch.undo()
    shorten_measurements(monkeypatch.setattr)
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.endswith((".part", ".partial"))]
    result = run(model, folder=tmp_path / "run", resume=True)
    assert (result.save(tmp_path / "a") / WEIGHTS).read_bytes() == reference


def test_every_decision_was_also_measured_alone(result, model):
    lines = {line.site: line for line in result.evidence.plan}
    assert set(lines) == {name.removeprefix("matrix:") for name in result.plan.picks}
    changed = [line for line in lines.values() if line.predicted_loss]
    assert changed
    assert all(line.measured_loss is not None for line in changed)


def test_the_measured_loss_of_a_rounded_matrix_is_that_of_the_rounded_net(quick, model):
    def nearest(structure, weight, metric):
        return structure.project(weight)

    result = run(model, budget=Budget(size="0.3x"), structures=(UniformGrid(8), UniformGrid(3)), solver=nearest)
    lines = [line for line in result.evidence.plan if line.change.endswith("bits")]
    assert lines
    data = tiny_task().calibration
    for line in lines:
        rounded = copy.deepcopy(model)
        site = next(site for site in eke.sites.find(rounded) if site.name == line.site)
        site.write_(rounded, UniformGrid(int(line.change.split()[-2])).project(site.read(rounded)))
        with torch.no_grad():
            losses = [sum(float(cross_entropy(net, batch)) for batch in data) / len(data) for net in (rounded, model)]
        assert line.measured_loss == pytest.approx(losses[0] - losses[1], abs=1e-6)
