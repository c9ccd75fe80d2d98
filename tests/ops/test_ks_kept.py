"""Entries packed for many calls follow every change of their tensors and go with them."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eke import ops
from eke.ops.ks_matmul import choose, kept, native, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernel was not compiled")
PATTERNS = [(2, 8, 8, 2), (4, 9, 7, 1), (1, 16, 16, 32), (9, 2, 2, 2), (2, 8, 8, 16), (1, 40, 30, 1), (3, 5, 6, 3)]


@pytest.fixture(autouse=True, params=["C++", "Python"])
def way(request, monkeypatch):
    """Calls are asked in both languages: they must say the same."""
    if request.param == "Python":
        monkeypatch.setattr(kept, "_quicken", lambda: None)
        monkeypatch.setattr(kept, "product", kept.asked)
    else:
        if kept.product is kept.asked:
            kept._quicken()
        assert kept.product is not kept.asked or not hasattr(native.library(), "eke_ks_calls")
    return request.param


def sample(pattern, batch=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    a, _, c, d = pattern
    return (
        torch.randn(batch, a * c * d, generator=generator).to(dtype),
        torch.randn(pattern, generator=generator).to(dtype),
    )


def packed(tensor, batch_last=False):
    known = kept.KNOWN.get((id(tensor), batch_last))
    return None if known is None else known.packed


def call(x, blocks, last):
    return ops.ks_matmul_batch_last(x, blocks) if last else ops.ks_matmul(x, blocks)


def expected(x, blocks, last):
    return (reference.matmul_batch_last if last else reference.matmul)(x.double(), blocks.detach().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_every_call_gives_the_same_and_the_second_packs(last, dtype):
    for pattern in PATTERNS:
        x, blocks = sample(pattern, dtype=dtype)
        x = x.T.contiguous() if last else x
        first = call(x, blocks, last)
        assert packed(blocks, last) is None
        second = call(x, blocks, last)
        held = packed(blocks, last)
        assert held is not None
        third = call(x, blocks, last)
        assert packed(blocks, last) is held
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        bound = 60 * torch.finfo(dtype).eps
        torch.testing.assert_close(third, first, rtol=bound, atol=bound)
        torch.testing.assert_close(third.double(), expected(x, blocks, last), rtol=bound, atol=bound)
        assert third.is_contiguous()


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "one entry": lambda w: w.view(-1)[-1].add_(1),
    "through .data": lambda w: w.data.view(-1)[3].add_(1),
    "through NumPy": lambda w: w.detach().numpy().fill(0.5),
    "signs": lambda w: w.data.neg_(),
    "halves exchanged": lambda w: w.data.copy_(w.detach().flatten().roll(w.numel() // 2).view(w.shape)),
    "neighbours exchanged": lambda w: w.data.copy_(w.detach().flatten().view(-1, 2).flip(1).reshape(w.shape)),
    "other memory": lambda w: setattr(w, "data", torch.ones_like(w)),
    "other strides": lambda w: setattr(w, "data", w.data.transpose(1, 2)),
    "optimizer": lambda w: (setattr(w, "grad", torch.ones_like(w)), torch.optim.SGD([w], lr=0.1).step()),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("last", [False, True])
def test_every_change_of_the_entries_is_seen(change, last):
    for pattern in [*PATTERNS[:2], (2, 8, 8, 16), (8, 2, 2, 2)]:
        if change == "other strides" and pattern[1] != pattern[2]:
            continue
        x, blocks = sample(pattern)
        x = x.T.contiguous() if last else x
        weight = torch.nn.Parameter(blocks)
        with torch.no_grad():
            for _ in range(3):
                before = call(x, weight, last)
            assert packed(weight, last) is not None
        if change in {"in place", "one entry"}:
            with torch.no_grad():
                CHANGES[change](weight)
        else:
            CHANGES[change](weight)
        with torch.no_grad():
            for _ in range(4):  # found changed, met, packed, used
                after = call(x, weight, last)
                torch.testing.assert_close(after.double(), expected(x, weight, last), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(before, after)
            assert packed(weight, last) is not None


def test_sums_of_changed_bytes_differ():
    """Each single bit of 300 bytes, each exchange of 8-byte words: the library's own answer."""
    x, blocks = sample((3, 5, 5, 1), 2)
    source = blocks.clone()
    holder = kept.Packed([source], [source], dtype=torch.float32, batch_last=False, relu=False)
    y = torch.empty(2, 15)

    def status():
        return holder.run(holder.address, 2, x.data_ptr(), y.data_ptr(), None)

    assert status() == 0
    words = source.view(-1).view(torch.int32)
    for place in range(words.numel()):
        for bit in range(32):
            flipped = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            words[place] ^= flipped
            assert status() == -1
            words[place] ^= flipped
    for place in range(0, words.numel() - 4, 2):
        words[place : place + 4] = words[place : place + 4].roll(2)
        assert status() == -1
        words[place : place + 4] = words[place : place + 4].roll(2)
    assert status() == 0


def test_what_is_kept_goes_with_its_tensor():
    gc.collect()
    before = len(kept.KNOWN)
    x, blocks = sample((2, 8, 8, 2))
    chain = [torch.randn(2, 8, 8, 2), torch.randn(1, 32, 32, 1)]
    for _ in range(3):
        ops.ks_matmul(x, blocks)
        ops.ks_matmul_batch_last(x.T.contiguous(), blocks)
        ops.ks_chain_matmul(x, chain)
    assert len(kept.KNOWN) == before + 3
    del blocks
    assert len(kept.KNOWN) == before + 1
    chain.pop()
    assert len(kept.KNOWN) == before


def test_copies_and_files_know_nothing_of_it():
    x, blocks = sample((2, 8, 8, 2))
    weight = torch.nn.Parameter(blocks)
    with torch.no_grad():
        for _ in range(3):
            before = ops.ks_matmul(x, weight)
        other = copy.deepcopy(weight)
        assert packed(other) is None
        other.zero_()
        for _ in range(3):
            assert not ops.ks_matmul(x, other).any()
        torch.testing.assert_close(ops.ks_matmul(x, weight), before)
    torch.save(weight, io.BytesIO())
    assert torch.equal(pickle.loads(pickle.dumps(weight)), weight)


@pytest.mark.parametrize("batch", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_are_kept_and_followed(batch, dtype):
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2**s, 2, 2, 2 ** (3 - s), generator=generator)).to(dtype) for s in range(4)]
    bias = torch.randn(16, generator=generator).to(dtype)
    x = torch.randn(batch, 16, generator=generator).to(dtype)
    bound = 200 * torch.finfo(dtype).eps

    def right(bias, activation):
        y = x.double()
        for blocks in reversed(factors):
            y = reference.matmul(y, blocks.double())
        y = y if bias is None else y + bias.double()
        return y if activation is None else activation(y)

    for activation in (None, torch.relu):
        for given in (None, bias):
            for _ in range(4):
                y = ops.ks_chain_matmul(x, factors, bias=given, activation=activation)
                torch.testing.assert_close(y.double(), right(given, activation), rtol=bound, atol=bound)
            factors[1].data.view(-1)[5] += 1
            bias.data[3] += 1
            y = ops.ks_chain_matmul(x, factors, bias=given, activation=activation)
            torch.testing.assert_close(y.double(), right(given, activation), rtol=bound, atol=bound)
    assert any(key[0] == "chain" and id(factors[0]) in key for key in kept.KNOWN)


def test_modes_are_seen_after_packing():
    x, blocks = sample((2, 8, 8, 2))
    for _ in range(3):
        y = ops.ks_matmul(x, blocks)
    assert packed(blocks) is not None
    with FlopCounterMode(display=False) as counter:
        ops.ks_matmul(x, blocks)
    assert counter.get_total_flops() == 2 * 20 * blocks.numel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.ks_matmul(x, blocks).dtype == torch.bfloat16
    weight = blocks.requires_grad_()
    assert ops.ks_matmul(x, weight).requires_grad
    assert ops.ks_matmul(x.clone().requires_grad_(), weight.detach()).requires_grad
    weight.requires_grad_(False)
    many = torch.vmap(lambda v: ops.ks_matmul(v, blocks))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many, torch.stack([y, 2 * y]))
    turned = torch._neg_view(x)
    torch.testing.assert_close(ops.ks_matmul(turned, blocks), -y)
    torch.testing.assert_close(ops.ks_matmul(torch.stack([x, x], 2)[:, :, 0], blocks), y)
    torch.testing.assert_close(ops.ks_matmul(x.view(4, 5, -1), blocks), y.view(4, 5, -1))
    with pytest.raises(ValueError, match=r"got \(20, 31\)"):
        ops.ks_matmul(x[:, :-1].contiguous(), blocks)
    with pytest.raises(ValueError, match="one floating-point type"):
        ops.ks_matmul(x.double(), blocks)
    assert ops.ks_matmul(x[:0], blocks).shape == (0, 32)
    compiled = torch.compile(lambda x, w: ops.ks_matmul(x, w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, blocks), y)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_call_asks_once(last, dtype, way, monkeypatch):
    """Nothing of the long way is taken, and in C++ nothing of Python's either; the unusual call takes both."""
    seen = []
    for pattern in PATTERNS:
        x, blocks = sample(pattern, dtype=dtype)
        x = x.T.contiguous() if last else x
        for _ in range(3):
            y = call(x, blocks, last)
        threads = torch.get_num_threads()
        with monkeypatch.context() as patch:
            patch.setattr(kept, "meet", lambda *_, **__: seen.append("long"))
            if way == "C++":
                patch.setattr(kept, "_run", lambda *_: seen.append("Python"))
            assert torch.equal(call(x, blocks, last), y)
            assert not seen
            try:
                torch.set_num_threads(threads + 1)
                torch.testing.assert_close(call(x, blocks, last), y)
            finally:
                torch.set_num_threads(threads)
            assert seen or kept.KNOWN[id(blocks), last].choices.get(20) == "dense"
        seen.clear()


def test_entries_of_another_shape_in_the_same_memory_are_another_factor():
    x, blocks = sample((2, 8, 8, 2))
    for _ in range(3):
        ops.ks_matmul(x, blocks)
    for other in (blocks.view(2, 16, 8, 1), blocks.view(4, 8, 8, 1), blocks.transpose(1, 2)):
        before, blocks.data = blocks.data, other
        if other.shape[0] * other.shape[2] * other.shape[3] == 32:
            bound = 1e-5
            torch.testing.assert_close(
                ops.ks_matmul(x, blocks).double(), expected(x, blocks, False), rtol=bound, atol=bound
            )
        else:
            with pytest.raises(ValueError, match="a\\*c\\*d = 16"):
                ops.ks_matmul(x, blocks)
        blocks.data = before


@pytest.mark.parametrize("pattern", [(2, 8, 8, 2), (1, 40, 30, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_entries_of_another_type_in_the_same_memory_are_refused(pattern, last):
    x, blocks = sample(pattern)
    x = x.T.contiguous() if last else x
    for _ in range(3):
        call(x, blocks, last)
    assert packed(blocks, last) is not None
    blocks.data = blocks.data.view(torch.int32)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.int32"):
        call(x, blocks, last)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.bfloat16, 20), (torch.float32, 300)])
def test_entries_changed_between_copy_and_sum_are_not_kept(dtype, batch, monkeypatch):
    """As another thread may do: bfloat16 is widened, and neighbours are multiplied, before their bytes are summed."""
    factors = [torch.ones(1, 2, 2, 2, dtype=dtype), torch.ones(2, 2, 2, 1, dtype=dtype)]
    x = torch.ones(batch, 4, dtype=dtype)
    merge, calls = choose.merge_neighbours, []

    def changed_after(copies, rows):
        merged = merge(copies, rows)
        calls.append(rows)
        if len(calls) == 2:  # multiplied, and now to be packed
            factors[0].fill_(3)
        return merged

    monkeypatch.setattr(choose, "merge_neighbours", changed_after)
    for _ in range(2):
        ops.ks_chain_matmul(x, factors)
    assert factors[0][0, 0, 0, 0] == 3
    for _ in range(3):
        assert (ops.ks_chain_matmul(x, factors) == 12).all()
    assert kept.KNOWN[kept.chain_key(factors, batch, False)].packed is not None


def test_other_threads_pack_anew():
    x, blocks = sample((4, 64, 64, 1), 600)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            for _ in range(3):
                results.append(ops.ks_matmul(x, blocks))
            assert packed(blocks).threads == count
        for y in results[1:]:
            torch.testing.assert_close(y, results[0])
    finally:
        torch.set_num_threads(threads)


def test_views_with_wide_gaps_are_not_kept():
    x, _ = sample((2, 3, 4, 5))
    wide = torch.randn(2, 3, 4, 50)[..., ::10]
    for _ in range(3):
        y = ops.ks_matmul(x, wide)
    assert packed(wide) is None
    torch.testing.assert_close(y.double(), expected(x, wide, False), rtol=1e-4, atol=1e-4)


def test_large_batches_pack_in_the_call():
    x, blocks = sample((2, 4, 4, 2), 1025)
    for _ in range(3):
        ops.ks_matmul(x, blocks)
    assert packed(blocks) is None


def test_a_new_measurement_changes_the_choice(monkeypatch):
    monkeypatch.setattr(choose, "_MEASURED", {})
    x, blocks = sample((1, 8, 8, 1), 20)
    for name in ("dense", "native", "dense"):
        monkeypatch.setattr(choose, "_measure", lambda *_, name=name, **__: name)
        assert ops.choose_algorithm((1, 8, 8, 1), 20, torch.float32, measure=True) == name
        for _ in range(3):
            y = ops.ks_matmul(x, blocks)
        torch.testing.assert_close(y, x @ blocks[0, :, :, 0].T)
        assert kept.KNOWN[id(blocks), False].choices == {20: name}


def test_no_memory_is_said(monkeypatch):
    _, blocks = sample((2, 8, 8, 2))
    library = native.library()

    class Full:
        eke_ks_kept = library.eke_ks_kept

        @staticmethod
        def eke_ks_keep(*_):
            return None

    monkeypatch.setattr(native, "library", Full)
    with pytest.raises(MemoryError, match="no memory to pack 256 entries"):
        kept.Packed([blocks], [blocks], dtype=torch.float32, batch_last=False, relu=False)


@pytest.mark.parametrize(
    ("status", "error", "text"), [(2, MemoryError, "try a smaller batch"), (1, RuntimeError, "with status 1")]
)
def test_what_the_library_returns_is_not_ignored(monkeypatch, status, error, text):
    x, blocks = sample((2, 8, 8, 2))

    class Failing:
        eke_ks_forward = eke_ks_gradient = staticmethod(lambda *_: status)

    monkeypatch.setattr(native, "library", Failing)
    with pytest.raises(error, match=text):
        native.forward(x, [blocks], batch_last=False)
    with pytest.raises(error, match=text):
        native.gradient(x, x, (2, 8, 8, 2), batch_last=False)
