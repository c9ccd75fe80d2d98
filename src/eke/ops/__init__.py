"""Operations with several implementations: a reference, native kernels for the CPU, Triton for GPUs.

    y = ops.ks_matmul(x, blocks)                       # one Kronecker-sparse factor, last dimension of x
    y = ops.ks_matmul_batch_last(x, blocks)            # first dimension of x
    y = ops.ks_chain_matmul(x, [left, middle, right])  # a product of factors, a tile of the batch at a time
    y = ops.sparse_matmul(x, values, columns, starts)  # a matrix with few entries that lie anywhere
    y, state = ops.linear_attention(q, k, v, causal=True)  # attention in linear time
    y = ops.clustered_attention(q, k, v, clusters=100, topk=32)  # near to softmax attention, without training
    logits = ops.decode.Decoder(blocks, heads=8)(x, states)  # all layers for one position of every sample

Each operation is a folder; its `reference.py` is the specification that every other implementation must agree with.
"""

from .clustered_attention import clustered_attention
from .ks_matmul import choose_algorithm, ks_chain_matmul, ks_matmul, ks_matmul_batch_last
from .linear_attention import linear_attention
from .sparse_matmul import sparse_matmul

__all__ = [
    "choose_algorithm",
    "clustered_attention",
    "ks_chain_matmul",
    "ks_matmul",
    "ks_matmul_batch_last",
    "linear_attention",
    "sparse_matmul",
]
