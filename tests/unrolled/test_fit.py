"""Training: what is trained when, what stays as it was, and that errors fall."""

from __future__ import annotations

import pytest
import torch

from eke.unrolled import (
    ALISTA,
    LISTA,
    LISTACP,
    LISTACPSS,
    Deepening,
    HyperLISTA,
    LayerWise,
    TiLISTA,
    decibels,
    fit,
    nmse_db,
    squared_error,
)

from .cases import small

A, X, B = small(batch=64, nonzeros=2)
QUICK = Deepening(every=2, steps=20, rate=0.01, last=((10, 0.003),))


@pytest.mark.parametrize("schedule", [QUICK, LayerWise(steps=12, rate=0.01)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("network", "dtype"),
    [
        (LISTA, torch.float64),
        (LISTACP, torch.complex64),
        (LISTACPSS, torch.float64),
        (TiLISTA, torch.float32),
        (ALISTA, torch.complex128),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_training_lowers_the_error_on_other_problems(network, schedule, dtype):
    a, x, b = small(batch=456, nonzeros=2, dtype=dtype)
    options = {} if network is ALISTA else {"penalty": 0.1}
    before = network(a, layers=3, **options)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    trained = fit(before, x[:400], b[:400], schedule=schedule, batch_size=64, held_out=(x[400:], b[400:]))
    assert trained.nmse_db[-1] < nmse_db(before(b[400:]), x[400:]) - 0.5
    assert trained.nmse_db[-1] == pytest.approx(nmse_db(trained.solver(b[400:]), x[400:]))
    assert len(trained.nmse_db) == 3
    assert all(torch.equal(kept[name], value) for name, value in before.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in trained.solver.parameters())


def test_first_stages_train_one_layer_and_later_ones_all_so_far():
    stages = LayerWise(steps=5, rate=1.0).stages(3)
    assert [stage.depth for stage in stages] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert stages[6].rates == {2: 1.0}
    assert stages[7].rates == pytest.approx({0: 0.2 * 0.3**2, 1: 0.2 * 0.3, 2: 0.2})
    assert stages[8].rates == pytest.approx({0: 0.02 * 0.3**2, 1: 0.02 * 0.3, 2: 0.02})


def test_depths_grow_to_the_whole_network():
    stages = Deepening(every=2, steps=3, last=((4, 0.1),)).stages(5)
    assert [stage.depth for stage in stages] == [2, 4, 5, 5]
    assert [stage.steps for stage in stages] == [3, 3, 3, 4]
    assert stages[-1].rates == dict.fromkeys(range(5), 0.1)


def test_layers_whose_turn_has_not_come_stay():
    class FirstOnly(LayerWise):
        def stages(self, layers):
            return super().stages(layers)[:1]

    before = ALISTA(A, layers=3)
    trained = fit(before, X, B, schedule=FirstOnly(steps=3, rate=0.1)).solver
    assert not torch.equal(trained.steps[0], before.steps[0])
    assert torch.equal(trained.steps[1], before.steps[1])
    assert torch.equal(trained.log_thresholds[2], before.log_thresholds[2])


def test_progress_is_told_and_runs_repeat():
    heard = []
    first, second = (
        fit(ALISTA(A, layers=2), X, B, schedule=QUICK, batch_size=16, callback=heard.append) for _ in range(2)
    )
    assert first.losses == second.losses
    assert [told.step for told in heard[: len(first.losses)]] == list(range(1, len(first.losses) + 1))
    assert heard[0].total == len(first.losses) == 20 + 10
    assert heard[0].stage == "2 layers, rate 0.01"
    assert [told.loss for told in heard[: len(first.losses)]] == first.losses


def test_losses_are_what_they_say():
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(squared_error(x, truth)) == pytest.approx(2.0)
    assert float(decibels(x, truth)) == pytest.approx(nmse_db(x, truth))


@pytest.mark.parametrize(
    ("solver", "x", "b", "error", "says"),
    [
        (HyperLISTA(A), X, B, TypeError, "fit trains LISTA and its kin, got HyperLISTA"),
        (ALISTA(A), X[:5], B, ValueError, "x has 5 samples and b 64"),
        (ALISTA(A), B, B, ValueError, r"\(batch, 30\)"),
        (ALISTA(A.expand(64, 20, 30)), X, B, ValueError, "one for each of 64"),
    ],
)
def test_what_cannot_be_trained_is_refused(solver, x, b, error, says):
    with pytest.raises(error, match=says):
        fit(solver, x, b)


def test_losses_that_explode_are_named():
    with pytest.raises(FloatingPointError, match="inf at step 0 of 9: lower the learning rate"):
        fit(ALISTA(A, layers=1), X, B, schedule=LayerWise(steps=9, loss=lambda x, truth: x.sum().abs() * float("inf")))
