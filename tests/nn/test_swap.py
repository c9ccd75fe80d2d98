"""Swapped models compute what their projected weights say, and nothing of the given model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from eke.linalg import Metric
from eke.nn import KSLinear, replace_linears
from eke.patterns import Chain

DOUBLE = torch.float64
FULL = Chain([(1, 12, 16, 4), (4, 16, 4, 1)])
"""Blocks of rank 4 = min(12, 4) at the interface: every 48 x 16 matrix is a member."""


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 16, bias=False)), nn.Linear(16, 3))
    return net.double()


def test_full_chains_leave_the_outputs():
    net = small_net()
    x = torch.randn(5, 16, dtype=DOUBLE)
    rule = {(48, 16): FULL, (16, 48): FULL.transpose}
    found = replace_linears(net, lambda _, linear: rule.get((linear.out_features, linear.in_features)))
    assert [layer.name for layer in found.layers] == ["0", "2.0"]
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-10, atol=1e-10)
    assert all(layer.error is not None and layer.error < 1e-12 for layer in found.layers)


def test_the_given_model_is_not_changed():
    net = small_net()
    before, state = copy.deepcopy(net), torch.get_rng_state()
    found = replace_linears(net, "monarch", blocks=2)
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    for (name, old), (_, new) in zip(before.named_parameters(), net.named_parameters()):
        assert torch.equal(old, new), name
    assert torch.equal(state, torch.get_rng_state())
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in found.model.parameters()}


def test_the_report_is_what_the_layers_say():
    net = small_net().eval()
    found = replace_linears(net, "monarch", blocks=2, skip=["3"])
    for layer in found.layers:
        old, new = net.get_submodule(layer.name), found.model.get_submodule(layer.name)
        assert isinstance(new, KSLinear)
        assert not new.training
        error = (new.to_dense() - old.weight).norm() / old.weight.norm()
        assert layer.error == pytest.approx(error.item(), rel=1e-9)
        assert layer.lower_bound <= layer.error * (1 + 1e-9)
        assert layer.after == sum(p.numel() for p in new.factors)
        assert layer.before == old.weight.numel()
    assert found.share == sum(layer.after for layer in found.layers) / (2 * 48 * 16)
    assert type(found.model[3]) is nn.Linear


def test_a_metric_lowers_its_own_error():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 16)).double()
    x = torch.randn(200, 16, dtype=DOUBLE) * torch.logspace(-1, 1, 16, dtype=DOUBLE)
    metric = Metric(x.T @ x / len(x))
    plain = replace_linears(net, "monarch", blocks=4).model
    found = replace_linears(net, "monarch", blocks=4, metrics={"0": metric}, refine=2)

    @torch.no_grad()
    def loss(model):
        return float((model(x) - net(x)).square().sum())

    assert loss(found.model) < 0.9 * loss(plain)
    relative = (loss(found.model) / (x @ net[0].weight.T).square().sum().item()) ** 0.5
    assert found.layers[0].weighted_error == pytest.approx(relative, rel=1e-6)


def test_names_select_layers():
    net = small_net()
    assert [layer.name for layer in replace_linears(net, "monarch", match=r"^\d$").layers] == ["0", "3"]
    assert [layer.name for layer in replace_linears(net, "butterfly", skip=["0", "3"]).layers] == ["2.0"]


def test_new_weights_start_as_the_formulas_say():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256).requires_grad_(False))
    found = replace_linears(net, "monarch", blocks=16, project=False)
    layer = found.model[0]
    assert found.layers[0].error is None
    assert not layer.factors[0].requires_grad
    # 16 x 16 blocks: deviation 1/4, of 4096 draws each.
    assert float(layer.factors[0].std()) == pytest.approx(0.25, rel=0.05)
    assert float(layer.bias.abs().max()) == 0


def test_a_module_at_two_places_stays_one():
    layer = nn.Linear(8, 8)
    found = replace_linears(nn.Sequential(layer, nn.ReLU(), layer), "monarch", blocks=2)
    assert found.model[0] is found.model[2]
    assert len(found.layers) == 1


def test_a_linear_layer_itself_is_a_model():
    found = replace_linears(nn.Linear(8, 8), "monarch", blocks=2)
    assert isinstance(found.model, KSLinear)


@pytest.mark.parametrize("fused", [True, False])
def test_torch_encoder_layers_leave_their_fused_path(fused):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=fused).eval()
    found = replace_linears(net, lambda name, _: FULL if name.endswith("linear1") else None)
    assert len(found.layers) == 2
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        # Padded places differ: the fused path writes zeros there. float32.
        got, wanted = found.model(x, src_key_padding_mask=mask), net(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got[~mask], wanted[~mask], rtol=1e-4, atol=1e-4)


def test_parametrized_and_fused_layers_stay():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert [layer.name for layer in replace_linears(net, "monarch", blocks=2).layers] == ["2"]


def test_the_swapped_model_is_saved_and_loaded():
    found, other = (replace_linears(small_net(), "monarch", blocks=2, project=p).model for p in (True, False))
    other.load_state_dict(found.state_dict())
    x = torch.randn(2, 16, dtype=DOUBLE)
    assert torch.equal(found(x), other(x))


def test_wrong_arguments_are_refused():
    net = small_net()
    with pytest.raises(ValueError, match=r"skip names '2.1', which is no module of Sequential. Did you mean"):
        replace_linears(net, "monarch", skip=["2.1"])
    with pytest.raises(ValueError, match=r"No layer of Sequential is left to replace with match='head'.*3 nn.Linear"):
        replace_linears(net, "monarch", match="head")
    with pytest.raises(ValueError, match=r"At '3' .3 x 16.: KSLinear.16, 3. needs a chain"):
        replace_linears(net, Chain([(1, 2, 2, 1)]), match="3")
    with pytest.raises(ValueError, match=r"metrics names '7', which is not replaced"):
        replace_linears(net, "monarch", metrics={"7": Metric(torch.eye(16))})
    with pytest.raises(ValueError, match=r"rank and blocks belong to a named chain, got rank=2"):
        replace_linears(net, FULL, match="^0", rank=2)
    with pytest.raises(ValueError, match=r"A metric needs a chain of the layer's size .48, 16., got 64 x 64"):
        replace_linears(net, "butterfly", match="^0", metrics={"0": Metric(torch.eye(16))})
    handle = net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'0' has 1 forward hooks"):
        replace_linears(net, "monarch")
    handle.remove()
    net[3].weight = net[2][0].weight
    with pytest.raises(ValueError, match=r"The weight of '2.0' is shared by '2.0.weight', '3.weight'.*skip=.'2.0'."):
        replace_linears(net, "monarch")
