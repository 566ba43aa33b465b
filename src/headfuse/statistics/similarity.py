"""How alike the weights of heads are: the analysis of DHA (arXiv 2406.06567, App. B.1), not what it groups by."""

import torch
from jaxtyping import Float
from torch import Tensor


def cka(heads: Float[Tensor, "n d D"]) -> Float[Tensor, "n n"]:
    """Linear CKA of every pair of heads' weights, without centring, in fp64: 1 for equal heads, 0 for unrelated ones.

    `|W_i W_j^T|^2 / (|W_i W_i^T| |W_j W_j^T|)` with the rows of a head as its channels. Neither a rotation of a head's
    channels nor its scale matters, so heads that CKA calls equal may still be far from poolable. A vanishing head is
    like no other, nor itself.
    """
    count, rows = len(heads), heads.double().flatten(0, 1)
    overlaps = (rows @ rows.mT).unflatten(0, (count, -1)).unflatten(-1, (count, -1))
    energy = overlaps.pow(2).sum((1, 3))
    sizes = energy.diagonal().sqrt()
    return energy / (sizes[:, None] * sizes[None, :]).clamp_min(torch.finfo(torch.float64).tiny)


def redundancy(similarity: Float[Tensor, "n n"]) -> float:
    """The mean similarity of two different heads; 0 for a head alone."""
    count = len(similarity)
    if count < 2:
        return 0.0
    return similarity.triu(1).sum().item() * 2 / (count * (count - 1))
