"""Layers that look at a few patches of a large image."""

from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from eke.nn import AttentionSampling
from eke.nn.attention_sampling import (
    CrossAttentionPool,
    IterativePatchSelection,
    NumpyImage,
    PerturbedTopK,
    TiffImage,
    corners,
    gather,
    heat_map,
    perturbed_topk,
    save_png,
    small_view,
)  # fmt: skip

AXES = {1: (37,), 2: (23, 31), 3: (9, 11, 10)}


def naive_crop(image, corner, size):
    """One crop, pixel by pixel."""
    found = torch.zeros(image.shape[0], *size, dtype=image.dtype)
    for place in itertools.product(*map(range, size)):
        where = [a + b for a, b in zip(corner, place)]
        if all(0 <= a < b for a, b in zip(where, image.shape[1:])):
            found[(slice(None), *place)] = image[(slice(None), *where)]
    return found


def attention_of(axes):
    """A network that does not pad and sees 3 pixels."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    torch.manual_seed(0)
    return kind(2, 1, 3)


class Means(nn.Module):
    """Encodes a patch by the means of its channels and of their squares."""

    def forward(self, x):
        flat = x.flatten(2)
        return torch.cat([flat.mean(-1), flat.square().mean(-1)], -1)


def layer(axes=2, *, patch=5, samples=4, **options):
    return AttentionSampling(
        attention_of(axes), Means(), patch=patch, samples=samples, axes=axes, receptive_field=3, **options
    )


def images(axes=2, batch=3):
    generator = torch.Generator().manual_seed(1)
    large = torch.rand(batch, 2, *AXES[axes], generator=generator)
    small = [max(5, size // 2) for size in AXES[axes]]
    return large, torch.rand(batch, 2, *small, generator=generator)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_patches_are_those_cut_pixel_by_pixel(axes, dtype):
    large = (images(axes)[0] * 200).to(dtype)
    generator = torch.Generator().manual_seed(2)
    size = (4, 3, 5)[:axes]
    places = torch.stack([torch.randint(-3, whole + 1, (3, 6), generator=generator) for whole in AXES[axes]], -1)
    found = gather(large, places, size)
    lazy = gather([NumpyImage(image.numpy()) for image in large], places, size)
    assert found.dtype == lazy.dtype == dtype
    assert torch.equal(found, lazy)
    for sample, n in itertools.product(range(3), range(6)):
        assert torch.equal(found[sample, n], naive_crop(large[sample], places[sample, n].tolist(), size))


@pytest.mark.parametrize("patch", [50, 49])
def test_corners_follow_the_published_formula(patch):
    grid, small, large, field = (172, 172), (180, 180), (1500, 1500), 9
    order = torch.tensor([[0, 171, 172 * 171, 172 * 172 - 1, 172 * 30 + 77]])
    found = corners(order, grid=grid, small=small, large=large, patch=(patch, patch), receptive_field=field)
    scale = 1500 / 180
    step = (180 - 9) * scale / 172
    for got, place in zip(found[0].tolist(), order[0].tolist()):
        for part, s in zip(got, divmod(place, 172)):
            assert part == round(9 / 2 * scale + s * step + step / 2 - patch / 2)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("estimator", ["corrected", "murthy"])
def test_mean_over_many_draws_is_the_full_mean(axes, estimator):
    made = layer(axes, estimator=estimator)
    large, small = images(axes, batch=1)
    exact = layer(axes, evaluation="full").eval()(large, small).features
    many = 4000
    with torch.no_grad():
        found = made(
            large.expand(many, *large.shape[1:]), small.expand(many, *small.shape[1:]),
            generator=torch.Generator().manual_seed(0),
        ).features  # fmt: skip
    error = (found.mean(0) - exact[0].detach()).abs() / (found.std(0) / math.sqrt(many))
    assert float(error.max()) < 4.5  # standard errors


def test_all_positions_drawn_by_murthy_is_the_full_mean():
    large, small = images()
    count = (small.shape[2] - 2) * (small.shape[3] - 2)
    drawn = layer(samples=count, estimator="murthy")(large, small)
    full = layer(evaluation="full", chunk=7).eval()(large, small)
    torch.testing.assert_close(drawn.features, full.features, rtol=1e-5, atol=1e-6)
    assert torch.equal(drawn.order.sort(-1).values, full.order)


def test_full_mean_is_the_sum_over_all_patches():
    made = layer(evaluation="full").eval()
    large, small = images()
    seen = made(large, small)
    attention = torch.softmax(made.attention(small).flatten(1), -1)
    torch.testing.assert_close(seen.attention.float(), attention)
    grid = tuple(made.attention(small).shape[2:])
    places = corners(
        torch.arange(math.prod(grid)).expand(3, -1), grid=grid, small=small.shape[2:], large=large.shape[2:],
        patch=(5, 5), receptive_field=3,
    )  # fmt: skip
    wanted = torch.zeros(3, 4)
    for sample, n in itertools.product(range(3), range(math.prod(grid))):
        patch = naive_crop(large[sample], places[sample, n].tolist(), (5, 5))
        wanted[sample] += attention[sample, n] * Means()(patch[None])[0]
    torch.testing.assert_close(seen.features, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.boxes[:, :, 0], places)
    assert torch.equal(seen.boxes[:, :, 1], places + 5)


def test_best_positions_are_weighed_by_their_attention():
    made = layer(evaluation="topk").eval()
    large, small = images()
    seen = made(large, small)
    assert torch.equal(seen.features, made(large, small).features)
    chosen = seen.attention.gather(1, seen.order)
    assert bool((chosen.min(-1).values >= seen.attention.scatter(1, seen.order, 0.0).max(-1).values).all())
    assert float(made.train()(torch.ones_like(large), small).features.sum().detach()) == pytest.approx(12, rel=1e-5)


def test_both_networks_learn_and_the_generator_decides():
    made = AttentionSampling(attention_of(2), nn.Sequential(nn.Flatten(), nn.Linear(50, 6)), patch=5, samples=3)
    large, small = images()
    first = made(large, small, generator=torch.Generator().manual_seed(3))
    again = made(large, small, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.order, again.order)
    first.features.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in made.parameters())


def test_patches_of_larger_scales_are_averaged():
    made = layer(patch=4, scales=(1, 2), evaluation="full").eval()
    large, small = images()
    seen = made(large, small)
    sizes = [math.prod(grid) for grid in seen.grids]
    assert len(seen.grids) == 2
    assert seen.attention.shape == (3, sum(sizes))
    extent = (seen.boxes[:, :, 1] - seen.boxes[:, :, 0]).unique(dim=1)
    assert bool((seen.boxes[:, : sizes[0], 1] - seen.boxes[:, : sizes[0], 0] == 4).all())
    assert bool((seen.boxes[:, sizes[0] :, 1] - seen.boxes[:, sizes[0] :, 0] == 8).all())
    assert extent.numel()
    sample, n = 1, sizes[0] + 3
    patches, _ = made.cut(large, torch.full((3, 1), n), made.look(large, small)[1])
    crop = naive_crop(large[sample], seen.boxes[sample, n, 0].tolist(), (8, 8))
    wanted = nn.functional.avg_pool2d(crop[None], 2)[0]
    torch.testing.assert_close(patches[sample, 0], wanted)
    assert [tuple(part.shape[1:]) for part in seen.maps()] == list(seen.grids)


def test_smoothing_mixes_uniform_attention_in():
    large, small = images()
    sharp, smooth = layer()(large, small), layer(smoothing=0.25)(large, small)
    count = sharp.attention.shape[1]
    torch.testing.assert_close(smooth.attention, 0.75 * sharp.attention + 0.25 / count)


def test_normalized_features_have_norm_one():
    made = layer(samples=1, normalize=True)
    norm = made(*images()).features.norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_bytes_are_divided_by_255_and_views_are_made():
    large, _ = images()
    coded = (large * 255).to(torch.uint8)
    made = layer(view_size=(11, 15), evaluation="topk").eval()
    seen = made(coded)
    plain = made(coded.float() / 255)
    torch.testing.assert_close(seen.features, plain.features)
    lazy = made([NumpyImage(image.numpy()) for image in coded])
    torch.testing.assert_close(lazy.features, seen.features)
    torch.testing.assert_close(lazy.attention, seen.attention)


def test_files_are_read_where_they_are_looked_at(tmp_path):
    array = (np.random.default_rng(0).random((3, 40, 50)) * 255).astype(np.uint8)
    np.save(tmp_path / "image.npy", array)
    image = NumpyImage(tmp_path / "image.npy")
    assert image.shape == (3, 40, 50)
    assert torch.equal(image.crop((-2, 45), (6, 8)), naive_crop(torch.from_numpy(array), (-2, 45), (6, 8)))
    last = NumpyImage(np.moveaxis(array, 0, -1), channels="last")
    assert torch.equal(last.crop((3, 4), (5, 5)), image.crop((3, 4), (5, 5)))
    assert NumpyImage(array[0], channels=None).shape == (1, 40, 50)


@pytest.mark.parametrize("colour", [True, False])
def test_tiled_tiff_is_read_tile_by_tile(tmp_path, colour):
    tifffile = pytest.importorskip("tifffile")
    array = (np.random.default_rng(0).random((75, 90, 3)) * 255).astype(np.uint8)
    array = array if colour else array[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(32, 16), photometric="rgb" if colour else "minisblack")
    image = TiffImage(tmp_path / "a.tif")
    whole = torch.from_numpy(array.reshape(75, 90, -1)).permute(2, 0, 1)
    assert image.shape == tuple(whole.shape)
    for corner, size in (
        ((0, 0), (75, 90)),
        ((30, 14), (5, 4)),
        ((70, 80), (9, 20)),
        ((-3, -4), (40, 40)),
        ((90, 5), (4, 4)),
    ):
        assert torch.equal(image.crop(corner, size), naive_crop(whole, corner, size))
    torch.testing.assert_close(small_view(image, (25, 30)), nn.functional.avg_pool2d(whole.float(), 3))
    image.close()
    tifffile.imwrite(tmp_path / "b.tif", array)
    with pytest.raises(ValueError, match="is not tiled with axes"):
        TiffImage(tmp_path / "b.tif")


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (40, 50), (1, 1)])
def test_small_views_are_adaptive_means(size, monkeypatch):
    monkeypatch.setattr("eke.nn.attention_sampling.images._STRIP", 700)  # several strips
    array = np.random.default_rng(0).random((2, 40, 50)).astype(np.float32)
    wanted = nn.functional.adaptive_avg_pool2d(torch.from_numpy(array), size)
    torch.testing.assert_close(small_view(NumpyImage(array), size), wanted)
    with pytest.raises(ValueError, match=r"no larger on any axis, got \(41, 10\)"):
        small_view(NumpyImage(array), (41, 10))


def test_attention_becomes_a_picture(tmp_path):
    seen = layer()(*images())
    picture = heat_map(seen, (46, 62))
    assert picture.shape == (3, 46, 62)
    torch.testing.assert_close(picture.amax((1, 2)), torch.ones(3))
    save_png(picture[0], tmp_path / "grey.png")
    data = (tmp_path / "grey.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    start = data.index(b"IDAT") + 4
    raw = zlib.decompress(data[start : start + int.from_bytes(data[start - 8 : start - 4], "big")])
    rows = np.frombuffer(raw, np.uint8).reshape(46, 63)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(rows[:, 1:], (picture[0] * 255).round().to(torch.uint8).numpy())
    save_png(torch.rand(3, 4, 5), tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"got \(2, 4, 5\)"):
        save_png(torch.rand(2, 4, 5), tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"two axes, got a grid of \(16,\)"):
        heat_map(layer(1)(*images(1)), (4, 4))


def test_the_deterministic_path_can_be_exported():
    made = layer(evaluation="topk").eval()
    large, small = images()
    program = torch.export.export(made, (large, small))
    torch.testing.assert_close(program.module()(large, small)[0], made(large, small).features)


def test_selection_in_chunks_keeps_the_best_of_all():
    torch.manual_seed(0)
    pool = CrossAttentionPool(4, heads=2)
    options = {"dim": 4, "patch": 5, "grid": (6, 7), "pool": pool, "memory": 8}
    large, _ = images()
    chunked = IterativePatchSelection(Means(), chunk=5, **options).eval()
    seen = chunked(large)
    at_once = IterativePatchSelection(Means(), chunk=42, **options).eval()(large)
    # With one head's softmax the order of scores does not depend on the others; with two it is a mean of two softmaxes.
    single = CrossAttentionPool(4, heads=1)
    options["pool"] = single
    parts = IterativePatchSelection(Means(), chunk=5, **options).eval()(large)
    whole = IterativePatchSelection(Means(), chunk=42, **options).eval()(large)
    assert torch.equal(parts.order.sort(-1).values, whole.order.sort(-1).values)
    torch.testing.assert_close(parts.features, whole.features)
    assert seen.order.shape == at_once.order.shape == (3, 8)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(3))
    assert int((seen.attention > 0).sum()) == 24


def test_selection_learns_from_what_it_keeps_and_leaves_modes_alone():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    encoder[3].eval()
    made = IterativePatchSelection(encoder, dim=8, patch=5, grid=(4, 4), memory=3, chunk=4)
    large, _ = images()
    made.train()
    encoder[3].eval()
    seen = made(large, generator=torch.Generator().manual_seed(0))
    assert [module.training for module in encoder] == [True, True, True, False]
    assert int(encoder[2].num_batches_tracked) == 1  # looking around changes no statistics
    seen.features.square().sum().backward()
    assert float(made.pool.query.grad.abs().sum()) > 0
    assert float(encoder[1].weight.grad.abs().sum()) > 0


def test_perturbed_choice_is_the_choice_without_noise_and_its_derivative_is_right():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    found = perturbed_topk(scores, 2, draws=10, sigma=1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.detach(), torch.tensor([[[0.0, 1, 0, 0], [0, 0, 0, 1]]], dtype=torch.float64))
    # The mean of the largest of scores + noise has derivative P(it is the largest); by finite differences of the mean.
    side = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    many, step = 200_000, 0.05

    def value(s):
        return perturbed_topk(s, 1, draws=many, sigma=0.5, generator=torch.Generator().manual_seed(1))[0, 0] @ side

    (slope,) = torch.autograd.grad(value(scores), scores)
    with torch.no_grad():
        for i in range(4):
            move = torch.zeros_like(scores)
            move[0, i] = step
            wanted = (value(scores + move) - value(scores - move)) / (2 * step)
            assert float(slope[0, i]) == pytest.approx(float(wanted), abs=0.03)


def test_perturbed_patches_become_the_best_ones():
    attention = attention_of(2)
    large, small = images()
    made = PerturbedTopK(attention, Means(), patch=5, samples=3, receptive_field=3, draws=20, sigma=1e-9)
    seen, best = made(large, small), made.eval()(large, small)
    torch.testing.assert_close(seen.features, best.features, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.order, best.order)
    made = PerturbedTopK(attention, Means(), patch=5, samples=3, receptive_field=3, draws=50, sigma=0.5)
    made(large, small).features.square().sum().backward()
    assert float(attention.weight.grad.abs().sum()) > 0


LARGE, SMALL = images()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(patch=24)(LARGE, SMALL), r"A patch of \(24, 24\) pixels does not fit into a source of \(23,"),
        (lambda: layer(samples=200)(LARGE, SMALL), "200 positions cannot be drawn without replacement from 117"),
        (lambda: layer(samples=0), "samples=0, axes=2"),
        (lambda: layer(scales=(1, 1)), r"distinct whole numbers from 1 on, got \(1, 1\)"),
        (lambda: layer(evaluation="best"), "sample, topk, full, got 'best'"),
        (lambda: layer(smoothing=1.0), r"\[0, 1\) and chunk be positive, got 1.0 and 256"),
        (lambda: layer(estimator="murthy", replacement=True), "estimator='murthy' is for draws"),
        (lambda: layer()(LARGE), "Pass the small view of the images, or its size as view_size"),
        (lambda: layer()(LARGE, SMALL[:2]), "for 3 images, got"),
        (lambda: layer()(LARGE[0], SMALL), r"with 2 axes of space, got \(23, 31\)"),
        (lambda: layer()([], SMALL), "no image in the batch"),
        (lambda: layer()(LARGE, SMALL * math.nan), "Logits hold nan at row 0, position 0"),
        (lambda: AttentionSampling(nn.Conv2d(2, 2, 3), Means(), patch=5, samples=2)(LARGE, SMALL), "must return"),
        (lambda: layer(scales=(1, 20), patch=1)(LARGE, SMALL), "cannot be made 20 times smaller"),
        (lambda: gather(LARGE, torch.zeros(2, 1, 2, dtype=torch.long), (3, 3)), r"\(3, N, 2\)"),
        (lambda: gather(LARGE, torch.zeros(3, 1, 1, dtype=torch.long), (3,)), "A patch of 1 axes needs a source"),
        (
            lambda: layer()([NumpyImage(np.zeros((2, 23, 31))), NumpyImage(np.zeros((2, 24, 31)))], SMALL[:2]),
            "must have one shape, got",
        ),
        (lambda: NumpyImage(np.zeros(4)), r"got shape \(4,\)"),
        (lambda: CrossAttentionPool(10), "got 10 and 8"),
        (lambda: IterativePatchSelection(Means(), dim=8, patch=5, grid=(4,)), r"2 positive numbers .* got \(4,\)"),
        (lambda: perturbed_topk(torch.zeros(1, 3), 4), r"got \(1, 3\) and 4"),
        (lambda: perturbed_topk(torch.zeros(1, 3), 1, sigma=0.0), "got 500 and 0.0"),
        (lambda: PerturbedTopK(attention_of(2), Means(), patch=5, samples=2, draws=0), "got 0 and 0.05"),
        (lambda: PerturbedTopK(attention_of(2), Means(), patch=5, samples=200)(LARGE, SMALL), "from 117 positions"),
        (
            lambda: corners(torch.zeros(1, 1), grid=(4, 4), small=(8, 8), large=(16, 16), patch=(2,)),
            "one number for each axis",
        ),
        (
            lambda: corners(
                torch.zeros(1, 1), grid=(4, 4), small=(8, 8), large=(16, 16), patch=(2, 2), receptive_field=8
            ),
            "0 … 7, got 8",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
