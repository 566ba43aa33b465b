"""Joins what the splits of a row computed: the last step of split decoding.

Partial outputs are normalised within their split and carry the base-2 log-sum-exp of its scores, -inf if the split was
empty. Legend: `splits` S, `heads` H query heads of the row, `SPLITS` and `HEADS` the tile.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def combine_heads(
    partial_out,
    partial_lse,
    out,
    lse,
    row,
    heads,
    valid,
    num_heads,
    splits,
    out_row_stride,
    out_head_stride,
    WEIGHTED: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Outputs of the `HEADS` query heads `heads` of one row. Not `WEIGHTED`: the partial outputs simply add up."""
    dims = tl.arange(0, PADDED_DIM)
    some = tl.arange(0, SPLITS)
    first_of_head = (row.to(tl.int64) * num_heads + heads) * splits
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if WEIGHTED:
        for first in tl.range(0, splits, SPLITS):
            inside = (first + some < splits)[:, None] & valid[None, :]
            address = first_of_head[None, :] + first + some[:, None]
            scores = tl.load(partial_lse + address, mask=inside, other=float("-inf"), cache_modifier=".cg")
            top = tl.maximum(top, tl.max(scores, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    joined = tl.zeros([HEADS, PADDED_DIM], tl.float32)
    for first in tl.range(0, splits, SPLITS):
        inside = (first + some < splits)[:, None] & valid[None, :]
        address = first_of_head[None, :] + first + some[:, None]
        part = tl.load(
            partial_out + address[:, :, None] * DIM + dims[None, None, :],
            mask=inside[:, :, None] & (dims < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if WEIGHTED:
            scores = tl.load(partial_lse + address, mask=inside, other=float("-inf"), cache_modifier=".cg")
            weights = tl.exp2(scores - top[None, :])
            total += tl.sum(weights, 0)
            part *= weights[:, :, None]
        joined += tl.sum(part, 0)
    if WEIGHTED:
        divisor = tl.where(total == 0, 1.0, total)
        joined = joined / divisor[:, None]
        joined_lse = tl.where(total == 0, float("-inf"), (top + tl.log2(divisor)) * LN2)
        tl.store(lse + row.to(tl.int64) * num_heads + heads, joined_lse, mask=valid)
    address = row.to(tl.int64) * out_row_stride + heads[:, None].to(tl.int64) * out_head_stride + dims[None, :]
    tl.store(out + address, joined.to(out.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


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
    PADDED_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a query head and row. `DEPENDENT`: launched before the splits are done, so it waits for them."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    heads = tl.program_id(0) + tl.arange(0, 1)
    combine_heads(
        partial_out,
        partial_lse,
        out,
        lse,
        tl.program_id(1),
        heads,
        heads < num_heads,
        num_heads,
        splits,
        out_row_stride,
        out_head_stride,
        WEIGHTED,
        SPLITS,
        1,
        DIM,
        PADDED_DIM,
    )
