"""Attention shared by clusters of alike queries, as a setting that other modules carry and as layers with projections.

    setting = Clustering(clusters=100, topk=32)
    out = setting(q, k, v)                             # (batch, length, heads, dim); exact where that is faster
    layer = ImprovedClusteredAttention(256, 8)
    out = layer(x, mask=real)                          # (batch, length, 256)

Below the length where clusters pay, and for heads whose number of clusters is 0, attention is exact.
Source: Vyas, Katharopoulos, Fleuret, "Fast transformers with clustered attention", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..ops.clustered_attention import Clusterer, KMeans, clustered_attention
from ..ops.clustered_attention.break_even import pays


@dataclass(frozen=True)
class Clustering:
    """How the heads of one attention are clustered.

    Args:
        clusters: C, for all heads or for each; 0 for exact heads. At most as many as queries are used.
        topk: k, for all heads or for each; 0 for plain clustered attention.
        clusterer: What groups the queries.
        exact_below: Length below which attention is exact; None asks a model of the two times (`break_even.pays`), 0
            always clusters.
        block: Positions of a block if causal; None for about sqrt(clusters * length).
        rest: How keys count that a cluster did not choose: "shared" as its centre weighs them, with the paper's
            guarantee; "key" as one more key whose weight each query finds itself: nearer on average, not on every row.

    Raises:
        ValueError: if a number is negative, clusters and topk are not of one length, or rest is unknown.
    """

    clusters: int | tuple[int, ...] = 100
    topk: int | tuple[int, ...] = 32
    clusterer: Clusterer = field(default_factory=KMeans)
    exact_below: int | None = None
    block: int | None = None
    rest: Literal["shared", "key"] = "shared"

    def __post_init__(self) -> None:
        if self.rest not in {"shared", "key"}:
            raise ValueError(f"Clustering.rest is 'shared' or 'key', got {self.rest!r}.")
        for name in ("clusters", "topk"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(not isinstance(n, int) or n < 0 for n in numbers):
                raise ValueError(f"Clustering.{name} is an integer >= 0 or a tuple of them, one a head, got {value!r}.")
        if self.exact_below is not None and self.exact_below < 0:
            raise ValueError(f"Clustering.exact_below is a length >= 0 or None, got {self.exact_below!r}.")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries, (batch, length, heads, dim).
            k: Keys, (batch, keys, heads, dim).
            v: Values, (batch, keys, heads, values).
            mask: Which keys are real, (batch, keys), bool.
            query_mask: Which queries are real, (batch, length), bool.
            causal: Whether position i sees positions up to i alone. Fewer queries than keys are the last positions, as
                in generation with a cache, and are exact.
            scale: Of the logits; None for 1 / sqrt(dim).
            start: Centres from which the clusterer starts, (1 or batch, heads, C, dim).

        Returns:
            (batch, length, heads, values).

        Raises:
            ValueError: if a causal call has more queries than keys.
        """
        heads, length, keys = q.shape[2], q.shape[1], k.shape[1]
        if causal and keys < length:
            raise ValueError(f"Causal attention needs at least as many keys as queries, got {keys} and {length}.")
        topk = _each(self.topk, heads, "topk")
        clusters = [min(c, length) for c in _each(self.clusters, heads, "clusters")]
        # A cluster of past queries sees one set of keys: none of them may be padding.
        apart = causal and (mask is not None or keys > length)
        if apart or (self.exact_below is not None and length < self.exact_below):
            clusters = [0] * heads
        elif self.exact_below is None:
            shape = length, keys, q.shape[3] + v.shape[3]
            clusters = [
                c if c and pays(shape, clusters=c, topk=t, causal=causal) else 0 for c, t in zip(clusters, topk)
            ]
        shared = [h for h, c in enumerate(clusters) if c]
        found = []
        if shared:
            qs, ks, vs = (x if len(shared) == heads else x[:, :, shared] for x in (q, k, v))
            counts = [clusters[h] for h in shared]
            found.append(clustered_attention(
                qs, ks, vs, clusters=counts, topk=[topk[h] for h in shared], clusterer=self.clusterer, mask=mask,
                query_mask=query_mask, scale=scale, causal=causal, block=self.block if causal else None, rest=self.rest,
                start=None if start is None else start[:, shared, : max(counts)],
            ))  # fmt: skip
        if len(shared) == heads:
            return found[0]
        alone = [h for h in range(heads) if h not in shared]
        qs, ks, vs = (x if not shared else x[:, :, alone] for x in (q, k, v))
        found.append(_exact(qs, ks, vs, mask=mask, causal=causal, scale=scale))
        order = torch.tensor([*shared, *alone], device=q.device).argsort()
        return torch.cat(found, 2)[:, :, order] if shared else found[0]


class ClusteredAttention(nn.Module):
    """Self-attention or cross-attention over (batch, length, embed_dim), shared by clusters of queries.

    Args:
        embed_dim: Size of inputs and outputs, a multiple of num_heads.
        num_heads: Heads.
        clustering: C, k, the clusterer and from which length on; None for 100 clusters and no keys of its own (k = 0).
        causal: Whether a position sees itself and the past alone.
        bias: Whether the projections have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the sizes do not fit.
    """

    _topk = 0

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        clustering: Clustering | None = None,
        causal: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}.")
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.clustering = Clustering(topk=self._topk) if clustering is None else clustering
        self.projections = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, *, context: Tensor | None = None, mask: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (batch, length, embed_dim).
            context: Where keys and values come from, (batch, keys, embed_dim); None for x. Not for causal layers.
            mask: Which keys are real, (batch, keys), bool: False for padding. Without context, queries too.
            start: Centres from which the clusterer starts, as of an earlier step.

        Returns:
            (batch, length, embed_dim).

        Raises:
            ValueError: if a causal layer gets a context, or shapes do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"{type(self).__name__} takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        if context is not None and self.causal:
            raise ValueError("A causal layer attends to its own past: it takes no context.")
        if context is None:
            q, k, v = self.projections(x).chunk(3, -1)
        else:
            weight, bias, size = self.projections.weight, self.projections.bias, self.embed_dim
            q = nn.functional.linear(x, weight[:size], None if bias is None else bias[:size])
            k, v = nn.functional.linear(context, weight[size:], None if bias is None else bias[size:]).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        out = self.clustering(
            q, k, v, mask=mask, query_mask=mask if context is None else None, causal=self.causal, start=start
        )
        result: Tensor = self.out(out.flatten(-2))
        return result

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        return f"{self.embed_dim}, {self.num_heads}, causal={self.causal}, {self.clustering}"


class ImprovedClusteredAttention(ClusteredAttention):
    """Clustered attention whose queries weigh the 32 keys that matter most to their cluster themselves.

    Arguments are those of `ClusteredAttention`; without `clustering` there are 100 clusters.
    """

    _topk = 32


def _each(value: int | tuple[int, ...], heads: int, name: str) -> list[int]:
    """Return one number a head.

    Raises:
        ValueError: if there are not as many as heads.
    """
    found = [value] * heads if isinstance(value, int) else list(value)
    if len(found) != heads:
        raise ValueError(f"Clustering.{name} has {len(found)} numbers, the attention {heads} heads: {value!r}.")
    return found


def _exact(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length, keys = q.shape[2], k.shape[2]
    if mask is None and (not causal or length in {1, keys}):
        # A single query is the last position. is_causal would take it for the first.
        return scaled_dot_product_attention(q, k, v, is_causal=causal and length == keys, scale=scale).transpose(1, 2)
    allowed = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=q.device) if mask is None else mask[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(1, 2)
