"""What all kernels agree on: the scores of products, and which of a row's tokens a program sees."""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 scores of products of queries and keys; `scale` holds log2(e) already, `softcap` too."""
    scores = products * scale
    if SOFTCAP:
        # softcap * tanh(scores / softcap), where both carry the factor log2(e).
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.8853900817779268 / softcap))))
    return scores


@triton.jit
def scored(products, seen, scale, softcap, SOFTCAP: tl.constexpr):
    """`capped`, -inf for tokens, the first axis, that are not `seen`."""
    return tl.where(seen[:, None], capped(products, scale, softcap, SOFTCAP), float("-inf"))


@triton.jit
def stretch(lengths, starts, window, row, split, splits, GRANULE: tl.constexpr, ALIGN: tl.constexpr):
    """First visible key of the row, then the tokens `first..last` of this split; `ALIGN` begins at whole granules."""
    length = tl.load(lengths + row)
    start = 0
    if starts is not None:
        start = tl.load(starts + row)
    start = tl.where(window > 0, tl.maximum(start, length - window), start)
    origin = start
    if ALIGN:
        origin = (start // GRANULE) * GRANULE
    share = tl.cdiv(tl.cdiv(tl.maximum(length - origin, 0), splits), GRANULE) * GRANULE
    first = origin + split * share
    return start, first, tl.minimum(first + share, length)
