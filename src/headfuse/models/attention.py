"""`attn_implementation="headfuse"`: decoupled attention among transformers' attention functions.

`DecoupledAttention` hands over keys and values as they lie in the cache, because the function `reads_head_maps`. The
mask function says with two numbers a row which tokens the row has, wherever a mask is no more than causal with padding
on the left; any other mask (packed rows, windows, holes) is made and obeyed as under "sdpa".
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from headfuse.ops.decoupled_attention import HeadMaps, Rows, Scoring, attention, gather, head_maps, visible
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS

NAME = "headfuse"


def headfuse_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K S d"],
    value: Float[Tensor, "B V S d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "B T H d"], None]:
    """Attention of a decoupled layer, or of a stock one whose heads come in equal groups.

    Goes through transformers' sdpa function where there is attention dropout, a mask that is not ours, or no causality.
    """
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    count = query.shape[2]
    rows = rows_of(attention_mask)
    if attention_mask is None and causal and 1 < count < key.shape[2]:
        # transformers' convention: the rest of a static cache that was empty before.
        key, value = key[:, :, :count], value[:, :, :count]
    if dropout or rows is None or not (causal or count == 1):
        return _through_sdpa(
            module, (query, key, value), attention_mask, rows, scaling=scaling, dropout=dropout, **options
        )
    maps = maps_of(module, query, key)
    scoring = Scoring(scale=scaling, softcap=options.get("softcap"))
    return attention(query, key, value, maps, rows, scoring=scoring).transpose(1, 2).contiguous(), None


headfuse_attention.reads_head_maps = True  # pyright: ignore[reportFunctionMemberAccess]


def headfuse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """None for plain causal attention, `[B, 1, 1, 2]` int32 for rows with a start and a length, else sdpa's mask.

    Four dimensions, so that transformers takes it for a finished mask. Reads the padding on the host, as "sdpa" does,
    but not in code that is compiled or captured: there, holes in the padding fail an assertion on the device.
    """
    wanted_whole = q_length > 1 and not options.get("allow_is_causal_skip", True)
    if mask_function is causal_mask_function and kv_offset == 0 and not wanted_whole:
        end = q_offset + q_length
        whole = q_length > 1 and (kv_length == q_length or (isinstance(q_offset, int) and q_offset == 0))
        if attention_mask is None:
            return None if whole else rows_mask(torch.zeros(batch_size, dtype=torch.int32, device=device), end)
        starts, holes = row_starts(attention_mask, end)
        if torch.compiler.is_compiling() or (starts.is_cuda and torch.cuda.is_current_stream_capturing()):
            torch.ops.aten._assert_async.msg(~holes, "padding: wanted it on the left alone; pad there or use sdpa")
            return rows_mask(starts, end)
        broken, padded = torch.stack([holes, starts.any()]).tolist()
        if not broken:
            return None if whole and not padded else rows_mask(starts, end)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]  a static cache has a tensor
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **options,
    )


def row_starts(mask: Tensor, end: int | Tensor) -> tuple[Int[Tensor, "B"], Tensor]:
    """Where each row of a padding mask `[B, S]` begins, and whether a row has padding after its beginning."""
    inside = mask & (torch.arange(mask.shape[1], device=mask.device) < end)
    count = inside.sum(1)
    starts = torch.where(count == 0, end, inside.int().argmax(1))
    return starts.to(torch.int32), (count != end - starts).any()


def rows_mask(starts: Int[Tensor, "B"], end: int | Tensor) -> Int[Tensor, "B 1 1 2"]:
    """Starts and lengths as a mask; both remain contiguous."""
    return torch.stack([starts, torch.zeros_like(starts) + end]).to(torch.int32).t()[:, None, None]


def rows_of(mask: Tensor | None) -> Rows | None:
    """The rows of our mask, all tokens for no mask, None for any other."""
    if mask is None:
        return ALL_TOKENS
    if mask.dtype != torch.int32 or mask.shape[1:] != (1, 1, 2):
        return None
    starts, lengths = mask[:, 0, 0].t().contiguous()
    return Rows(lengths, starts)


def maps_of(module: nn.Module, query: Float[Tensor, "B H T d"], key: Float[Tensor, "B K S d"]) -> HeadMaps:
    """A layer's maps as tensors, made once and kept on the layer; equal groups for a stock layer."""
    maps = getattr(module, "kernel_maps", None)
    if maps is None or maps.key.device != query.device:
        shape, heads, keys = getattr(module, "shape", None), query.shape[1], key.shape[1]
        grouped = [head * keys // heads for head in range(heads)]
        drawn = (grouped, grouped) if shape is None else (shape.key_map, shape.value_map)
        maps = head_maps(*drawn, query.device)
        if not torch.compiler.is_compiling():
            module.__dict__["kernel_maps"] = maps  # nothing that the module would save or move
    return maps


def _through_sdpa(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    rows: Rows | None,
    **options: Any,
) -> tuple[Tensor, None]:
    query, key, value = heads
    if rows is not None and mask is not None:
        mask = visible(query, key, rows.lengths, rows.starts, None)[:, None]
    if hasattr(module, "shape"):  # a stock layer's heads are repeated by transformers
        maps = maps_of(module, query, key)
        key, value = gather(key, maps.key), gather(value, maps.value)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, headfuse_attention)
    AttentionMaskInterface.register(NAME, headfuse_mask)
