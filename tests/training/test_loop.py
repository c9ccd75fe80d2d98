"""The training loop: the order of samples follows from seed and epoch alone."""

from __future__ import annotations

import pytest
import torch

from eke.training import run
from eke.training.loop import order


def record(**options) -> tuple[list[tuple[int, list[int]]], list[float]]:
    seen = []

    def step(index, samples):
        seen.append((index, samples.tolist()))
        return float(index)

    return seen, run(step, **options)


@pytest.mark.parametrize("start", range(12))
def test_a_run_that_continues_sees_what_an_uninterrupted_one_sees(start):
    whole, losses = record(samples=10, batch_size=3, steps=11, seed=4)
    rest, later = record(samples=10, batch_size=3, steps=11, start=min(start, 11), seed=4)
    assert rest == whole[start:]
    assert later == losses[start:]


def test_an_epoch_uses_every_sample_at_most_once():
    seen, _ = record(samples=10, batch_size=3, steps=9)
    for epoch in range(3):
        used = [i for _, samples in seen[3 * epoch : 3 * epoch + 3] for i in samples]
        assert len(used) == len(set(used)) == 9
        assert used == order(10, epoch=epoch, seed=0)[:9].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(order(50, epoch=epoch, seed=seed).tolist()) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25
    assert all(sorted(o) == list(range(50)) for o in orders)


@pytest.mark.parametrize("seed", [0, -3, 2**62])
def test_any_whole_number_is_a_seed(seed):
    assert sorted(order(7, epoch=3, seed=seed).tolist()) == list(range(7))


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    first, _ = record(samples=8, batch_size=2, steps=6, seed=1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert record(samples=8, batch_size=2, steps=6, seed=1)[0] == first
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_is_never_larger_than_the_data():
    seen, _ = record(samples=3, batch_size=100, steps=2)
    assert [sorted(samples) for _, samples in seen] == [[0, 1, 2], [0, 1, 2]]


def test_progress_follows_each_step():
    told = []
    run(lambda index, _: index / 2, samples=4, batch_size=2, steps=3, after=lambda *x: told.append(x))
    assert told == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_no_steps_call_nothing():
    assert record(samples=4, batch_size=2, steps=0) == ([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(value):
    with pytest.raises(FloatingPointError, match=rf"The loss became {value} at step 2 of 5: lower the learning rate"):
        run(lambda index, _: value if index == 2 else 1.0, samples=4, batch_size=2, steps=5)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"samples": 0}, "samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"start": 6}, "start=6"),
        ({"start": -1}, "start=-1"),
        ({"steps": -1}, "steps=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, shown):
    with pytest.raises(
        ValueError, match=rf"needs samples >= 1, batch_size >= 1 and 0 <= start <= steps, got .*{shown}"
    ):
        run(lambda *_: 0.0, **{"samples": 4, "batch_size": 2, "steps": 5, **options})
