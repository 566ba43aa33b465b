"""Attention whose key heads and value heads differ in number and are read through two maps.

`dispatch.py` chooses. `naive.py` is the specification; `sdpa.py` runs anywhere and learns; `grouped.py` decodes where
there is no GPU; the Triton kernels are for GPUs. docs/kernels.md is the overview, the kernels' docstrings say how they
work, `benchmarks/decode_attention.py` measures them.
"""

from headfuse.ops.decoupled_attention.dispatch import attention
from headfuse.ops.decoupled_attention.head_maps import HeadMaps, head_maps
from headfuse.ops.decoupled_attention.naive import naive_attention, visible
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.scoring import Scoring
from headfuse.ops.decoupled_attention.sdpa import gather, sdpa_attention

__all__ = [
    "HeadMaps",
    "Rows",
    "Scoring",
    "attention",
    "gather",
    "head_maps",
    "naive_attention",
    "sdpa_attention",
    "visible",
]
