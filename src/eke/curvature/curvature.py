"""The curvature of a model's loss at its sites, estimated once and asked by every method.

Four verbs: `quadratic` (predicted loss of a change of a matrix), `diagonal`, `precondition`, `factors`; `linear` for
the first-order part that a model which is not at a minimum of this data's loss has; and `output_quadratic` for
changes of an output that are no change of a matrix (a removed block, a replaced attention, rounded activations): 1/2
E[dy^T G dy].

Gradients are those of the given loss: with labels this is the empirical Fisher; with `sampled_loss` the labels are
drawn from the model, which makes it the Fisher (for softmax and cross entropy equal to the Gauss-Newton matrix).
Cost: one forward and one backward pass, plus rows * n^2 a site; the correction runs its samples again and takes
m n^2 a sample and two eigendecompositions a site. Memory: one batch's
activations, n^2 + m^2 + m n totals a site (and m n for each leading direction), 64 MB of patches, and the batches that
the correction reads again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import cost
from .._errors import suggest
from .._types import Batch, Loss
from ..sites import Site
from .basis import Basis
from .factors import Factors, output_quadratic
from .leading import Leading, affordable
from .recorder import Recorder, private_copy
from .totals import BoundaryTotals, MomentTotals, SiteTotals, weight_gradient

_TENSORS = ("a", "g", "mean")
_BASIS = ("g_vectors", "a_vectors", "moments")
_LEADING = ("rows", "rest")
_NUMBERS = ("samples", "locations", "active", "channel_dim", "coherence")
_FORMAT = "eke curvature 2"


class Curvature:
    """Kronecker factors by site name, and second moments of the gradients at the outputs of named modules.

    Args:
        factors: By site name.
        outputs: By module name (G (m, m), channel dimension).
    """

    def __init__(self, factors: Mapping[str, Factors], outputs: Mapping[str, tuple[Tensor, int]] | None = None) -> None:
        self._factors = dict(factors)
        self._outputs = dict(outputs or {})
        self._bases: dict[str, Basis] = {}

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[Batch],
        sites: Sequence[Site],
        *,
        outputs: Mapping[str, int] | None = None,
        max_samples: int | None = None,
        max_locations: int | None = None,
        corrected_samples: int = 256,
        leading: int = 0,
    ) -> Curvature:
        """Estimate factors on a private copy of the model in eval mode; the model itself is not touched.

        Args:
            model: The model.
            loss: `loss(model, batch)`: mean loss over the samples of a batch. The number of samples is the first
                dimension of the first tensor that the model is called with.
            batches: Calibration batches, read once.
            sites: Matrix sites, all `visible`.
            outputs: Module name to channel dimension, for outputs whose changes `output_quadratic` shall price.
            max_samples: Stop after the batch that reaches this number.
            max_locations: Locations of a convolution's output used for A a sample (a shifting lattice); None for all.
            corrected_samples: Samples (of the first batches, which are run again) for the eigenvalue correction; 0
                leaves the plain Kronecker product.
            leading: Directions of largest curvature a site that are kept whole (from the same samples), for `quadratic`
                alone; fewer in models where all would take more than 128 MB. Changes that move many entries together,
                such as cut channels, are priced too low without.

        Returns:
            The curvature. A site that the loss does not use is left out with a warning.

        Raises:
            ValueError: if there are no batches, a site is not visible, `leading` is negative, or data or loss are not
                finite or so large that squares overflow.
        """
        refused = [site.name for site in sites if not site.visible]
        if refused:
            raise ValueError(f"Curvature needs sites whose inputs and outputs can be seen (`visible`), got {refused}.")
        most = affordable(leading, [site.shape for site in sites])
        private = private_copy(model, sites)
        totals = [SiteTotals(site, max_locations) for site in sites]
        borders = [BoundaryTotals(name, dim) for name, dim in (outputs or {}).items()]
        seen, index = 0, -1
        again: list[Batch] = []
        with (
            Recorder(private, [*(site.boundary for site in sites), *(border.name for border in borders)]) as recorder,
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            for index, batch in enumerate(batches):
                if seen < corrected_samples:
                    again.append(batch)
                calls, samples = recorder.run(loss, batch, index)
                for total in totals:
                    here = calls.get(total.site.boundary, [])
                    total.add(here, samples, index)
                    for call in here:
                        total.add_gradient(weight_gradient(total.site, private, call), samples)
                for border in borders:
                    border.add(calls.get(border.name, []), samples, index)
                seen += samples
                # Or they would live through the next batch's passes.
                calls, here = {}, []
                if max_samples is not None and seen >= max_samples:
                    break
            cost.give_back()
            # Sums become factors one by one: both of all sites at once would be the peak of a run.
            totals.reverse()
            known: dict[str, Factors] = {}
            while totals:
                value = totals[-1].factors()
                if value is not None:
                    known[totals[-1].site.name] = value
                totals.pop()
            corrected = [site for site in sites if site.name in known and again]
            moments = [MomentTotals(site, known[site.name], most) for site in corrected]
            cost.give_back()
            for number, batch in enumerate(again):
                calls, samples = recorder.run(loss, batch, number)
                for moment in moments:
                    moment.add(calls.get(moment.site.boundary, []), samples, number)
                calls = {}
            while moments:
                moment = moments.pop()
                known[moment.site.name] = moment.corrected()
            cost.give_back()
        if index < 0:
            raise ValueError(
                "Curvature.estimate got 0 batches; an iterator that was read before is empty: pass a list or a loader."
            )
        outer = {border.name: (border.moment(), border.channel_dim) for border in borders}
        unused = [site.name for site in sites if site.name not in known]
        unused += [name for name, (moment_there, _) in outer.items() if moment_there is None]
        if unused:
            warnings.warn(f"The loss does not use {unused}: no curvature there.", stacklevel=2)
        return cls(known, {name: (value, dim) for name, (value, dim) in outer.items() if value is not None})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(self._factors)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the modules whose outputs `output_quadratic` knows besides the sites."""
        return tuple(self._outputs)

    def factors(self, name: str) -> Factors:
        """Return the factors of a site.

        Raises:
            KeyError: if the site was not estimated.
        """
        if name not in self._factors:
            raise KeyError(f"No curvature was estimated for the site {name!r}." + suggest(name, self._factors))
        return self._factors[name]

    def quadratic(self, name: str, delta: Tensor) -> float:
        """Return the predicted loss increase of a change D (m, n) of a site's matrix, to second order."""
        return self.factors(name).quadratic(delta)

    def linear(self, name: str, delta: Tensor) -> float:
        """Return the first-order change of the loss for a change D (m, n) of a site's matrix, on the data seen."""
        return self.factors(name).linear(delta)

    def diagonal(self, name: str) -> Tensor:
        """Return the curvature (m, n) of each entry of a site's matrix on its own."""
        return self.factors(name).diagonal

    def precondition(self, name: str, gradient: Tensor, damping: float) -> Tensor:
        """Return (curvature + damping I)^-1 applied to a gradient (m, n); the eigenbasis is kept for the next call.

        Args:
            name: Site.
            gradient: (m, n).
            damping: Positive, in units of the curvature.

        Returns:
            (m, n) in the dtype of the gradient.
        """
        if name not in self._bases:
            self._bases[name] = self.factors(name).eigenbasis()
        return self._bases[name].solve(gradient, damping)

    def output(self, name: str) -> Tensor:
        """Return G (m, m) at the output of a site, or of a module named in `outputs` when this was estimated."""
        return self._outputs[name][0] if name in self._outputs else self.factors(name).output

    def output_quadratic(self, name: str, change: Tensor) -> float:
        """Return the predicted loss increase 1/2 E[sum over locations of dy^T G dy] of a change of an output.

        Args:
            name: Site, or module named in `outputs` when this was estimated.
            change: dy in the shape of the output, samples first.

        Returns:
            The prediction in units of the loss; products across locations count as uncorrelated.
        """
        if name in self._outputs:
            moment, dim = self._outputs[name]
            return output_quadratic(moment, change, dim)
        factors = self.factors(name)
        return output_quadratic(factors.output, change, factors.channel_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors = {f"{name}/output": moment for name, (moment, _) in self._outputs.items()}
        for name, f in self._factors.items():
            tensors |= {f"{name}/{key}": getattr(f, key) for key in (*_TENSORS, "gradient")}
            if f.basis is not None:
                tensors |= {f"{name}/basis/{key}": getattr(f.basis, key) for key in _BASIS}
            if f.leading is not None:
                tensors |= {f"{name}/leading/{key}": getattr(f.leading, key) for key in _LEADING}
        about = {
            "sites": {name: {key: getattr(f, key) for key in _NUMBERS} for name, f in self._factors.items()},
            "outputs": {name: dim for name, (_, dim) in self._outputs.items()},
        }
        found = {key: value for key, value in tensors.items() if value is not None}
        cost.write_tensors(Path(path), found, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curvature:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The curvature, on the CPU.

        Raises:
            ValueError: if the file is something else.
        """
        held, metadata = cost.read_tensors(Path(path))
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)!r} is no {_FORMAT!r} file (format {metadata.get('format')!r}).")
        about = json.loads(metadata["about"])
        factors = {}
        for name, numbers in about["sites"].items():
            tensors = {key: held[f"{name}/{key}"] for key in _TENSORS}
            basis = leading = None
            if f"{name}/basis/moments" in held:
                basis = Basis(**{key: held[f"{name}/basis/{key}"] for key in _BASIS})
            if f"{name}/leading/rows" in held:
                leading = Leading(**{key: held[f"{name}/leading/{key}"] for key in _LEADING})
            parts = {"basis": basis, "leading": leading, "gradient": held.get(f"{name}/gradient")}
            factors[name] = Factors(**tensors, **numbers, **parts)  # type: ignore[arg-type]
        return cls(factors, {name: (held[f"{name}/output"], dim) for name, dim in about["outputs"].items()})
