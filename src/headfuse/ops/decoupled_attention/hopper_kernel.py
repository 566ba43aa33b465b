"""Decoding on Hopper in one pass, written in Gluon: shared memory, copies and matrix units are laid out by hand.

A program takes a stretch of one row's tokens (a split) and all heads, so that each key head and each value head is read
once. It walks blocks of tokens, in each the tiles of the key heads, then those of the value heads. The next tiles are
always under way, over the end of a head and of a block. Queries are the rows of every product: their scores stay in the
registers that the product with the values reads them from, and a row's maximum is found within four threads.

A key head's product with all queries is kept for the queries that read it; a value head is multiplied by the weights of
its queries alone.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportOptionalOperand=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from headfuse.ops.decoupled_attention import kernel_scores
from headfuse.ops.gluon import copy_to_shared, let_successor_begin, wait_for_predecessor

capped, stretch = gluon.jit(kernel_scores.capped.fn), gluon.jit(kernel_scores.stretch.fn)
LN2 = kernel_scores.LN2


@gluon.jit
def ask_for_next_tile(
    tiles,
    slot,
    head,
    at,
    left,
    keys,
    values,
    pages,
    visible,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    PAGE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Begin to copy the tokens `at..at+BLOCK` of a head, keys counted before values, to `slot`; zeros if not visible.

    Returns the head, the block of tokens and the number of tiles that are left after it; of none left none is copied.
    `keys` and `values` are a pointer, the strides of pages, heads and tokens, and the number of heads, `pages` the
    block table and the stride of its rows, `visible` the row and its first and one past its last token.
    """
    padded_dim: gl.constexpr = tiles.shape[2]
    row, start, last = visible
    wanted = left > 0
    num_keys = keys[4]
    is_key = head < num_keys
    page_stride = gl.where(is_key, keys[1], values[1])
    token_stride = gl.where(is_key, keys[3], values[3])
    base = gl.where(
        is_key, keys[0] + head.to(gl.int64) * keys[2], values[0] + (head - num_keys).to(gl.int64) * values[2]
    )
    tokens = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, padded_dim, gl.SliceLayout(0, LAYOUT))
    seen = (at + tokens >= start) & (at + tokens < last) & wanted
    if PAGE == 0:
        base += row.to(gl.int64) * page_stride + at.to(gl.int64) * token_stride
        places = tokens * token_stride
    elif PAGE % BLOCK == 0:
        page = gl.load(pages[0] + row.to(gl.int64) * pages[1] + at // PAGE, mask=wanted, other=0)
        base += page.to(gl.int64) * page_stride + (at % PAGE) * token_stride
        places = tokens * token_stride
    else:
        page = gl.load(pages[0] + row.to(gl.int64) * pages[1] + (at + tokens) // PAGE, mask=seen, other=0)
        places = page.to(gl.int64) * page_stride + ((at + tokens) % PAGE) * token_stride
    kept = seen[:, None]
    if padded_dim != DIM:
        kept = kept & (dims < DIM)[None, :]
    copy_to_shared(tiles.index(slot), base + (places[:, None] + dims[None, :]), mask=kept)
    async_copy.commit_group()
    wraps = head + 1 == num_keys + values[4]
    return gl.where(wraps, 0, head + 1), gl.where(wraps, at + BLOCK, at), left - 1


@gluon.jit
def prefetch_tile(index, row, first, keys, values, capacity, DIM: gl.constexpr, BLOCK: gl.constexpr):
    """Ask for the `index`-th tile to be brought into the L2 cache: a hint, which may be about any tokens of the row."""
    lines: gl.constexpr = 4 if DIM >= 256 else 2 if DIM >= 128 else 1  # of 128 bytes; a power of 2, none past the end
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // lines, lines], [gl.num_warps(), 1], [1, 0])
    num_keys, heads = keys[4], keys[4] + values[4]
    head, at = index % heads, first + index // heads * BLOCK
    is_key = head < num_keys
    stride = gl.where(is_key, keys[3], values[3])
    base = gl.where(
        is_key,
        keys[0] + row.to(gl.int64) * keys[1] + head.to(gl.int64) * keys[2],
        values[0] + row.to(gl.int64) * values[1] + (head - num_keys).to(gl.int64) * values[2],
    )
    tokens = at + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    tokens = gl.minimum(gl.maximum(tokens, 0), capacity - 1).to(gl.int64)
    address = base + (tokens[:, None] * stride + 64 * gl.arange(0, lines, gl.SliceLayout(0, layout))[None, :])
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_tile(STAGES: gl.constexpr):
    """The oldest tile under way has arrived, for the matrix unit too: Triton adds that fence itself from 3.7 on."""
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()


@gluon.jit(
    do_not_specialize=["window", "num_heads", "num_keys", "num_values", "splits", "capacity", "table_row_stride"]
)
def hopper_kernel(
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
    capacity,
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
    DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    QUERIES: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Grid (splits, rows). `PAGE` 0: a row's keys are page `row`. `DEPENDENT`: the combining kernel may start early.

    `QUERIES` is 16 for each warp.
    """
    split, row = gl.program_id(0), gl.program_id(1)
    dtype: gl.constexpr = query.dtype.element_ty
    warps: gl.constexpr = gl.num_warps()
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PADDED_DIM, PADDED_DIM // 8], [warps, 1], [1, 0])
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, PADDED_DIM, 16])
    weighed: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    whole_pages: gl.constexpr = (PAGE > 0) and (PAGE % BLOCK == 0)
    granule: gl.constexpr = BLOCK if whole_pages else 16
    keys = (key, key_page_stride, key_head_stride, key_token_stride, num_keys)
    values = (value, value_page_stride, value_head_stride, value_token_stride, num_values)

    # Launched while what came before still runs: until that has ended, nothing is written, and what is read only says
    # which tiles will be wanted soon.
    if PAGE == 0 and BLOCK >= 64:  # a small tile is there before its address would be known
        start, first, last = stretch(lengths, starts, window, row, split, splits, granule, whole_pages)
        for index in gl.static_range(STAGES - 1):
            prefetch_tile(index + num_keys * 0, row, first, keys, values, capacity, DIM, BLOCK)
    wait_for_predecessor()
    if DEPENDENT:
        let_successor_begin()
    start, first, last = stretch(lengths, starts, window, row, split, splits, granule, whole_pages)
    pages, visible = (block_table, table_row_stride), (row, start, last)
    blocks = gl.cdiv(gl.maximum(last - first, 0), BLOCK)

    tiles = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK, PADDED_DIM], gl.NVMMASharedLayout.get_default_for([BLOCK, PADDED_DIM], dtype)
    )
    left, asked, asked_at = blocks * (num_keys + num_values), num_keys * 0, first
    for slot in gl.static_range(STAGES - 1):
        asked, asked_at, left = ask_for_next_tile(
            tiles, slot, asked, asked_at, left, keys, values, pages, visible, DIM, BLOCK, PAGE, copied
        )

    heads, dims = gl.arange(0, QUERIES, gl.SliceLayout(1, copied)), gl.arange(0, PADDED_DIM, gl.SliceLayout(0, copied))
    queries = gl.allocate_shared_memory(
        dtype,
        [QUERIES, PADDED_DIM],
        gl.NVMMASharedLayout.get_default_for([QUERIES, PADDED_DIM], dtype),
        gl.load(
            query + row.to(gl.int64) * query_row_stride + (heads * query_head_stride)[:, None] + dims[None, :],
            mask=(heads < num_heads)[:, None] & (dims < DIM)[None, :],
            other=0.0,
        ),
    )
    fence_async_shared()

    heads, weighed_heads = (
        gl.arange(0, QUERIES, gl.SliceLayout(1, scored)),
        gl.arange(0, QUERIES, gl.SliceLayout(1, weighed)),
    )
    key_slot = gl.load(key_map + heads, mask=heads < num_heads, other=-1).to(gl.int32)
    value_slot = gl.load(value_map + weighed_heads, mask=weighed_heads < num_heads, other=-1).to(gl.int32)
    tokens = gl.arange(0, BLOCK, gl.SliceLayout(0, scored))
    top = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, scored))
    total = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, scored))
    outputs = gl.full([QUERIES, PADDED_DIM], 0.0, gl.float32, summed)
    nothing = gl.full([QUERIES, BLOCK], 0.0, gl.float32, scored)
    full, free = 0, STAGES - 1
    for block in range(blocks):
        products = nothing
        for head in range(num_keys):
            wait_for_tile(STAGES)
            asked, asked_at, left = ask_for_next_tile(
                tiles, free, asked, asked_at, left, keys, values, pages, visible, DIM, BLOCK, PAGE, copied
            )
            product = warpgroup_mma(queries, tiles.index(full).permute((1, 0)), nothing, use_acc=False)
            products = gl.where((key_slot == head)[:, None], product, products)
            free = full
            full = gl.where(full == STAGES - 1, 0, full + 1)

        token = first + block * BLOCK + tokens
        seen = (token >= start) & (token < last)
        scores = gl.where(seen[None, :], capped(products, scale, softcap, SOFTCAP), float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1))
        shrink = gl.exp2(top - new_top)
        raised = gl.exp2(scores - new_top[:, None])
        top, total = new_top, total * shrink + gl.sum(raised, 1)
        outputs = outputs * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
        weights = gl.convert_layout(raised.to(dtype), weighed)

        for head in range(num_values):
            wait_for_tile(STAGES)
            asked, asked_at, left = ask_for_next_tile(
                tiles, free, asked, asked_at, left, keys, values, pages, visible, DIM, BLOCK, PAGE, copied
            )
            mine = gl.where((value_slot == head)[:, None], weights, gl.zeros_like(weights))
            outputs = warpgroup_mma(mine, tiles.index(full), outputs)
            free = full
            full = gl.where(full == STAGES - 1, 0, full + 1)
    async_copy.wait_group(0)

    divisor = gl.where(total == 0, 1.0, total)  # an empty split gives zeros and -inf
    outputs = outputs * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, summed))[:, None]
    lse2 = top + gl.log2(divisor)
    out_heads, dims = (
        gl.arange(0, QUERIES, gl.SliceLayout(1, summed)),
        gl.arange(0, PADDED_DIM, gl.SliceLayout(0, summed)),
    )
    written = (out_heads < num_heads)[:, None] & (dims < DIM)[None, :]
    if splits == 1:
        address = row.to(gl.int64) * out_row_stride + (out_heads * out_head_stride)[:, None] + dims[None, :]
        gl.store(out + address, outputs.to(dtype), mask=written)
        gl.store(lse + row.to(gl.int64) * num_heads + heads, lse2 * LN2, mask=heads < num_heads)
    else:
        place = (row.to(gl.int64) * num_heads + out_heads) * splits + split
        gl.store(partial_out + (place * DIM)[:, None] + dims[None, :], outputs, mask=written)
        place = (row.to(gl.int64) * num_heads + heads) * splits + split
        gl.store(partial_lse + place, lse2, mask=heads < num_heads)
