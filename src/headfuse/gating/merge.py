"""The gated merge: every head is `z` times itself plus `1 - z` times the head that its group shares (arXiv 2412.20677).

The paper gates keys and values, `k_h = z_h k_h + (1 - z_h) k_group(h)` before the rotation, and has one gate for both
(papers/align.md 1.9). All gates at 1 are the source layer, all at 0 the merged one, whose own heads fold out of it.

Two things are ours. Weights are mixed instead of activations, which is the same and costs no memory a token. And where
a merged layer also has queries, outputs or norm gains of its own (the closed form and the refit change them, mean
pooling does not), those are mixed by the gate of the head that they read, so that both ends stay exact; what is the
same in both layers is one parameter. `n` counts heads of a kind, `G` groups, `K` source key/value heads.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headfuse.checkpoints.adapter import decoupled_heads
from headfuse.checkpoints.attention import attention_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.models.dha.decoupled_attention import DecoupledAttention, RMSNorm

# Parts whose tensors differ by less, relative to the largest, are the same up to rounding and stay shared.
SAME = 1e-5


def mix(
    own: Float[Tensor, "#n *size"], merged: Float[Tensor, "#n *size"], gates: Float[Tensor, " n"]
) -> Float[Tensor, "n *size"]:
    """`z own + (1 - z) merged`, head by head; to the last bit one of them at gates of 0 and 1."""
    share = gates.view(-1, *[1] * (own.dim() - 1))
    return share * own + (1 - share) * merged


class Gated(nn.Module):
    """A part of an attention module between the source's (`weight`, `bias`) and the merged layer's.

    `gates` [K] are those of the layer, set before every forward pass by whoever draws them. Head h of this part has
    gate `reads[h]` and becomes head `becomes[h]` of the merged part.
    """

    reads: Tensor
    becomes: Tensor

    def __init__(
        self,
        own: nn.Linear | RMSNorm,
        merged: nn.Linear | RMSNorm,
        *,
        reads: Sequence[int],
        becomes: Sequence[int],
        head_dim: int,
    ) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, getattr(own, "bias", None)
        self.merged_weight, self.merged_bias = merged.weight, getattr(merged, "bias", None)
        self.head_dim = head_dim
        self.eps = getattr(own, "eps", 0.0)
        for name, index in {"reads": reads, "becomes": becomes}.items():
            self.register_buffer(name, torch.tensor(index, device=own.weight.device), persistent=False)
        self.gates = torch.ones(max(reads) + 1, device=own.weight.device)

    def mixed_rows(self, own: Tensor, merged: Tensor) -> Tensor:
        """A parameter whose leading dimension is made of heads."""
        parts = (each.unflatten(0, (-1, self.head_dim)) for each in (own, merged))
        source, shared = parts
        return mix(source, shared[self.becomes], self.gates[self.reads]).flatten(0, 1)

    def merged_state(self) -> dict[str, Tensor]:
        """The merged part's own tensors."""
        state = {"weight": self.merged_weight, "bias": self.merged_bias}
        return {name: tensor.detach() for name, tensor in state.items() if tensor is not None}


class GatedProjection(Gated):
    """Queries, keys or values: the heads are rows."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n*d"]:
        """The mixed heads' activations, before any norm or rotation."""
        weight = self.mixed_rows(self.weight, self.merged_weight)
        bias = None
        if self.bias is not None and self.merged_bias is not None:
            bias = self.mixed_rows(self.bias, self.merged_bias).to(x.dtype)
        return nn.functional.linear(x, weight.to(x.dtype), bias)


class GatedOutput(Gated):
    """The output projection: the heads are columns, and its bias belongs to all of them, so to their mean gate."""

    def forward(self, x: Float[Tensor, "*batch n*d"]) -> Float[Tensor, "*batch D"]:
        """The sum over the mixed heads' outputs."""
        weight = self.mixed_rows(self.weight.mT, self.merged_weight.mT).mT
        bias = None
        if self.bias is not None and self.merged_bias is not None:
            bias = mix(self.bias[None], self.merged_bias[None], self.gates.mean(0, keepdim=True))[0].to(x.dtype)
        return nn.functional.linear(x, weight.to(x.dtype), bias)


class GatedNorm(Gated):
    """An RMS norm of queries or keys: over each head, with one gain for all of them, or over all heads together."""

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """`x / rms(x)` times the mixed gains."""
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if len(self.weight) == self.head_dim:  # one gain, mixed for every head by its own gate: [n, d]
            gain = mix(self.weight[None], self.merged_weight[None], self.gates[self.reads])
        else:
            gain = self.mixed_rows(self.weight, self.merged_weight)
        return gain * scaled.to(x.dtype)


def gate_attention(module: DecoupledAttention, source: AttentionHeads, merged: AttentionHeads) -> None:
    """Put gates, open ones, between a module that computes `source` and the heads of `merged`.

    Both have the same query heads in the same order, and `source` one map for keys and values. `merged` may have been
    made in any way; its tensors are copied.
    """
    assert source.key_map == source.value_map, "target gqa wants one map for keys and values"
    assert merged.key_map == merged.value_map, "target gqa wants one map for keys and values"
    other = attention_of(merged.on(source.q.device).to(source.q.dtype), module.layer_idx)
    groups = dict(zip(source.key_map, merged.key_map, strict=True))
    queries = range(source.num_query_heads)
    shared = {"reads": source.key_map, "becomes": queries}
    grouped = {"reads": range(source.num_key_heads), "becomes": [groups[head] for head in range(source.num_key_heads)]}
    kinds: dict[str, tuple[type[Gated], dict[str, Sequence[int]]]] = {
        "q_proj": (GatedProjection, shared),
        "k_proj": (GatedProjection, grouped),
        "v_proj": (GatedProjection, grouped),
        "o_proj": (GatedOutput, shared),
        "q_norm": (GatedNorm, shared),
        "k_norm": (GatedNorm, grouped),
    }
    for name, (kind, maps) in kinds.items():
        own, theirs = getattr(module, name, None), getattr(other, name, None)
        if own is not None and theirs is not None and (name in ("k_proj", "v_proj") or not _same(own, theirs)):
            setattr(module, name, kind(own, theirs, head_dim=source.head_dim, **maps))


def gated_parts(module: DecoupledAttention) -> list[Gated]:
    """The parts of a module that `gate_attention` changed."""
    return [part for part in module.children() if isinstance(part, Gated)]


def merged_parameters(module: DecoupledAttention) -> list[nn.Parameter]:
    """The weights and biases of the key and value heads that stay, in a gated module or a plain merged one."""
    found: list[nn.Parameter] = []
    for part in (cast(nn.Module, module.k_proj), cast(nn.Module, module.v_proj)):
        parameters = (part.merged_weight, part.merged_bias) if isinstance(part, Gated) else part.parameters()
        found += [parameter for parameter in parameters if isinstance(parameter, nn.Parameter)]
    return found


@torch.no_grad()
def merged_heads(module: DecoupledAttention, like: AttentionHeads) -> AttentionHeads:
    """The merged layer as a module holds it now, gated or not; copies. `like` are the heads that it was made of."""
    state: dict[str, Tensor] = {}
    for name, part in module.named_children():
        held = part.merged_state() if isinstance(part, Gated) else part.state_dict()
        state |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in held.items()}
    return decoupled_heads(state, like)


def _same(own: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same parameters, but for rounding."""
    pairs = zip(own.parameters(), other.parameters(), strict=True)
    return all(
        mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= SAME * mine.abs().max())
        for mine, theirs in pairs
    )
