"""Attention sampling: encode a few patches of a large image, drawn where a network that saw a small view of it looks.

    layer = AttentionSampling(attention, encoder, patch=50, samples=10)
    seen = layer(images, view)                 # (batch, channels, 1500, 1500) and (batch, channels, 180, 180)
    logits = head(seen.features)

The result estimates sum_i a_i encoder(patch_i) over every position of the attention's grid without bias, in value and
derivatives. Cost: the attention of the view and `samples` encodings; the image may stay on disk.
Source: Katharopoulos and Fleuret, "Processing megapixel images with deep attention-sampling models", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .estimators import Estimator, draw, expectation, mixed
from .images import pooled, small_view
from .patches import Source, check_patch, corners, gather, shrink

Evaluation = Literal["sample", "topk", "full"]
_EVALUATIONS = ("sample", "topk", "full")


class Sampled(NamedTuple):
    """What a layer saw of its images."""

    features: Tensor
    """Mean of the encodings under the attention, (batch, ...)."""
    attention: Tensor
    """(batch, positions), each row sums to 1; positions of several scales one after the other."""
    order: Tensor
    """Positions that were encoded, in the order of the draw, (batch, N)."""
    boxes: Tensor
    """First and one past the last pixel of their patches, (batch, N, 2, axes)."""
    grids: tuple[tuple[int, ...], ...]
    """Size of the attention's grid for each scale."""

    def maps(self) -> list[Tensor]:
        """Return the attention as pictures, (batch, *grid) for each scale."""
        sizes = [int(torch.Size(grid).numel()) for grid in self.grids]
        parts = torch.split(self.attention, sizes, 1)
        return [part.reshape(-1, *grid) for part, grid in zip(parts, self.grids)]


class Places(NamedTuple):
    """All positions of one batch of images, of every scale."""

    grids: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    large: tuple[int, ...]


class PatchLayer(nn.Module):
    """What layers that choose patches have in common: attention over a view, and the patches of its positions.

    Args:
        attention: From views (batch, channels, *small) to logits (batch, 1, *grid) or (batch, *grid).
        encoder: From patches (batch, channels, *patch) to features (batch, ...).
        patch: Size of a patch in pixels, one number for all axes or one for each.
        samples: Patches to encode for each image.
        axes: Axes of space: 1 for signals, 2 for images, 3 for volumes.
        receptive_field: Pixels of the view that one position sees, if the attention network does not pad.
        scales: Whole numbers f: patches of f times the size, averaged to `patch`, are positions as well, with the
            attention of a view that is f times smaller.
        view_size: Size of the view to be made of images that come without one.
        normalize: Whether features are divided by their norm; attention is then the best distribution to draw from.

    Raises:
        ValueError: if a number is not positive, or scales are not distinct whole numbers.
    """

    def __init__(
        self,
        attention: nn.Module,
        encoder: nn.Module,
        *,
        patch: int | Sequence[int],
        samples: int,
        axes: int = 2,
        receptive_field: int = 0,
        scales: Sequence[int] = (1,),
        view_size: Sequence[int] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.patch = (patch,) * axes if isinstance(patch, int) else tuple(patch)
        if samples < 1 or axes not in {1, 2, 3} or len(self.patch) != axes or min(self.patch) < 1:
            raise ValueError(
                "Needed are samples >= 1, axes 1, 2 or 3 and a positive patch for each axis, got "
                f"samples={samples}, axes={axes}, patch={patch}."
            )
        if not scales or len(set(scales)) != len(scales) or min(scales) < 1:
            raise ValueError(f"Scales are distinct whole numbers from 1 on, got {tuple(scales)}.")
        self.attention, self.encoder = attention, encoder
        self.samples, self.axes, self.receptive_field = samples, axes, receptive_field
        self.scales, self.normalize = tuple(scales), normalize
        self.view_size = None if view_size is None else tuple(view_size)

    def look(self, source: Source, view: Tensor | None) -> tuple[Tensor, Places]:
        """Run the attention network.

        Args:
            source: Images.
            view: Small views of them, (batch, channels, *small), or None to make them.

        Returns:
            Logits of all positions (batch, K), and where these are.

        Raises:
            ValueError: if shapes do not fit, a patch is larger than the image, or there is no view and no view_size.
        """
        large = self._size(source)
        check_patch([size * max(self.scales) for size in self.patch], large)
        view = self._view(source) if view is None else as_float(view)
        if view.ndim != self.axes + 2 or len(view) != len(source):
            raise ValueError(
                f"A view must be (batch, channels, *space) with {self.axes} axes of space for {len(source)} images, "
                f"got {tuple(view.shape)}."
            )
        logits, grids = [], []
        for factor in self.scales:
            smaller = view if factor == 1 else _shrunk(view, factor)
            found = self.attention(smaller)
            if found.ndim == self.axes + 2 and found.shape[1] == 1:
                found = found.squeeze(1)
            if found.ndim != self.axes + 1 or len(found) != len(view):
                raise ValueError(
                    f"The attention network must return (batch, 1, *grid) or (batch, *grid) with {self.axes} axes, got "
                    f"{tuple(found.shape)} for a view {tuple(smaller.shape)}."
                )
            logits.append(found.flatten(1))
            grids.append(tuple(found.shape[1:]))
        return torch.cat(logits, 1), Places(tuple(grids), tuple(view.shape[2:]), large)

    def cut(self, source: Source, order: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Cut out the patches of some positions.

        Args:
            source: Images.
            order: Positions, (batch, N).
            places: As `look` returned them.

        Returns:
            Patches (batch, N, channels, *patch) in floating point, and their boxes (batch, N, 2, axes).
        """
        patches, boxes, first = None, None, 0
        for factor, grid in zip(self.scales, places.grids):
            count = int(torch.Size(grid).numel())
            size = [part * factor for part in self.patch]
            small = [max(1, part // factor) for part in places.small]
            here = (order - first).clamp(0, count - 1)
            start = corners(
                here, grid=grid, small=small, large=places.large, patch=size, receptive_field=self.receptive_field
            )
            found = shrink(as_float(gather(source, start, size)), factor)
            box = torch.stack([start, start + torch.tensor(size, device=start.device)], 2)
            if patches is None or boxes is None:
                patches, boxes = found, box
            else:
                mine = (order >= first).to(found.device)
                patches = torch.where(mine.reshape(*mine.shape, *[1] * (found.ndim - 2)), found, patches)
                boxes = torch.where(mine.reshape(*mine.shape, 1, 1), box, boxes)
            first += count
        assert patches is not None
        assert boxes is not None
        return patches, boxes

    def encode(self, patches: Tensor) -> Tensor:
        """Return features (batch, N, ...) of patches (batch, N, channels, *patch)."""
        features = self.encoder(patches.flatten(0, 1))
        if self.normalize:
            features = functional.normalize(features.flatten(1), dim=1).reshape(features.shape)
        found: Tensor = features.reshape(*patches.shape[:2], *features.shape[1:])
        return found

    def _size(self, source: Source) -> tuple[int, ...]:
        """Return the size of the images.

        Raises:
            ValueError: if there are none, or they differ in size or axes.
        """
        if not len(source):
            raise ValueError(f"There is no image in the batch: it has {len(source)}.")
        shapes = {tuple(image.shape) for image in source}
        if len(shapes) > 1:
            raise ValueError(f"Images of one batch must have one shape, got {sorted(shapes)}.")
        shape = shapes.pop()
        if len(shape) != self.axes + 1:
            raise ValueError(f"Images must be (channels, *space) with {self.axes} axes of space, got {shape}.")
        return shape[1:]

    def _view(self, source: Source) -> Tensor:
        """Make the small views.

        Returns:
            (batch, channels, *view_size) in floating point.

        Raises:
            ValueError: if their size is not known.
        """
        if self.view_size is None:
            raise ValueError(f"Pass the small view of the images, or its size as view_size: that is {self.view_size}.")
        if isinstance(source, Tensor):
            return pooled(as_float(source), self.view_size)
        made = []
        for image in source:
            one = image.crop([0] * self.axes, [1] * self.axes)
            made.append(small_view(image, self.view_size) * _unit(one))
        device = next((p.device for p in self.attention.parameters()), None)
        return torch.stack(made).to(device)


class AttentionSampling(PatchLayer):
    """Encode patches drawn by attention, and estimate the mean of all encodings.

    While training it draws. For evaluation it draws as well ("sample"), takes the positions with most attention
    ("topk", which is not the full mean but deterministic), or encodes all positions ("full", the exact mean).

    Args:
        attention: From views (batch, channels, *small) to logits (batch, 1, *grid) or (batch, *grid).
        encoder: From patches (batch, channels, *patch) to features (batch, ...).
        patch: Size of a patch in pixels, one number for all axes or one for each.
        samples: Patches to encode for each image.
        axes: Axes of space: 1 for signals, 2 for images, 3 for volumes.
        receptive_field: Pixels of the view that one position sees, if the attention network does not pad.
        scales: Whole numbers f: patches of f times the size, averaged to `patch`, are positions as well.
        view_size: Size of the view to be made of images that come without one.
        normalize: Whether features are divided by their norm; attention is then the best distribution to draw from.
        estimator: "corrected", "murthy" or "paper_code": see `expectation`.
        replacement: Whether positions can be drawn twice.
        smoothing: Share of the attention that is spread over all positions.
        evaluation: What is done while not training: "sample", "topk" or "full".
        chunk: Patches that are encoded at once by "full".

    Raises:
        ValueError: if a number is not positive, smoothing is not in [0, 1), or a name is unknown.
    """

    def __init__(
        self,
        attention: nn.Module,
        encoder: nn.Module,
        *,
        patch: int | Sequence[int],
        samples: int,
        axes: int = 2,
        receptive_field: int = 0,
        scales: Sequence[int] = (1,),
        view_size: Sequence[int] | None = None,
        normalize: bool = False,
        estimator: Estimator = "corrected",
        replacement: bool = False,
        smoothing: float = 0.0,
        evaluation: Evaluation = "sample",
        chunk: int = 256,
    ) -> None:
        super().__init__(
            attention, encoder, patch=patch, samples=samples, axes=axes, receptive_field=receptive_field, scales=scales,
            view_size=view_size, normalize=normalize,
        )  # fmt: skip
        if evaluation not in _EVALUATIONS:
            raise ValueError(f"evaluation is one of {', '.join(_EVALUATIONS)}, got {evaluation!r}.")
        if not 0 <= smoothing < 1 or chunk < 1:
            raise ValueError(f"smoothing must lie in [0, 1) and chunk be positive, got {smoothing} and {chunk}.")
        if estimator == "murthy" and replacement:
            raise ValueError(f"estimator={estimator!r} is for draws without replacement: use 'corrected' with it.")
        self.estimator, self.replacement, self.smoothing = estimator, replacement, smoothing
        self.evaluation, self.chunk = evaluation, chunk

    def forward(
        self, source: Source, view: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Sampled:
        """Look at a batch of images.

        Args:
            source: (batch, channels, *space) of any dtype (whole numbers are divided by the largest of their type), or
                one lazy image for each sample.
            view: Small views, (batch, channels, *small); None to make them of view_size.
            generator: Of the draw.

        Returns:
            Features, attention, and what was drawn.
        """
        logits, places = self.look(source, view)
        # Float64: without replacement even positions with next to no attention are drawn when no others are left.
        attention = torch.softmax(logits.to(torch.float64), -1)
        if self.smoothing:
            attention = (1 - self.smoothing) * attention + self.smoothing / attention.shape[1]
            logits = attention.detach().log()
        if not self.training and self.evaluation == "full":
            return self._full(source, attention, places)
        if not self.training and self.evaluation == "topk":
            chosen, order = attention.topk(min(self.samples, attention.shape[1]), dim=-1)
            patches, boxes = self.cut(source, order, places)
            weights = chosen / chosen.sum(-1, keepdim=True)
            features = mixed(weights, self.encode(patches.to(weights.device)))
            return Sampled(features, attention, order, boxes, places.grids)
        order = draw(logits, self.samples, replacement=self.replacement, generator=generator)
        patches, boxes = self.cut(source, order, places)
        features = expectation(
            self.encode(patches.to(attention.device)), attention, order, estimator=self.estimator,
            replacement=self.replacement,
        )  # fmt: skip
        return Sampled(features, attention, order, boxes, places.grids)

    def _full(self, source: Source, attention: Tensor, places: Places) -> Sampled:
        """Encode every position, a chunk at a time.

        Returns:
            Exact features, and all positions.
        """
        batch, count = attention.shape
        order = torch.arange(count, device=attention.device).expand(batch, -1)
        total, boxes = None, []
        for part in torch.split(order, max(1, self.chunk // batch), 1):
            patches, box = self.cut(source, part, places)
            boxes.append(box)
            weights = attention.gather(1, part)
            found = mixed(weights, self.encode(patches.to(attention.device)))
            total = found if total is None else total + found
        assert total is not None
        return Sampled(total, attention, order, torch.cat(boxes, 1), places.grids)


def as_float(x: Tensor) -> Tensor:
    """Return x in floating point: whole numbers divided by the largest of their type, as images are kept."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype()) * _unit(x)


def _unit(x: Tensor) -> float:
    return 1.0 if x.is_floating_point() or x.dtype == torch.bool else 1 / torch.iinfo(x.dtype).max


def _shrunk(view: Tensor, factor: int) -> Tensor:
    """Average blocks of factor pixels along every axis of space; what is left over at the end falls away.

    Args:
        view: (batch, channels, *space).
        factor: Pixels of a block along each axis.

    Returns:
        The smaller view.

    Raises:
        ValueError: if nothing would be left.
    """
    whole = [size // factor * factor for size in view.shape[2:]]
    if not all(whole):
        raise ValueError(f"A view of {tuple(view.shape[2:])} pixels cannot be made {factor} times smaller.")
    for axis, size in enumerate(whole, start=2):
        view = view.narrow(axis, 0, size)
    return pooled(view, [size // factor for size in whole])
