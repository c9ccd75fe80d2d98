"""Structured layers equal their dense weight, count their parameters, and start and learn as the formulas say."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eke.nn import BLASTLinear, KSConv2d, KSLinear, initial_std, named_chain, param_groups
from eke.patterns import Chain

DOUBLE = torch.float64
LAYERS = [
    ("monarch", 64, 64, {}),
    ("monarch", 37, 50, {"blocks": 3}),
    ("butterfly", 64, 64, {}),
    ("butterfly", 20, 50, {"rank": 2}),
    ("btt", 48, 36, {"rank": 3}),
    ("btt", 37, 41, {}),
    ("low_rank", 19, 23, {"rank": 4}),
    (Chain([(1, 4, 6, 12), (2, 9, 8, 4), (4, 8, 5, 2)]), 40, 48, {}),
]


@pytest.mark.parametrize(("chain", "inputs", "outputs", "more"), LAYERS, ids=lambda v: str(v))
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_its_dense_weight(chain, inputs, outputs, more, bias):
    torch.manual_seed(0)
    layer = KSLinear(inputs, outputs, chain=chain, bias=bias, dtype=DOUBLE, **more)
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, inputs, dtype=DOUBLE)
    expected = x @ layer.to_dense().T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        # float32 sums of at most a few hundred terms near 1.
        torch.testing.assert_close(layer.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in layer.parameters()) == layer.chain.parameters + bias * outputs


def test_known_chains():
    assert named_chain("monarch", (64, 64)) == Chain([(1, 16, 16, 4), (4, 16, 16, 1)])
    assert named_chain("monarch", (64, 64)).parameters == 2048
    assert named_chain("butterfly", (64, 64)) == Chain.butterfly(64)
    assert named_chain("btt", (64, 36), rank=1) == Chain([(1, 8, 6, 8), (6, 8, 6, 1)])
    for chain, inputs, outputs, more in LAYERS[:-1]:
        assert named_chain(chain, (outputs, inputs), **more).chainable


def test_flops_are_two_a_parameter_and_row():
    layer = KSLinear(64, 64, chain="monarch", bias=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(5, 64))
    assert counter.get_total_flops() == 2 * 5 * layer.chain.parameters


def test_gradients():
    layer = KSLinear(7, 6, chain="monarch", blocks=2, dtype=DOUBLE)
    x = torch.randn(3, 7, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *p: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize(("chain", "inputs", "outputs", "more"), LAYERS[:-1], ids=lambda v: str(v))
def test_projection_of_a_member_is_exact(chain, inputs, outputs, more):
    torch.manual_seed(1)
    member = KSLinear(inputs, outputs, chain=chain, dtype=DOUBLE, **more)
    dense = nn.Linear(inputs, outputs, dtype=DOUBLE)
    rows, cols = member.chain.shape
    with torch.no_grad():
        if rows > outputs or cols > inputs:  # a cut member need not be one
            member = KSLinear(cols, rows, chain=member.chain, dtype=DOUBLE)
            dense = nn.Linear(cols, rows, dtype=DOUBLE)
        dense.weight.copy_(member.to_dense())
    found = KSLinear.from_dense(dense, chain=member.chain)
    torch.testing.assert_close(found.to_dense(), dense.weight, rtol=1e-8, atol=1e-9)
    assert torch.equal(found.bias, dense.bias)


def test_a_full_chain_reproduces_any_layer_and_the_layer_stays():
    dense = nn.Linear(30, 22)
    before = dense.weight.clone()
    found = KSLinear.from_dense(dense, chain="low_rank", rank=22)
    x = torch.randn(5, 30)
    torch.testing.assert_close(found(x), dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(before, dense.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
    ],
    ids=str,
)
def test_convolution_is_its_dense_weight(options):
    torch.manual_seed(0)
    options = {"kernel_size": 1, **options}
    kernel = options.pop("kernel_size")
    layer = KSConv2d(6, 10, kernel, chain="monarch", blocks=2, dtype=DOUBLE, **options)
    nn.init.normal_(layer.linear.bias)
    x = torch.randn(2, 6, 9, 8, dtype=DOUBLE)
    expected = nn.functional.conv2d(x, layer.to_dense(), layer.linear.bias, **options)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_convolution_from_dense():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer = KSConv2d.from_dense(conv, chain="low_rank", rank=6)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    assert all(p.device.type == "cpu" for p in layer.parameters())


def test_blast_is_its_dense_weight():
    torch.manual_seed(0)
    layer = BLASTLinear(13, 17, blocks=(3, 2), rank=4, dtype=DOUBLE)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 13, dtype=DOUBLE)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias, rtol=1e-12, atol=1e-12)
    even = BLASTLinear(12, 18, blocks=(3, 2), rank=4, bias=False)
    assert sum(p.numel() for p in even.parameters()) == 4 * (12 + 18 + 3 * 2)


def test_blast_with_equal_couplings_is_low_rank():
    for blocks in (1, 3):
        layer = BLASTLinear(12, 12, blocks=blocks, rank=4, dtype=DOUBLE)
        nn.init.ones_(layer.middle)
        assert torch.linalg.matrix_rank(layer.to_dense()) == 4


def blast_member(seed=0, dtype=DOUBLE):
    member = BLASTLinear(16, 16, blocks=2, rank=2, dtype=dtype)
    member.reset_parameters(generator=torch.Generator().manual_seed(seed))
    dense = nn.Linear(16, 16, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(member.to_dense())
    return member, dense


def distance(layer, dense):
    return float((layer.to_dense() - dense.weight).detach().norm() / dense.weight.detach().norm())


@pytest.mark.parametrize("start", [None, 1])
def test_blast_error_never_grows_and_vanishes_at_full_rank(start):
    _, dense = blast_member()
    errors = []
    for sweeps in (1, 3, 10, 100):
        generator = None if start is None else torch.Generator().manual_seed(start)
        found = BLASTLinear.from_dense(dense, blocks=2, rank=2, sweeps=sweeps, generator=generator)
        errors.append(distance(found, dense))
    # Equal up to the ridge of the normal equations.
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    full = BLASTLinear.from_dense(dense, blocks=2, rank=16)
    torch.testing.assert_close(full.to_dense(), dense.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "cols", "blocks", "rank"), [(16, 16, 2, 2), (17, 13, (3, 2), 4), (24, 30, 3, 5)])
def test_blast_is_no_worse_than_the_best_matrix_of_its_rank(rows, cols, blocks, rank):
    dense = nn.Linear(cols, rows, dtype=DOUBLE)
    nn.init.normal_(dense.weight, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(dense.weight.detach())
    best = float(values[rank:].norm() / values.norm())
    found = distance(BLASTLinear.from_dense(dense, blocks=blocks, rank=rank), dense)
    assert found <= best * (1 + 1e-9)
    # More couplings than one a rank: strictly better on a matrix without structure.
    assert found < 0.98 * best


def test_blast_near_a_member_finds_it_again():
    member, dense = blast_member()
    nn.init.ones_(member.middle)  # where the sweeps start
    found = copy.deepcopy(member)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        dense.weight.copy_(member.to_dense())
        for factor in (found.left, found.right):
            factor.add_(0.01 * torch.randn(factor.shape, dtype=DOUBLE, generator=generator))
        assert distance(found, dense) > 1e-3
        found._fit(dense.weight, 200, from_rank=False)
    assert distance(found, dense) < 1e-8


def test_the_best_of_some_random_starts_recovers_a_member():
    _, dense = blast_member()
    starts = [torch.Generator().manual_seed(seed) for seed in range(12)]
    errors = [distance(BLASTLinear.from_dense(dense, blocks=2, rank=2, sweeps=300, generator=g), dense) for g in starts]
    assert min(errors) < 1e-6


def projections():
    chain, blast = {"chain": "monarch", "blocks": 2}, {"blocks": 2, "rank": 3}
    return [
        (KSLinear.from_dense, nn.Linear(10, 14), chain),
        (KSConv2d.from_dense, nn.Conv2d(4, 6, 3, padding=1), chain),
        (BLASTLinear.from_dense, nn.Linear(10, 14), blast),
    ]


@pytest.mark.parametrize("number", range(3), ids=["KSLinear", "KSConv2d", "BLASTLinear"])
def test_projection_leaves_everything_else_alone(number):
    project, dense, options = projections()[number]
    before, weight = torch.get_rng_state(), dense.weight.clone()
    for training in (True, False):
        for wanted in (True, False):
            layer = project(dense.train(training).requires_grad_(wanted), **options)
            assert all(module.training == training for module in layer.modules())
            assert all(p.requires_grad == wanted for p in layer.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(dense.weight, weight)


@pytest.mark.parametrize("number", range(3), ids=["KSLinear", "KSConv2d", "BLASTLinear"])
def test_projection_of_bfloat16(number):
    project, dense, options = projections()[number]
    dense = dense.to(torch.bfloat16)
    layer = project(dense, **options)
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    exact = project(dense.double(), **options)
    # Factors rounded to 8 bits each.
    assert float((layer.to_dense().double() - exact.to_dense()).norm() / exact.to_dense().norm()) < 0.03


def test_blast_takes_an_empty_batch():
    layer = BLASTLinear(13, 17, blocks=(3, 2), rank=4)
    assert layer(torch.ones(0, 13)).shape == (0, 17)
    assert layer(torch.ones(2, 0, 13)).shape == (2, 0, 17)
    layer(torch.ones(0, 13)).sum().backward()
    assert not layer.left.grad.any()


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_sets_the_type_of_padded_outputs(grad):
    layers = [
        KSLinear(50, 37, chain="monarch"),
        KSLinear(64, 64, chain="monarch"),
        BLASTLinear(13, 17, blocks=(3, 2), rank=4),
    ]
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        with torch.set_grad_enabled(grad):
            exact = layer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(x)
        assert (y.dtype, y.shape) == (torch.bfloat16, (3, layer.out_features))
        assert float((y.float() - exact).norm() / exact.norm()) < 0.03


def test_initial_values_follow_the_formula_and_keep_the_variance():
    torch.manual_seed(0)
    monarch = KSLinear(256, 256, chain="monarch", blocks=16)
    assert [initial_std(core.fan_in, core.fan_out) for core in monarch.cores()] == [0.25, 0.25]
    assert initial_std(2, 2) == pytest.approx(1 / math.sqrt(2))
    assert initial_std(16, 4) == pytest.approx(1 / 8)
    for layer in (monarch, KSLinear(1024, 1024, chain="butterfly"), KSLinear(256, 512, chain="monarch")):
        x = torch.randn(2000, layer.in_features)
        ratios = []
        for seed in range(16):  # one draw of a butterfly is off by as much as 10 %
            layer.reset_parameters(generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                ratios.append(float(layer(x).var() / x.var()))
        assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.05)
    monarch.zero_output_()
    assert not monarch(torch.ones(1, 256)).any()


def test_learning_rates_follow_the_formula():
    model = nn.Sequential(
        nn.Linear(64, 256),
        KSLinear(256, 256, chain="monarch", blocks=16),
        KSLinear(256, 256, chain="butterfly"),
        nn.LayerNorm(256),
    )
    groups = {group["lr"]: group["params"] for group in param_groups(model, lr=0.01)}
    assert sorted(groups) == [0.01, pytest.approx(0.08), pytest.approx(0.16)]
    assert [len(groups[rate]) for rate in sorted(groups)] == [6, 2, 8]
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in model.parameters()}
    model[1].factors[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in param_groups(model, lr=0.01)) == 15
    torch.optim.Adam(param_groups(model, lr=0.01))


def test_compile_state_and_copies():
    torch.manual_seed(0)
    layer = KSLinear(20, 30, chain="monarch", blocks=2)
    x = torch.randn(4, 20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    other = KSLinear(20, 30, chain="monarch", blocks=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match=r"one of 'monarch', 'butterfly', 'btt', 'low_rank', got 'kaleidoscope'"):
        KSLinear(8, 8, chain="kaleidoscope")
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        KSLinear(8, 8, chain="btt", rank=0)
    with pytest.raises(ValueError, match=r"blocks is a positive number for chain='monarch', got 3 with 'btt'"):
        KSLinear(8, 8, chain="btt", blocks=3)
    with pytest.raises(ValueError, match=r"'low_rank' needs rank=, a number from 1 to 8, got None"):
        KSLinear(8, 9, chain="low_rank")
    with pytest.raises(ValueError, match=r"belong to a named chain, got rank=2, blocks=None"):
        KSLinear(8, 8, chain=Chain.butterfly(8), rank=2)
    with pytest.raises(ValueError, match=r"at least 9 rows and 8 columns, got 8 x 8"):
        KSLinear(8, 9, chain=Chain.butterfly(8))
    with pytest.raises(ValueError, match=r"takes \(\.\.\., 8\), got \(2, 9\)"):
        KSLinear(8, 8, chain="btt")(torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"takes \(batch, 3, height, width\), got \(3, 4, 4\)"):
        KSConv2d(3, 4, 1, chain="btt")(torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"one group and a number of zeros.*groups=2"):
        KSConv2d.from_dense(nn.Conv2d(4, 4, 1, groups=2), chain="btt")
    with pytest.raises(ValueError, match=r"blocks from 1 to the features, got rank=2, blocks=9"):
        BLASTLinear(8, 8, blocks=9, rank=2)
    with pytest.raises(ValueError, match=r"takes \(\.\.\., 8\), got \(2, 9\)"):
        BLASTLinear(8, 8, blocks=2, rank=2)(torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"positive learning rate, got -1"):
        param_groups(nn.Linear(2, 2), lr=-1)
