"""Few rows times a matrix of weights on Hopper, in Gluon: every weight is read once, without a pause.

The weights are cut into tiles of `ROWS` output channels and chunks of `BLOCK` inputs. All chunks, tile after tile, are
dealt to the programs in equal stretches, so that none waits for another; a tile that several programs share gets as
many sums, which whoever reads the result adds up. Weights depend on nothing, so the first ones are asked for while what
comes before still runs; the rows are read when that has ended.

The weights are the left operand, so that a matrix instruction takes 64 of their channels and few rows.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportOptionalOperand=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from headfuse.ops.gluon import copy_to_shared, let_successor_begin, wait_for_predecessor


@gluon.jit
def chunk_of(
    matrix,
    stride,
    first_line,
    lines,
    first_input,
    inputs,
    wanted,
    LINES: gl.constexpr,
    BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Addresses of a part of a matrix, and which of them lie within it."""
    line = first_line + gl.arange(0, LINES, gl.SliceLayout(1, LAYOUT))
    at = first_input + gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    base = matrix + first_line.to(gl.int64) * stride + first_input
    offsets = (line - first_line)[:, None] * stride + (at - first_input)[None, :]
    return base + offsets, ((line < lines) & wanted)[:, None] & (at < inputs)[None, :]


@gluon.jit(do_not_specialize=["rows", "chunks"])
def skinny_product_kernel(
    x,
    weight,
    out,
    rows,
    channels,
    inputs,
    x_stride,
    weight_stride,
    chunks,
    SUMS: gl.constexpr,
    LINES: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid of programs with `chunks` each. `out` `[SUMS, rows, channels]`; `LINES` is `rows`, rounded up."""
    program = gl.program_id(0)
    dtype: gl.constexpr = x.dtype.element_ty
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [gl.num_warps(), 1], [1, 0])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, LINES, 16])
    depth = gl.cdiv(inputs, BLOCK)
    first = program * chunks
    last = gl.minimum(first + chunks, gl.cdiv(channels, ROWS) * depth)

    weights = gl.allocate_shared_memory(
        dtype, [STAGES, ROWS, BLOCK], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK], dtype)
    )
    lines = gl.allocate_shared_memory(
        dtype, [STAGES, LINES, BLOCK], gl.NVMMASharedLayout.get_default_for([LINES, BLOCK], dtype)
    )
    for slot in gl.static_range(STAGES - 1):
        chunk = first + slot
        source, kept = chunk_of(
            weight,
            weight_stride,
            chunk // depth * ROWS,
            channels,
            chunk % depth * BLOCK,
            inputs,
            chunk < last,
            ROWS,
            BLOCK,
            copied,
        )
        copy_to_shared(weights.index(slot), source, mask=kept)
        async_copy.commit_group()
    # Launched while what came before still runs: its results are not read until it has ended.
    wait_for_predecessor()
    let_successor_begin()
    for slot in gl.static_range(STAGES - 1):
        chunk = first + slot
        source, kept = chunk_of(
            x, x_stride, chunk * 0, rows, chunk % depth * BLOCK, inputs, chunk < last, LINES, BLOCK, copied
        )
        lines.index(slot).store(gl.load(source, mask=kept, other=0.0))

    nothing = gl.full([ROWS, LINES], 0.0, gl.float32, summed)
    sums = nothing
    full, free = 0, STAGES - 1
    for chunk in range(first, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        asked = chunk + STAGES - 1
        source, kept = chunk_of(
            weight,
            weight_stride,
            asked // depth * ROWS,
            channels,
            asked % depth * BLOCK,
            inputs,
            asked < last,
            ROWS,
            BLOCK,
            copied,
        )
        copy_to_shared(weights.index(free), source, mask=kept)
        source, kept = chunk_of(
            x, x_stride, asked * 0, rows, asked % depth * BLOCK, inputs, asked < last, LINES, BLOCK, copied
        )
        copy_to_shared(lines.index(free), source, mask=kept)
        async_copy.commit_group()
        begins = (chunk == first) | (chunk % depth == 0)
        sums = warpgroup_mma(weights.index(full), lines.index(full).permute((1, 0)), sums, use_acc=begins == 0)
        free = full
        full = gl.where(full == STAGES - 1, 0, full + 1)

        ends = (chunk + 1) % depth == 0
        if ends | (chunk + 1 == last):
            tile = chunk // depth
            channel = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, summed))
            line = gl.arange(0, LINES, gl.SliceLayout(0, summed))
            place = out + channel[:, None] + line[None, :].to(gl.int64) * channels
            within = (channel < channels)[:, None] & (line < rows)[None, :]
            mine = program - tile * depth // chunks
            size = rows.to(gl.int64) * channels
            gl.store(place + mine * size, sums.to(out.dtype.element_ty), mask=within)
            for other in gl.static_range(1, SUMS):
                gl.store(place + other * size, nothing.to(out.dtype.element_ty), mask=within & ends & (other > mine))
    async_copy.wait_group(0)
