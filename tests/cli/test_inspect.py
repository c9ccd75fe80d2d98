"""`eke inspect`: counted, measured and estimated numbers for each matrix."""

from __future__ import annotations

import json

import pytest

from .conftest import SOURCE

QUICK = ["--threads", 1, "--seconds", 0.05]


def test_sites_have_parameters_flops_time_and_sensitivity(eke, tmp_path):
    page = tmp_path / "page.html"
    found = json.loads(eke("inspect", *SOURCE, *QUICK, "--html", page, "--json").stdout)
    first, second = found["sites"]
    assert (first["name"], first["kind"], first["shape"], first["parameters"]) == ("0", "conv", [8, 9], 72)
    assert first["flops"] == 2 * 50 * 36 * 72
    assert (second["parameters"], second["flops"]) == (128, 2 * 50 * 128)
    assert 0 < first["share_of_time"] + second["share_of_time"] <= 1
    assert first["sensitivity"] > 0
    assert second["sensitivity"] > 0
    assert [group["size"] for group in found["channel_groups"]] == [8]
    assert {"module": "0", "side": "out"} in found["channel_groups"][0]["members"]
    assert "Inspection of a model" in page.read_text()


def test_without_data_the_sensitivity_is_absent(eke):
    found = json.loads(eke("inspect", SOURCE[0], "--input", "2,1,6,6", *QUICK, "--json").stdout)
    assert [site["sensitivity"] for site in found["sites"]] == [None, None]
    assert found["sites"][0]["flops"] == 2 * 2 * 36 * 72


def test_what_is_left_alone_is_named_with_the_reason(eke, tmp_path):
    (tmp_path / "cli_custom.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Own(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.weight = nn.Parameter(torch.ones(3, 3))\n"
        "        self.last = nn.Linear(3, 2)\n\n"
        "    def forward(self, x):\n        return self.last(x @ self.weight)\n"
    )
    shown = eke("inspect", f"{tmp_path}/cli_custom.py:Own", "--input", "1,3", *QUICK).stdout
    assert "not a site: weight: parameter of Own, kept whole" in shown
    assert "last" in shown
    assert "2 × 3" in shown


@pytest.mark.parametrize("shape", ["", "1,x", "0,3", "1,3:int9", "1,3:"])
def test_bad_shapes_are_refused(eke, shape):
    told = eke("inspect", SOURCE[0], "--input", shape, code=2).stderr
    assert f"--input needs a shape such as 1,3,224,224 or 1,128:int64, got {shape!r}" in told


def test_whole_numbers_can_be_inputs(eke, tmp_path):
    (tmp_path / "cli_words.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Embedding(7, 3)\n")
    found = json.loads(
        eke("inspect", f"{tmp_path}/cli_words.py:build", "--input", "1,5:int64", *QUICK, "--json").stdout
    )
    assert [site["kind"] for site in found["sites"]] == ["embedding"]


def test_without_anything_to_call_it_with(eke):
    assert "--data FILE.py:FUNCTION or --input 1,3,224,224" in eke("inspect", SOURCE[0], code=2).stderr


def test_a_model_of_a_library_is_called_with_its_own_example(eke):
    pytest.importorskip("timm")
    found = json.loads(eke("inspect", "timm:test_vit:none", *QUICK, "--json").stdout)
    assert found["notes"][0] == "called with 1 x 3 x 160 x 160 float32"
    assert found["before"]["flops"] > 1e7
