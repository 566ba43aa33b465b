"""What headfuse must know of a model family, and the layout that most families share.

An adapter is the only code that knows a family's parameter names. It turns the tensors of one attention module
into `AttentionHeads` (`split`), and back into the family's own layout (`join`) or into the layout of the
family's decoupled class (`decoupled_tensors`, the same for all).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, AttentionTraits
from headfuse.errors import CheckpointError, PlanError, UnsupportedArchitectureError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A family whose attention has separate q, k, v and o projections: most of them.

    Subclasses override what differs. Parameter names are relative to the attention module.
    """

    family: str  # the model_type of the configuration
    attention: str = "model.layers.{layer}.self_attn"
    output_projection: str = "o_proj"
    rotary: bool = True
    # Does the block add the attention's output straight to the residual stream (no norm in between)?
    adds_to_stream: bool = True
    stock_gqa: bool = True

    def check(self, config: Any) -> None:
        """Raise UnsupportedArchitectureError for a feature of this family that would break a conversion."""
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
            raise UnsupportedArchitectureError(
                f"{self.family}: wanted full attention in every layer, got "
                f"{'sliding_window=' + str(config.sliding_window) if kinds == {'full_attention'} else sorted(kinds)}; "
                "a conversion would need window-aware statistics: use a checkpoint without sliding windows"
            )

    def num_key_value_heads(self, config: Any) -> int:
        """Key/value heads of every layer of the stock model."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def head_dim(self, config: Any) -> int:
        """Width of one head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def traits(self, config: Any, layer: int) -> AttentionTraits:  # noqa: ARG002  a family may differ by layer
        """What this family does around its heads."""
        width = self.head_dim(config)
        return AttentionTraits(rotary_dim=width if self.rotary else 0, scaling=width**-0.5)

    def split(self, tensors: Tensors, config: Any, layer: int) -> AttentionHeads:
        """The attention module's tensors as heads; the result shares memory with them."""
        width, heads = self.head_dim(config), config.num_attention_heads
        keys = self.num_key_value_heads(config)
        rows = {n: self._rows(tensors, f"{n}_proj", width, count) for n, count in (("q", heads), ("k", keys), ("v", keys))}
        output = require(tensors, f"{self.output_projection}.weight", (config.hidden_size, heads * width))
        shared = tuple(h * keys // heads for h in range(heads))
        return AttentionHeads(
            q=rows["q"][0],
            k=rows["k"][0],
            v=rows["v"][0],
            o=output.unflatten(1, (heads, width)).transpose(0, 1),
            q_bias=rows["q"][1],
            k_bias=rows["k"][1],
            v_bias=rows["v"][1],
            o_bias=tensors.get(f"{self.output_projection}.bias"),
            q_norm=self._gain(tensors, "q_norm.weight", heads, width),
            k_norm=self._gain(tensors, "k_norm.weight", keys, width),
            key_map=shared,
            value_map=shared,
            traits=self.traits(config, layer),
        )

    def join(self, heads: AttentionHeads) -> dict[str, Tensor]:
        """The family's own tensors for heads whose sharing is plain grouped-query attention.

        Raises PlanError if the maps are not equal contiguous groups, the same for keys and values.
        """
        check_grouped_query(heads, self.family)
        tensors = {}
        for name in ("q", "k", "v"):
            tensors[f"{name}_proj.weight"] = getattr(heads, name).flatten(0, 1)
            if (bias := getattr(heads, f"{name}_bias")) is not None:
                tensors[f"{name}_proj.bias"] = bias.flatten()
        tensors[f"{self.output_projection}.weight"] = heads.o.transpose(0, 1).flatten(1)
        if heads.o_bias is not None:
            tensors[f"{self.output_projection}.bias"] = heads.o_bias
        return tensors | norm_tensors(heads)

    @staticmethod
    def _rows(tensors: Tensors, name: str, width: int, count: int) -> tuple[Tensor, Tensor | None]:
        weight = require(tensors, f"{name}.weight", (count * width, None))
        bias = tensors.get(f"{name}.bias")
        return weight.unflatten(0, (count, width)), None if bias is None else bias.unflatten(0, (count, width))

    def _gain(self, tensors: Tensors, name: str, count: int, width: int) -> Tensor | None:
        gain = tensors.get(name)
        if gain is None:
            return None
        return gain if gain.numel() == width and count != 1 else gain.view(count, width)


def require(tensors: Tensors, name: str, shape: tuple[int | None, int | None]) -> Tensor:
    """Tensor `name`, of the shape that the configuration promises (None matches any); CheckpointError otherwise."""
    if name not in tensors:
        raise CheckpointError(f"wanted a tensor {name!r} in the attention module, got only {sorted(tensors)}")
    got = tuple(tensors[name].shape)
    if len(got) != len(shape) or any(w is not None and w != g for w, g in zip(shape, got, strict=True)):
        raise CheckpointError(
            f"{name}: the configuration promises shape {shape}, the weights have {got}; fix config.json or the weights"
        )
    return tensors[name]


def norm_tensors(heads: AttentionHeads) -> dict[str, Tensor]:
    """The q/k norm gains under the names that every family with qk-norm uses."""
    gains = {"q_norm.weight": heads.q_norm, "k_norm.weight": heads.k_norm}
    return {name: gain.flatten() for name, gain in gains.items() if gain is not None}


def check_grouped_query(heads: AttentionHeads, family: str) -> None:
    """Raise PlanError unless query head h reads key and value head `h * n // H`, as stock classes assume."""
    count, queries = heads.num_key_heads, heads.num_query_heads
    shared = tuple(h * count // queries for h in range(queries))
    if queries % count or heads.key_map != shared or heads.value_map != shared:
        raise PlanError(
            f"{family}: wanted equal contiguous groups for a stock checkpoint, got key map {heads.key_map} and value "
            f"map {heads.value_map}; use --target dha"
        )


def decoupled_tensors(heads: AttentionHeads) -> dict[str, Tensor]:
    """The tensors of a `DecoupledAttention` module that computes these heads."""
    tensors = {}
    for name in ("q", "k", "v"):
        tensors[f"{name}_proj.weight"] = getattr(heads, name).flatten(0, 1)
        if (bias := getattr(heads, f"{name}_bias")) is not None:
            tensors[f"{name}_proj.bias"] = bias.flatten()
    tensors["o_proj.weight"] = heads.o.transpose(0, 1).flatten(1)
    if heads.o_bias is not None:
        tensors["o_proj.bias"] = heads.o_bias
    return tensors | norm_tensors(heads)


def decoupled_heads(tensors: Tensors, like: AttentionHeads) -> AttentionHeads:
    """The heads held by a `DecoupledAttention` module that has the shape, maps and traits of `like`."""
    from dataclasses import replace

    width = like.head_dim
    fields: dict[str, Tensor | None] = {"o": tensors["o_proj.weight"].unflatten(1, (-1, width)).transpose(0, 1)}
    for name in ("q", "k", "v"):
        fields[name] = tensors[f"{name}_proj.weight"].unflatten(0, (-1, width))
        bias = tensors.get(f"{name}_proj.bias")
        fields[f"{name}_bias"] = None if bias is None else bias.unflatten(0, (-1, width))
    fields["o_bias"] = tensors.get("o_proj.bias")
    for name in ("q_norm", "k_norm"):
        gain = getattr(like, name)
        fields[name] = None if gain is None else tensors[f"{name}.weight"].view(gain.shape)
    return replace(like, **fields)  # type: ignore[arg-type]


def zeros_like_bias(weight: Tensor) -> Tensor:
    """A zero bias `[n, d]` for projection rows `[n, d, D]`."""
    return torch.zeros(weight.shape[:2], dtype=weight.dtype, device=weight.device)
