"""Many queries a row: one program for a block of queries of one query head, which reads its key and value head by map.

Online softmax over tiles of tokens, those that every query of the block sees without a mask. The log-sum-exp is stored
for the backward pass. A row's queries are the last of its tokens.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headfuse.ops.decoupled_attention.kernel_scores import LN2, capped
from headfuse.ops.decoupled_attention.passes_kernel import head_tile


@triton.jit
def row_tile(rows, at, low, count, row_stride, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Lines `at..at+BLOCK`, zeros where not in `low..count`: `[BLOCK, dims]`."""
    lines, dims = tl.arange(0, BLOCK), tl.arange(0, PADDED_DIM)
    kept = ((at + lines >= low) & (at + lines < count))[:, None]
    if DIM != PADDED_DIM:
        kept = kept & (dims < DIM)[None, :]
    offsets = lines[:, None] * row_stride + dims[None, :]
    return tl.load(rows + at.to(tl.int64) * row_stride + offsets, mask=kept, other=0.0)


@triton.jit
def row_span(lengths, starts, row, capacity):
    """The tokens `start..length` of a row."""
    length, start = capacity, row * 0
    if lengths is not None:
        length = tl.load(lengths + row)
    if starts is not None:
        start = tl.load(starts + row)
    return start, length


@triton.jit
def seen_by(position, token, start, window, WINDOW: tl.constexpr):
    """Whether the query at `position` sees `token`; the two broadcast."""
    seen = (token >= start) & (token <= position)
    if WINDOW:
        seen = seen & (token > position - window)
    return seen


@triton.jit
def whole_span(position, start, length, window, WINDOW: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens for `QUERIES` queries, the first at `position`: `first..last` in all, `whole..rest` seen by each query."""
    last = tl.minimum(position + QUERIES, length)
    first, whole = start, start
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
        whole = tl.maximum(whole, last - window)
    first = (first // BLOCK) * BLOCK
    whole = tl.minimum(tl.cdiv(tl.maximum(whole, 0), BLOCK) * BLOCK, tl.maximum(last, first))
    rest = tl.maximum((tl.maximum(position + 1, 0) // BLOCK) * BLOCK, whole)
    return first, whole, rest, last


@triton.jit
def attended(
    outputs,
    top,
    total,
    queries,
    positions,
    key,
    value,
    block_table,
    row,
    key_head,
    value_head,
    begin,
    end,
    start,
    length,
    scale,
    softcap,
    window,
    key_page_stride,
    key_head_stride,
    key_token_stride,
    value_page_stride,
    value_head_stride,
    value_token_stride,
    table_row_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the tokens `begin..end` into outputs `[queries, dims]`, maximum and sum of the weights."""
    for step in tl.range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK), num_stages=STAGES):
        at = begin + step * BLOCK
        token = at + tl.arange(0, BLOCK)
        held = (token >= start) & (token < length)
        keys = head_tile(
            key,
            block_table,
            row,
            key_head,
            at,
            held,
            key_page_stride,
            key_head_stride,
            key_token_stride,
            table_row_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
        )
        scores = capped(tl.dot(queries, tl.trans(keys), input_precision=PRECISION), scale, softcap, SOFTCAP)
        if MASKED:
            seen = seen_by(positions[:, None], token[None, :], start, window, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        values = head_tile(
            value,
            block_table,
            row,
            value_head,
            at,
            held,
            value_page_stride,
            value_head_stride,
            value_token_stride,
            table_row_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
        )
        outputs = outputs * shrink[:, None]
        outputs = tl.dot(weights.to(values.dtype), values, outputs, input_precision=PRECISION)
        top = new_top
    return outputs, top, total


@triton.jit(do_not_specialize=["window", "num_heads", "count", "capacity", "table_row_stride"])
def prefill_kernel(
    query,
    key,
    value,
    out,
    lse,
    lengths,
    starts,
    block_table,
    key_map,
    value_map,
    scale,
    softcap,
    window,
    num_heads,
    count,
    capacity,
    query_row_stride,
    query_head_stride,
    query_token_stride,
    out_row_stride,
    out_head_stride,
    out_token_stride,
    key_page_stride,
    key_head_stride,
    key_token_stride,
    value_page_stride,
    value_head_stride,
    value_token_stride,
    table_row_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of `QUERIES` queries, query heads, rows); the last queries, which see most, come first."""
    block, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide_row, wide_head = row.to(tl.int64), head.to(tl.int64)
    start, length = row_span(lengths, starts, row, capacity)
    key_head, value_head = tl.load(key_map + head), tl.load(value_map + head)
    lines, dims = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM)
    position = length - count + block * QUERIES
    positions = length - count + lines
    base = query + wide_row * query_row_stride + wide_head * query_head_stride
    queries = row_tile(base, block * QUERIES, 0, count, query_token_stride, DIM, PADDED_DIM, QUERIES)
    first, whole, rest, last = whole_span(position, start, length, window, WINDOW, QUERIES, BLOCK)
    outputs = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for part in tl.static_range(3):
        if part != 0 or WINDOW or starts is not None:
            outputs, top, total = attended(
                outputs,
                top,
                total,
                queries,
                positions,
                key,
                value,
                block_table,
                row,
                key_head,
                value_head,
                first if part == 0 else whole if part == 1 else rest,
                whole if part == 0 else tl.minimum(rest, last) if part == 1 else last,
                start,
                length,
                scale,
                softcap,
                window,
                key_page_stride,
                key_head_stride,
                key_token_stride,
                value_page_stride,
                value_head_stride,
                value_token_stride,
                table_row_stride,
                DIM,
                PADDED_DIM,
                BLOCK,
                STAGES,
                PAGE,
                SOFTCAP,
                WINDOW,
                PRECISION,
                part != 1,
            )
    divisor = tl.where(total == 0, 1.0, total)
    outputs = outputs / divisor[:, None]
    place = (wide_row * num_heads + head) * count + lines
    tl.store(lse + place, tl.where(total == 0, float("-inf"), (top + tl.log2(divisor)) * LN2), mask=lines < count)
    address = out + wide_row * out_row_stride + wide_head * out_head_stride
    address += lines[:, None].to(tl.int64) * out_token_stride + dims[None, :]
    tl.store(address, outputs.to(out.dtype.element_ty), mask=(lines < count)[:, None] & (dims < DIM)[None, :])
