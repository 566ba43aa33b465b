"""Attention whose key heads and value heads differ in number and are read through two maps.

`naive.py` is the specification; `sdpa.py` runs anywhere; the Triton kernels are for GPUs. The docstrings of the
kernel files say how they work; `benchmarks/decode_attention.py` measures them.
"""

from headfuse.ops.decoupled_attention.head_maps import HeadMaps, head_maps
from headfuse.ops.decoupled_attention.naive import naive_attention
from headfuse.ops.decoupled_attention.scoring import Scoring
from headfuse.ops.decoupled_attention.sdpa import sdpa_attention

__all__ = ["HeadMaps", "Scoring", "head_maps", "naive_attention", "sdpa_attention"]
