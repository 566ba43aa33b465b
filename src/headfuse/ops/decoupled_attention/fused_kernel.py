"""Decoding in one pass: a program reads every key head and every value head of its tokens once.

A program takes a stretch of one row's tokens (a split) and all heads. It walks tiles of `BLOCK` tokens, and in each
tile the key heads, then the value heads: one loop with one load, so that the copies of the next tiles stay
under way while heads change. Scores and outputs are held transposed, `[tokens, queries]` and `[dims, queries]`: the
long side of a product is then the side that Hopper's matrix unit reads from shared memory. A key head's product with
all queries is kept for the queries that read it; a value head is multiplied by the weights of its queries alone.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from headfuse.ops.decoupled_attention.combine_kernel import LN2


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
def next_weights(products, seen, top, total, outputs, scale, softcap, SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """One step of online softmax over a tile `[tokens, queries]`; rescales the outputs `[dims, queries]`."""
    scores = scored(products, seen, scale, softcap, SOFTCAP)
    new_top = tl.maximum(top, tl.max(scores, 0))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[None, :])
    return weights.to(dtype), new_top, total * shrink + tl.sum(weights, 0), outputs * shrink[None, :]


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


@triton.jit(do_not_specialize=["window", "num_heads", "num_keys", "num_values", "splits", "table_row_stride"])
def fused_kernel(
    query,
    key,
    value,
    out,
    lse,
    partial_out,
    partial_lse,
    lengths,
    starts,
    block_table,
    key_map,
    value_map,
    scale,
    softcap,
    window,
    num_heads,
    num_keys,
    num_values,
    splits,
    query_row_stride,
    query_head_stride,
    out_row_stride,
    out_head_stride,
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
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (splits, rows). `PAGE` 0: a row's keys are page `row`. `DEPENDENT`: the combining kernel may start early."""
    split, row = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = query.dtype.element_ty
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    whole_pages: tl.constexpr = (PAGE > 0) and (PAGE % BLOCK == 0)
    granule: tl.constexpr = BLOCK if whole_pages else 16
    start, first, last = stretch(lengths, starts, window, row, split, splits, granule, whole_pages)

    heads, dims, tokens = tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK)
    inside = dims < DIM
    valid = heads < num_heads
    key_slot = tl.load(key_map + heads, mask=valid, other=-1).to(tl.int32)
    value_slot = tl.load(value_map + heads, mask=valid, other=-1).to(tl.int32)
    width = num_keys + num_values
    queries = tl.load(
        query + row.to(tl.int64) * query_row_stride + heads[None, :] * query_head_stride + dims[:, None],
        mask=valid[None, :] & inside[:, None],
        other=0.0,
    )

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    outputs = tl.zeros([PADDED_DIM, QUERIES], tl.float32)
    products = tl.zeros([BLOCK, QUERIES], tl.float32)
    weights = tl.zeros([BLOCK, QUERIES], dtype)
    for step in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK) * width, num_stages=STAGES):
        turn = step % width
        at = first + (step // width) * BLOCK
        is_key = turn < num_keys
        head = tl.where(is_key, turn, turn - num_keys).to(tl.int64)
        page_stride = tl.where(is_key, key_page_stride, value_page_stride)
        token_stride = tl.where(is_key, key_token_stride, value_token_stride)
        base = tl.where(is_key, key, value) + head * tl.where(is_key, key_head_stride, value_head_stride)
        token = at + tokens
        seen = (token >= start) & (token < last)
        if PAGE == 0:
            base += row.to(tl.int64) * page_stride + at.to(tl.int64) * token_stride
            offsets = tokens[:, None] * token_stride + dims[None, :]
        elif whole_pages:
            page = tl.load(block_table + row.to(tl.int64) * table_row_stride + at // PAGE, mask=at < last, other=0)
            base += page.to(tl.int64) * page_stride + (at % PAGE).to(tl.int64) * token_stride
            offsets = tokens[:, None] * token_stride + dims[None, :]
        else:
            page = tl.load(block_table + row.to(tl.int64) * table_row_stride + token // PAGE, mask=seen, other=0)
            place = page.to(tl.int64) * page_stride + (token % PAGE) * token_stride
            offsets = place[:, None] + dims[None, :]
        kept = seen[:, None]
        if DIM != PADDED_DIM:
            kept = kept & inside[None, :]
        tile = tl.load(base + offsets, mask=kept, other=0.0)
        if is_key:
            products = tl.where((key_slot == turn)[None, :], tl.dot(tile, queries, input_precision=PRECISION), products)
        else:
            if turn == num_keys:
                weights, top, total, outputs = next_weights(
                    products, seen, top, total, outputs, scale, softcap, SOFTCAP, dtype
                )
            mine = tl.where((value_slot == turn - num_keys)[None, :], weights, 0.0).to(dtype)
            outputs = tl.dot(tl.trans(tile), mine, outputs, input_precision=PRECISION)

    divisor = tl.where(total == 0, 1.0, total)  # an empty split gives zeros and -inf
    outputs = outputs / divisor[None, :]
    lse2 = top + tl.log2(divisor)
    written = valid[None, :] & inside[:, None]
    if splits == 1:
        address = row.to(tl.int64) * out_row_stride + heads[None, :] * out_head_stride + dims[:, None]
        tl.store(out + address, outputs.to(out.dtype.element_ty), mask=written)
        tl.store(lse + row.to(tl.int64) * num_heads + heads, lse2 * LN2, mask=valid)
    else:
        place = (row.to(tl.int64) * num_heads + heads) * splits + split
        tl.store(partial_out + place[None, :] * DIM + dims[:, None], outputs, mask=written)
        tl.store(partial_lse + place, lse2, mask=valid)
