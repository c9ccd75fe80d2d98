"""Times of modules in place, on a simulated clock that the modules advance themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eke.cost import module_times


class Clock:
    """Nanoseconds that only `Spend` modules add to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Spend(nn.Module):
    """Takes some milliseconds."""

    def __init__(self, clock: Clock, *milliseconds: float) -> None:
        super().__init__()
        self.clock, self.milliseconds, self.calls = clock, milliseconds, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += round(self.milliseconds[self.calls % len(self.milliseconds)] * 1e6)
        self.calls += 1
        return x


class Net(nn.Module):
    """Its own work besides its children's; `unused` never runs."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.first, self.unused = Spend(clock, 3.0), Spend(clock, 100.0)
        self.block = nn.Sequential(Spend(clock, 5.0), Spend(clock, 7.0))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 2_000_000
        return self.block(self.first(self.first(x)))


X = torch.zeros(1, 3)


def test_innermost_modules_and_the_rest_sum_to_the_pass():
    clock = Clock()
    times = module_times(Net(clock).eval(), X, seconds=0.5, clock=clock)
    assert times == pytest.approx({"first": 6e-3, "block.0": 5e-3, "block.1": 7e-3, "": 2e-3})


def test_median_shrugs_off_an_interrupted_pass():
    clock = Clock()
    net = nn.Sequential(Spend(clock, *[1.0] * 12, 500.0), Spend(clock, 1.0)).eval()
    times = module_times(net, X, seconds=1.0, clock=clock)
    assert times == pytest.approx({"0": 1e-3, "1": 1e-3, "": 0.0}, abs=1e-12)


def test_budget_ends_the_measurement_after_at_least_three_pairs_of_passes():
    for milliseconds, seconds, passes in ((1.0, 0.1, 101), (1000.0, 0.5, 7)):
        clock = Clock()
        net = nn.Sequential(Spend(clock, milliseconds)).eval()
        module_times(net, X, seconds=seconds, clock=clock)
        assert abs(net[0].calls - passes) <= 2


def test_attention_is_innermost_although_it_owns_a_projection():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        times = module_times(layer, torch.zeros(2, 3, 8), seconds=0.01)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert {"self_attn", "linear1", "linear2", ""} <= set(times)
    assert "self_attn.out_proj" not in times


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_removed_and_nothing_changes():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    threads = torch.get_num_threads()
    module_times(net, X, seconds=0.01, threads=threads + 1)
    assert hooks(net) == 0
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_hooks_are_removed_when_forward_fails(fails_at):
    class Fail(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > fails_at:
                raise KeyError("inside")
            return x

    net = nn.Sequential(nn.Identity(), Fail()).eval()
    with pytest.raises(KeyError, match="inside"):
        module_times(net, X)
    assert hooks(net) == 0


def test_keyword_inputs():
    assert set(module_times(nn.Sequential(nn.Linear(3, 4)).eval(), {"input": X}, seconds=0.01)) == {"0", ""}


def test_a_single_module_is_all_rest():
    clock = Clock()
    assert module_times(Spend(clock, 4.0).eval(), X, seconds=0.1, clock=clock) == pytest.approx({"": 4e-3})


def test_train_mode_is_refused():
    with pytest.raises(ValueError, match=r"needs Linear in eval mode, but model\.training is True; call model\.eval"):
        module_times(nn.Linear(3, 4), X)


def test_compiled_models_are_refused():
    class Compiled(nn.Module):
        """Looks like what torch.compile returns."""

        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(3, 4)

    with pytest.raises(ValueError, match=r"Compiled is compiled .* pass model\._orig_mod"):
        module_times(Compiled().eval(), X)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_budget_must_be_positive(seconds):
    with pytest.raises(ValueError, match=f"seconds must be a positive number, got {seconds!r}"):
        module_times(nn.Linear(3, 4).eval(), X, seconds=seconds)


def test_fewer_pairs_of_passes_may_be_asked_for():
    clock = Clock()
    net = nn.Sequential(Spend(clock, 1000.0)).eval()
    times = module_times(net, X, seconds=0.5, fewest_pairs=1, clock=clock)
    assert net[0].calls == 3  # one to see which modules run
    assert times == pytest.approx({"0": 1.0, "": 0.0})


def test_no_pair_of_passes_is_refused():
    with pytest.raises(ValueError, match="at least one pair of passes, got fewest_pairs=0"):
        module_times(nn.Sequential(nn.ReLU()).eval(), X, fewest_pairs=0)
