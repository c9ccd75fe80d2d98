"""Criteria are exact where their model is, masks are nested, and nothing but the masks comes out."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.sparsity import OBD, OBS, LinearModel, MaskSet, QuadraticModel, Wanda, WoodFisher, kept_after, magnitude, prune


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def mlp():
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def data(count=24, parts=2):
    x, y = torch.randn(count, 9), torch.randint(3, (count,))
    return list(zip(x.chunk(parts), y.chunk(parts)))


CRITERIA = {
    "magnitude": lambda batches: magnitude,
    "linear": lambda batches: LinearModel(cross_entropy, batches),
    "quadratic": lambda batches: QuadraticModel(cross_entropy, batches),
    "empirical": lambda batches: QuadraticModel(cross_entropy, batches, fisher="empirical"),
    "drawn": lambda batches: OBD(cross_entropy, batches, fisher="mc", generator=torch.Generator().manual_seed(0)),
    "obd": lambda batches: OBD(cross_entropy, batches),
    "obs": lambda batches: OBS(cross_entropy, batches),
    "woodfisher": lambda batches: WoodFisher(cross_entropy, batches, block=7, damping=1e-3),
    "wanda": lambda batches: Wanda(cross_entropy, batches),
}


class Separable(nn.Module):
    """A loss whose Hessian in the weights is diagonal: each weight has an input of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1, bias=False)

    def forward(self, x):
        return self.layer(x)


def separable():
    x = math.sqrt(5) * torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1]))
    return Separable(), x


def half_squares(net, batch):
    return 0.5 * (net(batch[0]) - batch[1]).square().sum(1).mean()


@pytest.mark.parametrize("at_minimum", [True, False])
def test_second_order_is_exact_on_a_separable_quadratic(at_minimum):
    net, x = separable()
    with torch.no_grad():
        y = net(x) if at_minimum else net(x) + torch.randn(5, 1)
    batch = (x, y)
    quadratic = QuadraticModel(half_squares, [batch]).parts(net, ["layer.weight"])["layer.weight"]
    obd = OBD(half_squares, [batch]).parts(net, ["layer.weight"])["layer.weight"]
    before = float(half_squares(net, batch).detach())
    for gone in ([0], [1, 3], [0, 1, 2, 3, 4]):
        cut = copy.deepcopy(net)
        with torch.no_grad():
            cut.layer.weight[0, gone] = 0
        change = float(half_squares(cut, batch).detach()) - before
        assert math.isclose(float(sum(quadratic)[0, gone].sum()), change, rel_tol=1e-12, abs_tol=1e-13)
        if at_minimum:
            assert math.isclose(float(sum(obd)[0, gone].sum()), change, rel_tol=1e-12, abs_tol=1e-13)
        else:
            missing = change - float(sum(obd)[0, gone].sum())
            assert math.isclose(missing, float(quadratic[0][0, gone].sum()), rel_tol=1e-9, abs_tol=1e-12)


def test_first_order_is_exact_on_a_linear_loss():
    net, x, slope = Separable(), torch.randn(7, 5), torch.randn(7, 1)

    def linear(model, batch):
        return (model(batch[0]) * batch[1]).sum(1).mean()

    parts = LinearModel(linear, [(x, slope)]).parts(net, ["layer.weight"])["layer.weight"]
    cut = copy.deepcopy(net)
    with torch.no_grad():
        cut.layer.weight[0, [1, 4]] = 0
    change = float((linear(cut, (x, slope)) - linear(net, (x, slope))).detach())
    assert math.isclose(float(parts[0][0, [1, 4]].sum()), change, rel_tol=1e-12)
    assert not parts[1].any()


@pytest.mark.parametrize("name", ["linear", "quadratic", "obd"])
def test_strong_damping_is_magnitude(name):
    net, batches = mlp(), data()
    strong = prune(net, CRITERIA[name](batches), 0.2, steps=3, damping=1e12)
    plain = prune(net, magnitude, 0.2, steps=3)
    assert all(torch.equal(strong[n], plain[n]) for n in plain)


def test_magnitude_does_not_care_about_steps():
    net = mlp()
    once, often = prune(net, magnitude, 0.1, steps=1), prune(net, magnitude, 0.1, steps=37)
    assert all(torch.equal(once[n], often[n]) for n in once)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic"])
@pytest.mark.parametrize("density", [0.011, 0.5, 1.0])
def test_schedules_end_where_they_should_and_never_turn_back(schedule, density):
    counts = [kept_after(t, steps=14, total=9973, density=density, schedule=schedule) for t in range(1, 15)]
    assert counts[-1] == 9973 - round(9973 * (1 - density))
    assert counts == sorted(counts, reverse=True)
    if schedule == "exponential":
        assert all(c == 9973 - round(9973 * (1 - density ** (t / 14))) for t, c in enumerate(counts, 1))


@pytest.mark.parametrize("name", CRITERIA)
def test_masks_are_nested_and_keep_what_was_asked(name):
    net, batches = mlp(), data()
    total = sum(m.weight.numel() for m in net if isinstance(m, nn.Linear))
    seen = []
    masks = prune(net, CRITERIA[name](batches), 0.3, steps=4, progress=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert masks.kept == total - round(total * 0.7)
    assert [s.kept for s in masks.steps] == [kept_after(t, steps=4, total=total, density=0.3) for t in range(1, 5)]
    half = prune(net, CRITERIA[name](batches), 0.3**0.5, steps=2)
    assert all(bool((half[n] | ~masks[n]).all()) for n in masks)
    assert set(masks) == {"0.weight", "2.weight", "4.weight"}


def test_predicted_and_actual_losses_are_told():
    net, batches = mlp(), data(parts=1)
    steps = prune(net, QuadraticModel(cross_entropy, batches), 0.5, steps=8).steps
    cut = copy.deepcopy(net)
    assert math.isclose(steps[0].before, float(cross_entropy(net, batches[0]).detach()), rel_tol=1e-12)
    assert all(a.after == b.before for a, b in itertools.pairwise(steps))
    prune(net, QuadraticModel(cross_entropy, batches), 0.5, steps=8).apply_(cut)
    assert math.isclose(steps[-1].after, float(cross_entropy(cut, batches[0]).detach()), rel_tol=1e-12)
    # First steps are small: there the model is near the truth.
    assert abs(steps[0].predicted - (steps[0].after - steps[0].before)) < 0.05 * abs(steps[-1].after - steps[0].before)


def test_wanda_and_rows():
    net, batches = nn.Sequential(nn.Linear(9, 4)), data()
    x = torch.cat([b[0] for b in batches])
    scores = Wanda(cross_entropy, batches)(net, ["0.weight"])["0.weight"]
    torch.testing.assert_close(scores, net[0].weight.detach().abs() * x.norm(dim=0))
    masks = prune(net, Wanda(cross_entropy, batches), 4 / 9, steps=1, scope="row")
    assert masks["0.weight"].sum(1).tolist() == [4] * 4
    expected = scores.topk(4, dim=1).indices.sort(1).values
    assert torch.equal(masks["0.weight"].nonzero()[:, 1].view(4, 4), expected)


def test_obs_score_is_the_error_of_refitting():
    net, batches = nn.Sequential(nn.Linear(9, 3, bias=False)), data(200, 4)
    x = torch.cat([b[0] for b in batches])
    scores = OBS(cross_entropy, batches, damping=0.0)(net, ["0.weight"])["0.weight"]
    y = x @ net[0].weight.detach().T
    for row, gone in ((0, 3), (1, 8)):
        others = [j for j in range(9) if j != gone]
        fit = torch.linalg.lstsq(x[:, others], y[:, row : row + 1]).solution
        error = 0.5 * float((x[:, others] @ fit - y[:, row : row + 1]).square().sum())
        assert math.isclose(float(scores[row, gone]), error, rel_tol=1e-10)


def test_woodfisher_score_is_that_of_the_inverse():
    net, batches = nn.Sequential(nn.Linear(9, 3, bias=False)), data(12, 3)
    scores = WoodFisher(cross_entropy, batches, block=9, damping=0.01)(net, ["0.weight"])["0.weight"]
    gradients = []
    for x, y in batches:
        for i in range(len(x)):
            (g,) = torch.autograd.grad(cross_entropy(net, (x[i : i + 1], y[i : i + 1])), net[0].weight)
            gradients.append(g)
    g = torch.stack(gradients)
    for row in range(3):
        fisher = 0.01 * torch.eye(9) + g[:, row].T @ g[:, row] / 12
        expected = 0.5 * net[0].weight[row].detach().square() / torch.linalg.inv(fisher).diagonal()
        torch.testing.assert_close(scores[row], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_layer_is_emptied(scope):
    net = mlp()
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
    if scope == "global":
        with pytest.warns(UserWarning, match="fewer than 2 entries"):
            masks = prune(net, magnitude, 0.1, steps=1, min_per_layer=2)
    else:
        masks = prune(net, magnitude, 0.1, steps=1, min_per_layer=2, scope="layer")
    assert all(int(mask.sum()) >= 2 for mask in masks.values())
    assert prune(net, magnitude, 0.1, steps=1, min_per_layer=0)["2.weight"].sum() == 0


def test_the_model_its_gradients_and_the_generator_stay():
    net, batches = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train(), data()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    prune(net, QuadraticModel(cross_entropy, batches), 0.5, steps=2)
    assert net.training
    assert net[1].training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, lr=0.01),
])  # fmt: skip
def test_what_is_gone_stays_gone_in_training(make):
    net, batches = mlp(), data()
    masks, optimizer = prune(net, magnitude, 0.3, steps=1), make(net.parameters())
    handle = masks.follow(net, optimizer)
    for _ in range(5):
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(net, batch).backward()
            optimizer.step()
    assert all(not bool(dict(net.named_parameters())[n][~mask].any()) for n, mask in masks.items())
    held = [v for v in optimizer.state[net[0].weight].values() if v.shape == net[0].weight.shape]
    assert held
    assert all(not bool(v[~masks["0.weight"]].any()) for v in held)
    handle.remove()
    cross_entropy(net, batches[0]).backward()
    optimizer.step()
    assert bool(net[0].weight[~masks["0.weight"]].any())


def test_masks_can_be_put_in_and_taken_out():
    net = mlp()
    masks = prune(net, magnitude, 0.3, steps=1)
    whole = net[0].weight.detach().clone()
    masks.parametrize_(net)
    assert torch.equal(net[0].weight, whole * masks["0.weight"])
    net[0].weight.sum().backward()
    masks.unparametrize_(net)
    assert isinstance(net[0].weight, nn.Parameter)
    assert torch.equal(net[0].weight, whole * masks["0.weight"])
    with pytest.raises(ValueError, match="carries no mask to take out"):
        masks.unparametrize_(net)


def test_saved_masks_take_one_bit_an_entry_and_come_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Linear(201, 77))
    masks = prune(net, magnitude, 0.2, steps=1)
    masks.save(tmp_path / "masks.safetensors")
    back = MaskSet.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(back[n], masks[n]) for n in masks)
    assert (tmp_path / "masks.safetensors").stat().st_size < masks.total / 8 + 1000
    assert "3311 of 16557" in repr(masks) or masks.kept == 16557 - round(16557 * 0.8)


def test_what_does_not_fit_is_refused(tmp_path):
    net, batches = mlp(), data()
    for density in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            prune(net, magnitude, density)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        prune(net, magnitude, 0.5, steps=0)
    with pytest.raises(ValueError, match="damping >= 0"):
        prune(net, magnitude, 0.5, damping=-1.0)
    with pytest.raises(ValueError, match=r"keeps 7 of 138 entries, fewer than min_per_layer=10 for each of 3"):
        prune(net, magnitude, 0.05, min_per_layer=10)
    with pytest.raises(ValueError, match=r"no parameter '0.wight'\. Did you mean '0.weight'"):
        prune(net, magnitude, 0.5, names=["0.wight"])
    with pytest.raises(ValueError, match="no weights to prune"):
        prune(nn.Tanh(), magnitude, 0.5)
    with pytest.raises(ValueError, match=r"'0\.bias' is no matrix"):
        prune(net, OBD(cross_entropy, batches), 0.5, names=["0.bias"])
    with pytest.raises(ValueError, match="0 batches"):
        prune(net, OBD(cross_entropy, []), 0.5)
    with pytest.raises(ValueError, match=r"Scores of '0.weight' are not finite in step 1"):
        prune(
            net,
            lambda model, names: {n: torch.full_like(dict(model.named_parameters())[n], math.nan) for n in names},
            0.5,
        )
    with pytest.raises(TypeError, match=r"must be boolean, got torch\.float64"):
        MaskSet({"a": torch.ones(3)})
    masks = prune(net, magnitude, 0.5, steps=1)
    with pytest.raises(ValueError, match=r"mask of '0\.weight' has shape"):
        masks.apply_(nn.Sequential(nn.Linear(4, 4)))
    (tmp_path / "x").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(ValueError, match="is no 'eke masks 1' file"):
        MaskSet.load(tmp_path / "x")
