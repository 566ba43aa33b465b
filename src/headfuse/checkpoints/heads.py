"""Attention of one layer as neutral head tensors: the type that every other room works on.

Outside `checkpoints` and `models` nothing knows a parameter name. Multi-head, grouped-query and decoupled
attention are the same thing here: query head `h` reads key head `key_map[h]` and value head `value_map[h]`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

QkNorm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class AttentionTraits:
    """What a layer does between the projections and the softmax.

    `rotary_dim` leading channels of each head are rotated in planes `(f, f + rotary_dim / 2)`; 0 means that
    positions enter elsewhere. `qk_norm` is an RMS norm of queries and keys over one head ("head") or over all
    heads at once ("all"). `clip` bounds the projections' outputs elementwise.
    """

    rotary_dim: int
    scaling: float
    qk_norm: QkNorm = "none"
    norm_eps: float = 1e-6
    clip: float | None = None


@dataclass(frozen=True)
class AttentionHeads:
    """The projections of one layer, head by head, in the row layout of `nn.Linear.weight`.

    `d` is the head width, `D` the hidden size; `H`, `K`, `V` count query, key and value heads. Norm gains are
    `[d]` for qk_norm "head" and `[H, d]` / `[K, d]` for "all".
    """

    q: Float[Tensor, "H d D"]
    k: Float[Tensor, "K d D"]
    v: Float[Tensor, "V d D"]
    o: Float[Tensor, "H D d"]
    key_map: tuple[int, ...]
    value_map: tuple[int, ...]
    traits: AttentionTraits
    q_bias: Float[Tensor, "H d"] | None = None
    k_bias: Float[Tensor, "K d"] | None = None
    v_bias: Float[Tensor, "V d"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def num_query_heads(self) -> int:
        """H."""
        return self.q.shape[0]

    @property
    def num_key_heads(self) -> int:
        """K."""
        return self.k.shape[0]

    @property
    def num_value_heads(self) -> int:
        """V."""
        return self.v.shape[0]

    @property
    def counts(self) -> tuple[int, int]:
        """(K, V), the heads that a cache holds."""
        return self.num_key_heads, self.num_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, d."""
        return self.q.shape[1]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.q.shape[2]

    def to(self, dtype: torch.dtype) -> "AttentionHeads":
        """The same heads with every tensor in `dtype`."""
        tensors = {n: t.to(dtype) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def on(self, device: torch.device) -> "AttentionHeads":
        """The same heads with every tensor on `device`."""
        tensors = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def reordered(self, order: list[int]) -> "AttentionHeads":
        """The same function with query heads permuted; q rows, o columns, biases and gains move together."""
        index = torch.tensor(order, device=self.q.device)
        q_norm = self.q_norm
        if q_norm is not None and q_norm.dim() == 2:
            q_norm = q_norm[index]
        return replace(
            self,
            q=self.q[index],
            o=self.o[index],
            q_bias=None if self.q_bias is None else self.q_bias[index],
            q_norm=q_norm,
            key_map=tuple(self.key_map[h] for h in order),
            value_map=tuple(self.value_map[h] for h in order),
        )


def extended(weight: Float[Tensor, "n d D"], bias: Float[Tensor, "n d"] | None) -> Tensor:
    """`[weight | bias]` in fp64, `[n, d, D + 1]`: an affine projection of `(x, 1)`; no bias gives a zero column."""
    column = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return torch.cat([weight, column.unsqueeze(-1)], dim=-1).double()
