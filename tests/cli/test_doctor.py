"""`eke doctor`: says what there is, and fails for damage only."""

from __future__ import annotations

import json
import os
from importlib import metadata

import torch

from eke.cli import doctor


def test_what_is_there_and_what_is_missing(eke, monkeypatch):
    original = metadata.version

    def version(name):
        if name == "optuna":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    found = json.loads(eke("doctor", "--json").stdout)
    assert found["torch"].startswith(torch.__version__)
    assert found["packages"]["safetensors"] == original("safetensors")
    assert found["extras"]["search"] == {
        "packages": {"optuna": None},
        "missing": ["optuna"],
        "install": "pip install 'eke[search]'",
    }
    assert "dev" not in found["extras"]
    assert found["demo data"] == "whole"
    assert "search: missing optuna; pip install 'eke[search]'" in eke("doctor").stdout


def test_damaged_demo_data_fail(eke, monkeypatch):
    def damaged(split):
        raise ValueError("The demo's report.npz was changed")

    import eke.demo as demo

    monkeypatch.setattr(demo, "images", damaged)
    assert "damaged: The demo's report.npz was changed" in eke("doctor", code=1).stdout


def test_writable_looks_at_the_folder_in_which_it_would_be_made(tmp_path, monkeypatch):
    assert doctor.writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    assert not doctor.writable(tmp_path / "a" / "b")
