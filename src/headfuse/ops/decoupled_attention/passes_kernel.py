"""Decoding in two passes: scores of each key head, then the weighted sums of each value head.

Both passes are plain loops over one head's tokens, whatever the maps; the scores go through memory in fp32. For every
GPU and dtype that the kernel for Hopper is not made for.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headfuse.ops.decoupled_attention.kernel_scores import LN2, scored, stretch


@triton.jit
def head_tile(
    cache,
    block_table,
    row,
    head,
    at,
    seen,
    page_stride,
    head_stride,
    token_stride,
    table_row_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The tokens `at..at+BLOCK` of one head, `[tokens, dims]`; zeros where not `seen`."""
    tokens, dims = tl.arange(0, BLOCK), tl.arange(0, PADDED_DIM)
    base = cache + head.to(tl.int64) * head_stride
    if PAGE == 0:
        base += row.to(tl.int64) * page_stride + at.to(tl.int64) * token_stride
        offsets = tokens[:, None] * token_stride + dims[None, :]
    else:
        token = at + tokens
        page = tl.load(block_table + row.to(tl.int64) * table_row_stride + token // PAGE, mask=seen, other=0)
        offsets = (page.to(tl.int64) * page_stride + (token % PAGE) * token_stride)[:, None] + dims[None, :]
    kept = seen[:, None]
    if DIM != PADDED_DIM:
        kept = kept & (dims < DIM)[None, :]
    return tl.load(base + offsets, mask=kept, other=0.0)


@triton.jit(do_not_specialize=["window", "num_heads", "splits", "table_row_stride"])
def scores_kernel(
    query,
    key,
    scores,
    partial_lse,
    lengths,
    starts,
    block_table,
    groups,
    scale,
    softcap,
    window,
    num_heads,
    splits,
    query_row_stride,
    query_head_stride,
    key_page_stride,
    key_head_stride,
    key_token_stride,
    table_row_stride,
    scores_head_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (splits, key heads, rows): base-2 scores `[row, query head, token]` and each split's log-sum-exp."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, first, last = stretch(lengths, starts, window, row, split, splits, 16, False)
    slots, dims, tokens = tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK)
    heads = tl.load(groups + head * QUERIES + slots)
    valid = heads >= 0
    queries = tl.load(
        query + row.to(tl.int64) * query_row_stride + heads[None, :] * query_head_stride + dims[:, None],
        mask=valid[None, :] & (dims < DIM)[:, None],
        other=0.0,
    )
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    lines = scores + (row.to(tl.int64) * num_heads + heads) * scores_head_stride
    for step in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK), num_stages=STAGES):
        at = first + step * BLOCK
        seen = (at + tokens >= start) & (at + tokens < last)
        tile = head_tile(
            key,
            block_table,
            row,
            head,
            at,
            seen,
            key_page_stride,
            key_head_stride,
            key_token_stride,
            table_row_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
        )
        points = scored(tl.dot(tile, queries, input_precision=PRECISION), seen, scale, softcap, SOFTCAP)
        tl.store(lines[None, :] + (at + tokens)[:, None], points, mask=valid[None, :] & seen[:, None])
        new_top = tl.maximum(top, tl.max(points, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(points - new_top[None, :]), 0)
        top = new_top
    place = (row.to(tl.int64) * num_heads + heads) * splits + split
    tl.store(partial_lse + place, top + tl.log2(tl.where(total == 0, 1.0, total)), mask=valid)


@triton.jit(do_not_specialize=["window", "num_heads", "splits", "table_row_stride"])
def values_kernel(
    value,
    scores,
    lse,
    partial_out,
    partial_lse,
    lengths,
    starts,
    block_table,
    groups,
    window,
    num_heads,
    splits,
    value_page_stride,
    value_head_stride,
    value_token_stride,
    table_row_stride,
    scores_head_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (splits, value heads, rows): each split's share of the outputs, to be added up; split 0 writes `lse`."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, first, last = stretch(lengths, starts, window, row, split, splits, 16, False)
    slots, dims, tokens = tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK)
    heads = tl.load(groups + head * QUERIES + slots)
    valid = heads >= 0
    line = row.to(tl.int64) * num_heads + heads

    some = tl.arange(0, SPLITS)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for begin in tl.range(0, splits, SPLITS):
        kept = (begin + some < splits)[:, None] & valid[None, :]
        parts = tl.load(partial_lse + line[None, :] * splits + begin + some[:, None], mask=kept, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(parts, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(parts - base[None, :]), 0)
        top = new_top
    # A row without keys has no scores to weigh.
    whole = tl.where(total == 0, 0.0, top + tl.log2(tl.where(total == 0, 1.0, total)))
    if split == 0:
        tl.store(lse + line, tl.where(total == 0, float("-inf"), whole * LN2), mask=valid)

    outputs = tl.zeros([PADDED_DIM, QUERIES], tl.float32)
    lines = scores + line * scores_head_stride
    for step in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK), num_stages=STAGES):
        at = first + step * BLOCK
        seen = (at + tokens >= start) & (at + tokens < last)
        points = tl.load(
            lines[None, :] + (at + tokens)[:, None], mask=valid[None, :] & seen[:, None], other=float("-inf")
        )
        weights = tl.exp2(points - whole[None, :]).to(value.dtype.element_ty)
        tile = head_tile(
            value,
            block_table,
            row,
            head,
            at,
            seen,
            value_page_stride,
            value_head_stride,
            value_token_stride,
            table_row_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
        )
        outputs = tl.dot(tl.trans(tile), weights, outputs, input_precision=PRECISION)
    place = (line * splits + split)[None, :] * DIM + dims[:, None]
    tl.store(partial_out + place, outputs, mask=valid[None, :] & (dims < DIM)[:, None])
