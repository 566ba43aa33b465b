"""Many queries a row on Hopper, written in Gluon: copies and matrix products run beside each other all the time.

A program takes 128 queries of one query head, and the key and the value head that it reads. One warp asks the tensor
memory accelerator for tiles of them; two groups of four warps take 64 queries each and never wait for each other. A
group begins the product with the next keys before it has taken in the values of the last, and computes its weights
while both run (the overlap within a group and between groups is that of FlashAttention-3, arXiv 2407.08608).

Tokens are walked from the last to the first, so that the tiles where a query sees only a part come first.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportOptionalOperand=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headfuse.ops.decoupled_attention import kernel_scores

capped = gluon.jit(kernel_scores.capped.fn)
LN2 = kernel_scores.LN2
# Triton 3.9 has a new name for it.
copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Groups of four warps, and the queries of each: what one matrix instruction takes.
GROUPS, QUERIES = gl.constexpr(2), gl.constexpr(64)


@gluon.jit
def bring_tiles(query, key, value, tiles, ready, free, place, steps, last):
    """Ask for the queries, then for `steps` tiles of keys and of values, the `last` first, as slots get free.

    `place` is the row, the query, key and value head, and the first query.
    """
    query_tiles, key_tiles, value_tiles = tiles
    queries_ready, keys_ready, values_ready = ready
    keys_free, values_free = free
    row, head, key_head, value_head, at_query = place
    stages: gl.constexpr = key_tiles.shape[0]
    block: gl.constexpr = key_tiles.shape[3]
    line_bytes: gl.constexpr = key_tiles.shape[4] * key_tiles.dtype.primitive_bitwidth // 8
    mbarrier.expect(queries_ready, GROUPS * QUERIES * line_bytes)
    for group in gl.static_range(GROUPS):
        copy_to_shared(query, [row, head, at_query + group * QUERIES, 0], queries_ready, query_tiles.index(group))
    for step in range(steps):
        slot, emptied = step % stages, (step // stages + 1) & 1
        at = last - step * block
        mbarrier.wait(keys_free.index(slot), emptied)
        mbarrier.expect(keys_ready.index(slot), block * line_bytes)
        copy_to_shared(key, [row, key_head, at, 0], keys_ready.index(slot), key_tiles.index(slot))
        mbarrier.wait(values_free.index(slot), emptied)
        mbarrier.expect(values_ready.index(slot), block * line_bytes)
        copy_to_shared(value, [row, value_head, at, 0], values_ready.index(slot), value_tiles.index(slot))


@gluon.jit
def weighed(products, top, total, positions, tokens, scale, softcap, SOFTCAP: gl.constexpr, MASKED: gl.constexpr):
    """Weights of a tile of products, the new maximum and sum, and the factor for what is summed so far.

    The maximum is that of products before they are scaled, or of capped scores.
    """
    scores, factor = products, scale
    if SOFTCAP:
        scores, factor = capped(products, scale, softcap, True), 1.0
    if MASKED:
        scores = gl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    base = new_top
    if MASKED:
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    base = base * factor
    raised = gl.exp2(scores * factor - base[:, None])
    shrink = gl.exp2(top * factor - base)
    return raised, new_top, total * shrink + gl.sum(raised, 1), shrink


@gluon.jit
def attend(
    carried,
    begin,
    end,
    steps,
    last,
    queries,
    tiles,
    ready,
    free,
    positions,
    scale,
    softcap,
    SOFTCAP: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Steps `begin..end` of `steps`: in each the weights of one tile, while the values of the tile before are summed.

    Step 0 is the tile at `last`. The keys of a step have arrived when it begins. The sum lacks the last weights,
    `raised`.
    """
    outputs, raised, top, total = carried
    _, key_tiles, value_tiles = tiles
    _, keys_ready, values_ready = ready
    keys_free, values_free = free
    stages: gl.constexpr = key_tiles.shape[0]
    block: gl.constexpr = key_tiles.shape[3]
    width: gl.constexpr = key_tiles.shape[4]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    nothing = gl.full([QUERIES, block], 0.0, gl.float32, scored)
    tokens = gl.arange(0, block, gl.SliceLayout(0, scored))
    for step in range(begin, end):
        slot, before, following = step % stages, (step - 1) % stages, (step + 1) % stages
        keys = key_tiles.index(slot).reshape([block, width]).permute((1, 0))
        products = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
        weights = gl.convert_layout(raised, gl.DotOperandLayout(0, summed, 2)).to(key_tiles.dtype)
        mbarrier.wait(values_ready.index(before), ((step - 1) // stages) & 1)
        values = value_tiles.index(before).reshape([block, width])
        outputs = warpgroup_mma(weights, values, outputs, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(products,))
        mbarrier.arrive(keys_free.index(slot), count=1)
        at = last - step * block
        raised, top, total, shrink = weighed(
            scores, top, total, positions, at + tokens, scale, softcap, SOFTCAP, MASKED
        )
        # A branch, over which the assembler does not move the wait for the sum: the weights are computed beside it.
        mbarrier.wait(keys_ready.index(following), ((step + 1) // stages) & 1, pred=step + 1 < steps)
        outputs = warpgroup_mma_wait(0, deps=(outputs,))
        mbarrier.arrive(values_free.index(before), count=1)
        outputs = outputs * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
    return outputs, raised, top, total


@gluon.jit
def clear_behind(values, ready, at, length):
    """Zeros for the tokens of the tile at `at` that are not before `length`: a weight of zero hides no NaN.

    Both groups write the same.
    """
    block: gl.constexpr = values.shape[2]
    width: gl.constexpr = values.shape[3]
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    if at + block > length:
        mbarrier.wait(ready, 0)
        tile = values.reshape([block, width])
        kept = (at + gl.arange(0, block, gl.SliceLayout(1, copied)) < length)[:, None]
        tile.store(gl.where(kept, tile.load(copied), 0.0).to(values.dtype))
        fence_async_shared()


@gluon.jit
def take_tiles(
    group: gl.constexpr,
    tiles,
    ready,
    free,
    where,
    scoring,
    written,
    DIM: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LENGTHS: gl.constexpr,
):
    """One group's queries.

    `where` is the program's first query and its position, the number of tiles, the first token of the last tile, and
    the row's length; `written` is where the head's output and log-sum-exp go, for how many queries, and the stride of
    an output. `LENGTHS`: behind the row's length there may be anything, numbers or not.
    """
    at_query, position, steps, last, length = where
    scale, softcap = scoring
    out, lse, count, out_token_stride = written
    query_tiles, key_tiles, value_tiles = tiles
    queries_ready, keys_ready, values_ready = ready
    stages: gl.constexpr = key_tiles.shape[0]
    block: gl.constexpr = key_tiles.shape[3]
    width: gl.constexpr = key_tiles.shape[4]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    at_query, position = at_query + group * QUERIES, position + group * QUERIES
    positions = position + gl.arange(0, QUERIES, gl.SliceLayout(1, scored))
    top = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, scored))
    total = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, scored))

    mbarrier.wait(queries_ready, 0)
    queries = query_tiles.index(group).reshape([QUERIES, width])
    mbarrier.wait(keys_ready.index(0), 0)
    keys = key_tiles.index(0).reshape([block, width]).permute((1, 0))
    nothing = gl.full([QUERIES, block], 0.0, gl.float32, scored)
    products = warpgroup_mma(queries, keys, nothing, use_acc=False)
    mbarrier.arrive(free[0].index(0), count=1)
    tokens = last + gl.arange(0, block, gl.SliceLayout(0, scored))
    raised, top, total, _ = weighed(products, top, total, positions, tokens, scale, softcap, SOFTCAP, True)
    if LENGTHS:
        clear_behind(value_tiles.index(0), values_ready.index(0), last, length)
    mbarrier.wait(keys_ready.index(1 % stages), 1 // stages, pred=steps > 1)
    carried = gl.full([QUERIES, width], 0.0, gl.float32, summed), raised, top, total

    # The first query sees all tokens of the tiles behind these, and so do the others.
    partly = gl.minimum(gl.maximum(gl.cdiv(last + block - 1 - position, block), 1), steps)
    for whole in gl.static_range(2):
        carried = attend(
            carried,
            partly if whole else 1,
            steps if whole else partly,
            steps,
            last,
            queries,
            tiles,
            ready,
            free,
            positions,
            scale,
            softcap,
            SOFTCAP,
            whole == 0,
        )
    outputs, raised, top, total = carried
    slot = (steps - 1) % stages
    mbarrier.wait(values_ready.index(slot), ((steps - 1) // stages) & 1)
    weights = gl.convert_layout(raised, gl.DotOperandLayout(0, summed, 2)).to(key_tiles.dtype)
    outputs = warpgroup_mma(weights, value_tiles.index(slot).reshape([block, width]), outputs)

    divisor = gl.where(total == 0, 1.0, total)
    outputs = outputs * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, summed))[:, None]
    log_sum = (top if SOFTCAP else top * scale) + gl.log2(divisor)
    lines = at_query + gl.arange(0, QUERIES, gl.SliceLayout(1, scored))
    gl.store(lse + lines, gl.where(total == 0, float("-inf"), log_sum * LN2), mask=lines < count)
    lines = at_query + gl.arange(0, QUERIES, gl.SliceLayout(1, summed))
    dims = gl.arange(0, width, gl.SliceLayout(0, summed))
    address = out + lines[:, None].to(gl.int64) * out_token_stride + dims[None, :]
    gl.store(address, outputs.to(key_tiles.dtype), mask=(lines < count)[:, None] & (dims < DIM)[None, :])


@gluon.jit(do_not_specialize=["num_heads", "count", "capacity"])
def hopper_prefill_kernel(
    query,
    key,
    value,
    out,
    lse,
    lengths,
    starts,
    key_map,
    value_map,
    scale,
    softcap,
    num_heads,
    count,
    capacity,
    out_row_stride,
    out_head_stride,
    out_token_stride,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LENGTHS: gl.constexpr,
):
    """Grid (blocks of queries, query heads, rows); the last queries, which see most, come first.

    `query`, `key` and `value` are descriptors of `[B, n, T, d]` with tiles of a group's queries and of a block of
    tokens. `LENGTHS`: whether there are `lengths`.
    """
    at_query = (gl.num_programs(0) - 1 - gl.program_id(0)) * GROUPS * QUERIES
    head, row = gl.program_id(1), gl.program_id(2)
    block: gl.constexpr = key.block_shape[2]
    width: gl.constexpr = key.block_shape[3]
    tiles = (
        gl.allocate_shared_memory(query.dtype, [GROUPS, 1, 1, QUERIES, width], query.layout),
        gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, block, width], key.layout),
        gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, block, width], value.layout),
    )
    queries_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(slot), count=1)
        mbarrier.init(values_ready.index(slot), count=1)
        mbarrier.init(keys_free.index(slot), count=GROUPS)
        mbarrier.init(values_free.index(slot), count=GROUPS)
    ready, free = (queries_ready, keys_ready, values_ready), (keys_free, values_free)

    start, length = 0, capacity
    if starts is not None:
        start = gl.load(starts + row)
    if lengths is not None:
        length = gl.load(lengths + row)
    position = length - count + at_query
    # Tiles begin at the row's first token: what lies before it may be anything. One tile at least, seen or not.
    steps = gl.maximum(gl.cdiv(gl.minimum(position + GROUPS * QUERIES, length) - start, block), 1)
    last = start + (steps - 1) * block
    place = (row, head, gl.load(key_map + head).to(gl.int32), gl.load(value_map + head).to(gl.int32), at_query)
    wide_row, wide_head = row.to(gl.int64), head.to(gl.int64)
    head_out = out + wide_row * out_row_stride + wide_head * out_head_stride
    head_lse = lse + (wide_row * num_heads + wide_head) * count
    where, scoring = (at_query, position, steps, last, length), (scale, softcap)
    written = (head_out, head_lse, count, out_token_stride)
    gl.warp_specialize(
        [
            (take_tiles, (0, tiles, ready, free, where, scoring, written, DIM, SOFTCAP, LENGTHS)),
            (take_tiles, (1, tiles, ready, free, where, scoring, written, DIM, SOFTCAP, LENGTHS)),
            (bring_tiles, (query, key, value, tiles, ready, free, place, steps, last)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread; the first group has what is left, which is as many
    )
