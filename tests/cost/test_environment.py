"""The description of the machine is complete, plain and true."""

from __future__ import annotations

import json
import platform

import torch

from eke.cost import environment
from eke.cost import environment as described


def test_description_is_plain_json_and_matches_what_runs():
    found = environment()
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (again["torch"], again["python"]) == (torch.__version__, platform.python_version())
    assert again["threads"] == torch.get_num_threads()
    assert found.cores >= 1
    assert found.cpu
    assert again["instruction_sets"] == list(found.instruction_sets)


def test_torch_kernels_are_among_the_instruction_sets():
    found = described()
    if found.torch_kernels == "AVX512" and found.instruction_sets:
        assert "avx512f" in found.instruction_sets
    if found.torch_kernels == "AVX2" and found.instruction_sets:
        assert "avx2" in found.instruction_sets
