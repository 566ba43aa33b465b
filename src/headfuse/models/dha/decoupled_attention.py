"""Decoupled-head attention: K key heads and V value heads, read by H query heads through two maps.

This file is copied into every exported `dha` folder, so it imports nothing but torch and transformers. The
cache holds keys and values *folded*, `[B, 1, T, K*d]` and `[B, 1, T, V*d]`: the stock dynamic and static
caches then accept unequal counts, and unfolding is a free view. B batch, T tokens, S cached tokens, H query
heads, d head width, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class AttentionShape:
    """Everything that distinguishes one layer's attention from another's, whatever the family."""

    hidden_size: int
    head_dim: int
    key_map: tuple[int, ...]
    value_map: tuple[int, ...]
    scaling: float
    rotary_dim: int = 0
    input_bias: bool = False
    output_bias: bool = False
    qk_norm: str = "none"
    norm_eps: float = 1e-6
    clip: float | None = None
    dropout: float = 0.0
    output_dropout: float = 0.0

    @property
    def num_query_heads(self) -> int:
        """H."""
        return len(self.key_map)

    @property
    def num_key_heads(self) -> int:
        """K."""
        return max(self.key_map) + 1

    @property
    def num_value_heads(self) -> int:
        """V."""
        return max(self.value_map) + 1


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight`, in the dtype of `x`."""
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading channels of `x` `[B, n, T, d]` in the planes `(f, f + r/2)`; `cos`, `sin` are `[B, T, r]`."""
    width = cos.shape[-1]
    rotary, rest = x[..., :width], x[..., width:]
    first, second = rotary.chunk(2, dim=-1)
    turned = rotary * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention spelled out, with the signature of transformers' attention functions."""
    scores = query @ key.transpose(2, 3) * options["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=options.get("dropout", 0.0), training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DecoupledAttention(nn.Module):
    """Drop-in replacement for a family's attention module, with unequal and unevenly shared K and V heads.

    The heads are gathered to H before a standard attention function runs, so every `attn_implementation` of
    transformers works while the cache stays compact.
    """

    # Read by transformers' attention functions: the gather below has already expanded the heads.
    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: Any, layer_idx: int, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.layer_idx, self.shape = config, layer_idx, shape
        self.head_dim, self.scaling = shape.head_dim, shape.scaling
        self.indices: dict[str, Tensor] = {}
        d, hidden = shape.head_dim, shape.hidden_size
        heads, keys, values = shape.num_query_heads, shape.num_key_heads, shape.num_value_heads
        self.q_proj = nn.Linear(hidden, heads * d, bias=shape.input_bias)
        self.k_proj = nn.Linear(hidden, keys * d, bias=shape.input_bias)
        self.v_proj = nn.Linear(hidden, values * d, bias=shape.input_bias)
        self.o_proj = nn.Linear(heads * d, hidden, bias=shape.output_bias)
        if shape.qk_norm != "none":
            whole = shape.qk_norm == "all"
            self.q_norm = RMSNorm(heads * d if whole else d, shape.norm_eps)
            self.k_norm = RMSNorm(keys * d if whole else d, shape.norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `hidden_states` `[B, T, D]`; GPT-NeoX calls its cache `layer_past`."""
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions: transformers collects weights from a family's own attention class alone; put "
                "forward hooks on the attention modules instead: under 'eager' it is the second output"
            )
        cache = past_key_values if past_key_values is not None else layer_past
        query, key, value = self.project(hidden_states, position_embeddings)
        if cache is not None:
            folded_key, folded_value = cache.update(fold(key), fold(value), self.layer_idx)
            key, value = self.unfold(folded_key), self.unfold(folded_value)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))
        return nn.functional.dropout(output, self.shape.output_dropout, self.training), weights

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, n, T, d]`, normalised and rotated as the family does."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        shape = self.shape
        if shape.qk_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        if shape.clip is not None:
            query, key, value = (x.clamp(-shape.clip, shape.clip) for x in (query, key, value))
        query, key, value = (x.view(*x.shape[:-1], -1, shape.head_dim) for x in (query, key, value))
        if shape.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if shape.rotary_dim:
            assert position_embeddings is not None
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        return query, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Gather K and V to the query heads and run the configured attention function: `[B, T, H, d]`.

        A function that declares `reads_head_maps` gets them as they are and finds the maps in `shape`.
        """
        implementation = self.config._attn_implementation or "sdpa"
        if implementation.startswith("paged"):
            raise ValueError(
                f"{implementation!r}: transformers' paged cache has one head count for keys and values; "
                "use generate() with sdpa, eager or flash attention, or `headfuse generate`"
            )
        attention = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        kwargs["dropout"] = self.shape.dropout if self.training else 0.0
        kwargs["scaling"] = self.scaling
        if not getattr(attention, "reads_head_maps", False):
            key, value = self.gather(key, "key_map"), self.gather(value, "value_map")
        return attention(self, query, key, value, attention_mask, **kwargs)

    def gather(self, heads: Tensor, name: str) -> Tensor:
        """Repeat `heads` `[B, n, S, d]` to the query heads that read them by the map of that name, `[B, H, S, d]`."""
        index = self.index(name, heads.device)
        return heads if index is None else heads[:, index]

    def index(self, name: str, device: torch.device) -> Tensor | None:
        """A map as a tensor, made once; None if every query head reads the head of its own number.

        Code that is compiled afterwards takes it as an input, so that layers with other maps run the same code.
        """
        index = self.indices.get(name)
        if index is None or index.device != device:
            head_map = getattr(self.shape, name)
            shared = head_map != tuple(range(len(head_map)))
            if torch.compiler.is_compiling():
                return torch.tensor(head_map, device=device) if shared else None
            with torch.inference_mode(False):  # it may be used with gradients later
                index = torch.tensor(head_map if shared else (), dtype=torch.int64, device=device)
            self.indices[name] = index
        return index if len(index) else None

    def place_maps(self) -> None:
        """Make both maps now, on the weights' device: what is compiled next need not hold them as constants."""
        for name in ("key_map", "value_map"):
            self.index(name, self.q_proj.weight.device)

    def unfold(self, folded: Tensor) -> Tensor:
        """`[B, 1, S, n*d]` back to `[B, n, S, d]`, without a copy."""
        return folded[:, 0].unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


def fold(heads: Tensor) -> Tensor:
    """`[B, n, T, d]` as one wide head `[B, 1, T, n*d]`, the layout of the cache."""
    return heads.transpose(1, 2).flatten(2).unsqueeze(1)
