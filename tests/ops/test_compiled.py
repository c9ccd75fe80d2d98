"""Kernels are loaded from their folder, or what runs instead is said."""

from __future__ import annotations

import ctypes
import logging
from importlib import machinery
from pathlib import Path

import pytest

from eke.ops import compiled
from eke.ops.ks_matmul import native as products
from eke.ops.linear_attention import native as attention
from eke.ops.pair_splits import native as splits
from eke.ops.sparse_matmul import native as sparse
from eke.ops.sparse_recovery import native as recoveries
from eke.ops.support_solve import native as solves

NATIVE = {
    "Kronecker-sparse products": products, "Factorizations": splits, "Exact sparse solvers": solves,
    "Sparse products": sparse, "Sparse problems without noise": recoveries,
    "Causal linear attention": attention,
}  # fmt: skip
LEVELS = {
    products: "eke_ks_level", splits: "eke_pair_splits_level", solves: "eke_support_solve_level",
    sparse: "eke_sparse_level", recoveries: "eke_sparse_recovery_level",
    attention: "eke_attention_level",
}  # fmt: skip


@pytest.mark.parametrize("what", NATIVE)
def test_a_missing_kernel_is_said_once_with_what_to_do(what, monkeypatch, caplog, tmp_path):
    native = NATIVE[what]
    native.library.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
            assert native.library() is None
    finally:
        native.library.cache_clear()
    said = f"{what} run on torch's own operations: no compiled kernel was found in {tmp_path}. Install eke where a C++"
    assert caplog.text.count(said) == 1


def test_a_file_that_is_no_library_is_named(caplog, tmp_path):
    (tmp_path / "_cpu.so").write_text("not a library")
    assert compiled.load(tmp_path, "eke_anything", what="Products") is None
    assert "_cpu.so cannot be loaded" in caplog.text
    assert "Products run on torch's own operations" in caplog.text


@pytest.mark.parametrize("native", LEVELS, ids=lambda native: LEVELS[native])
def test_a_kernel_of_an_older_version_is_left_alone(native, caplog):
    folder = Path(native.__file__).parent
    built = [path for suffix in machinery.EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()]
    if not built:
        pytest.skip("the kernel was not compiled")
    assert isinstance(compiled.load(folder, LEVELS[native], what="Products"), ctypes.CDLL)
    assert not caplog.text
    assert compiled.load(folder, "eke_of_a_later_version", what="Products") is None
    assert f"{built[0].name} belongs to an older version; build it anew" in caplog.text
