"""Joins what the splits of a row computed: the last step of split decoding.

Partial outputs are normalised within their split and carry the base-2 log-sum-exp of its scores, -inf if the split was
empty. `SPLITS` are read at a time, of `CHANNELS` channels.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from headfuse.ops.decoupled_attention.kernel_scores import LN2


@triton.jit(do_not_specialize=["num_heads", "splits"])
def combine_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    num_heads,
    splits,
    out_row_stride,
    out_head_stride,
    WEIGHTED: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a query head, row and stretch of channels. Not `WEIGHTED`: the partial outputs simply add up.

    `DEPENDENT`: launched before the splits are done, so it waits for them, and lets what follows begin as early.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims, some = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, SPLITS)
    place = (row * num_heads + head) * splits
    top, total = float("-inf"), 0.0
    if WEIGHTED:
        for first in tl.range(0, splits, SPLITS):
            at = first + some
            scores = tl.load(partial_lse + place + at, mask=at < splits, other=float("-inf"), cache_modifier=".cg")
            top = tl.maximum(top, tl.max(scores, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    joined = tl.zeros([CHANNELS], tl.float32)
    for first in tl.range(0, splits, SPLITS):
        at = first + some
        part = tl.load(
            partial_out + (place + at)[:, None] * DIM + dims[None, :],
            mask=(at < splits)[:, None] & (dims < DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if WEIGHTED:
            scores = tl.load(partial_lse + place + at, mask=at < splits, other=float("-inf"), cache_modifier=".cg")
            weights = tl.exp2(scores - top)
            total += tl.sum(weights, 0)
            part *= weights[:, None]
        joined += tl.sum(part, 0)
    if WEIGHTED:
        divisor = tl.where(total == 0, 1.0, total)
        joined = joined / divisor
        joined_lse = tl.where(total == 0, float("-inf"), (top + tl.log2(divisor)) * LN2)
        tl.store(lse + row * num_heads + head, joined_lse, mask=tl.program_id(2) == 0)
    address = out + row * out_row_stride + head.to(tl.int64) * out_head_stride + dims
    tl.store(address, joined.to(out.dtype.element_ty), mask=dims < DIM)
