"""Gradients of attention with shared heads, without atomics: who owns a gradient adds up everything that goes into it.

Queries are owned by programs of their head, keys and values by programs of the shared head, which loop over the query
heads that read it and compute their scores again. Sums are fp32 in a fixed order, so that every run gives the same
bits. Eight products for a pair of tiles, against seven where keys and values share their groups.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headfuse.ops.decoupled_attention.kernel_scores import LN2, capped
from headfuse.ops.decoupled_attention.prefill_kernel import row_span, row_tile, seen_by, whole_span


@triton.jit
def shared_tile(cache, row, head, at, start, length, row_stride, head_stride, token_stride, DIM, PADDED_DIM, BLOCK):
    """Tokens `at..at+BLOCK` of a head of a dense cache, zeros outside the row."""
    base = cache + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    return row_tile(base, at, start, length, token_stride, DIM, PADDED_DIM, BLOCK)


@triton.jit
def weights_of(products, lse, scale, softcap, SOFTCAP: tl.constexpr):
    """Weights from products and the base-2 log-sum-exp, and what the soft-cap lets through of a gradient."""
    scores = capped(products, scale, softcap, SOFTCAP)
    slope = 1.0
    if SOFTCAP:
        slope = 1.0 - (scores / softcap) * (scores / softcap)
    return tl.exp2(scores - lse), slope


@triton.jit
def base_two(lse):
    """A stored log-sum-exp in base 2; 0 for a query that sees nothing."""
    return tl.where(lse == float("-inf"), 0.0, lse / LN2)


@triton.jit(do_not_specialize=["window", "num_heads", "count", "total"])
def query_gradient_kernel(
    query,
    key,
    value,
    out,
    out_gradient,
    lse,
    delta,
    query_gradient,
    lengths,
    starts,
    key_map,
    value_map,
    scale,
    softcap,
    window,
    slope_scale,
    num_heads,
    count,
    total,
    query_row_stride,
    query_head_stride,
    query_token_stride,
    out_row_stride,
    out_head_stride,
    out_token_stride,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of queries, query heads, rows). Also writes `delta`, the product of output and its gradient."""
    block, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide_row, wide_head = row.to(tl.int64), head.to(tl.int64)
    start, length = row_span(lengths, starts, row, total)
    key_head, value_head = tl.load(key_map + head), tl.load(value_map + head)
    at_query = block * QUERIES
    lines, dims = at_query + tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM)
    positions = length - count + lines
    base = query + wide_row * query_row_stride + wide_head * query_head_stride
    queries = row_tile(base, at_query, 0, count, query_token_stride, DIM, PADDED_DIM, QUERIES)
    shift = wide_row * out_row_stride + wide_head * out_head_stride
    outputs = row_tile(out + shift, at_query, 0, count, out_token_stride, DIM, PADDED_DIM, QUERIES)
    upstream = row_tile(out_gradient + shift, at_query, 0, count, out_token_stride, DIM, PADDED_DIM, QUERIES)
    place = (wide_row * num_heads + head) * count + lines
    inner = tl.sum(outputs.to(tl.float32) * upstream.to(tl.float32), 1)
    tl.store(delta + place, inner, mask=lines < count)
    log_sum = base_two(tl.load(lse + place, mask=lines < count, other=0.0))
    first, _whole, _rest, last = whole_span(length - count + at_query, start, length, window, WINDOW, QUERIES, BLOCK)
    gradient = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    for step in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK), num_stages=STAGES):
        at = first + step * BLOCK
        keys = shared_tile(
            key,
            row,
            key_head,
            at,
            start,
            length,
            key_row_stride,
            key_head_stride,
            key_token_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
        )
        values = shared_tile(
            value,
            row,
            value_head,
            at,
            start,
            length,
            value_row_stride,
            value_head_stride,
            value_token_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
        )
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weights, slope = weights_of(products, log_sum[:, None], scale, softcap, SOFTCAP)
        through = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        change = weights * (through - inner[:, None]) * slope
        seen = seen_by(positions[:, None], at + tl.arange(0, BLOCK)[None, :], start, window, WINDOW)
        change = tl.where(seen, change, 0.0).to(keys.dtype)
        gradient = tl.dot(change, keys, gradient, input_precision=PRECISION)
    address = (wide_row * num_heads + head) * count * DIM + lines[:, None].to(tl.int64) * DIM + dims[None, :]
    kept = (lines < count)[:, None] & (dims < DIM)[None, :]
    tl.store(query_gradient + address, (gradient * slope_scale).to(query_gradient.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["window", "num_heads", "count", "total"])
def shared_gradient_kernel(
    query,
    key,
    value,
    out_gradient,
    lse,
    delta,
    gradient,
    lengths,
    starts,
    groups,
    head_map,
    scale,
    softcap,
    window,
    slope_scale,
    num_heads,
    count,
    total,
    query_row_stride,
    query_head_stride,
    query_token_stride,
    out_row_stride,
    out_head_stride,
    out_token_stride,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    OF_KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of tokens, shared heads, rows). Gradients of keys if `OF_KEYS`, else of values.

    `groups` are the query heads of the shared heads; `head_map` is the map of the other kind.
    """
    block, shared, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide_row = row.to(tl.int64)
    start, length = row_span(lengths, starts, row, total)
    at = block * BLOCK
    tokens, dims = at + tl.arange(0, BLOCK), tl.arange(0, PADDED_DIM)
    offset = length - count
    # The first query that sees a token of the block, and the end of those that do.
    begin = (tl.maximum(at - offset, 0) // QUERIES) * QUERIES
    end = count
    if WINDOW:
        end = tl.minimum(count, at + BLOCK - 1 + window - offset)
    end = tl.where((at < length) & (at + BLOCK > start), end, begin)
    mine = tl.load(groups + shared * SLOTS + tl.arange(0, SLOTS))
    readers = tl.sum((mine >= 0).to(tl.int32), 0)
    summed = tl.zeros([BLOCK, PADDED_DIM], tl.float32)
    for slot in tl.range(0, readers, num_stages=1):
        head = tl.load(groups + shared * SLOTS + slot)
        other = tl.load(head_map + head)
        key_head = shared if OF_KEYS else other
        keys = shared_tile(
            key,
            row,
            key_head,
            at,
            start,
            length,
            key_row_stride,
            key_head_stride,
            key_token_stride,
            DIM,
            PADDED_DIM,
            BLOCK,
        )
        values = keys
        if OF_KEYS:
            values = shared_tile(
                value,
                row,
                other,
                at,
                start,
                length,
                value_row_stride,
                value_head_stride,
                value_token_stride,
                DIM,
                PADDED_DIM,
                BLOCK,
            )
        wide_head = head.to(tl.int64)
        query_base = query + wide_row * query_row_stride + wide_head * query_head_stride
        upstream_base = out_gradient + wide_row * out_row_stride + wide_head * out_head_stride
        place = (wide_row * num_heads + head) * count
        for step in tl.range(0, tl.cdiv(tl.maximum(end - begin, 0), QUERIES), num_stages=STAGES):
            at_query = begin + step * QUERIES
            lines = at_query + tl.arange(0, QUERIES)
            queries = row_tile(query_base, at_query, 0, count, query_token_stride, DIM, PADDED_DIM, QUERIES)
            upstream = row_tile(upstream_base, at_query, 0, count, out_token_stride, DIM, PADDED_DIM, QUERIES)
            log_sum = base_two(tl.load(lse + place + lines, mask=lines < count, other=0.0))
            products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            weights, slope = weights_of(products, log_sum[None, :], scale, softcap, SOFTCAP)
            seen = seen_by((offset + lines)[None, :], tokens[:, None], start, window, WINDOW)
            seen = seen & (lines < count)[None, :]
            if OF_KEYS:
                inner = tl.load(delta + place + lines, mask=lines < count, other=0.0)
                through = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
                change = tl.where(seen, weights * (through - inner[None, :]) * slope, 0.0).to(queries.dtype)
                summed = tl.dot(change, queries, summed, input_precision=PRECISION)
            else:
                weights = tl.where(seen, weights, 0.0).to(upstream.dtype)
                summed = tl.dot(weights, upstream, summed, input_precision=PRECISION)
    if OF_KEYS:
        summed = summed * slope_scale
    address = (wide_row * tl.num_programs(1) + shared) * total * DIM
    address += tokens[:, None].to(tl.int64) * DIM + dims[None, :]
    kept = (tokens < total)[:, None] & (dims < DIM)[None, :]
    tl.store(gradient + address, summed.to(gradient.dtype.element_ty), mask=kept)
