"""What headfuse must know of a model family, and the layout that most families share.

An adapter is the only code that knows a family's parameter names. It turns the tensors of one attention module
into `AttentionHeads` (`split`), and back into the family's own layout (`join`) or into the layout of the
family's decoupled class (`decoupled_tensors`, the same for all).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from torch import Tensor
from transformers import PreTrainedConfig

from headfuse.checkpoints.heads import AttentionHeads, AttentionTraits, QkNorm
from headfuse.errors import CheckpointError, PlanError, UnsupportedArchitectureError
from headfuse.models.dha import DHA_CLASSES
from headfuse.models.dha.decoupled_attention import AttentionShape

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A family whose attention has separate q, k, v and o projections: most of them.

    Subclasses override what differs. Parameter names are relative to the attention module. What the attention
    computes is said once, by `attention_shape` in the family's decoupled module.
    """

    family: str  # the model_type of the configuration
    attention: str = "model.layers.{layer}.self_attn"
    output_projection: str = "o_proj"
    # Does the block add the attention's output straight to the residual stream (no norm in between)?
    adds_to_stream: bool = True
    # Does the stock class know grouped-query attention? If not, only unshared heads can be joined.
    stock_gqa: bool = True

    @property
    def decoder(self) -> str:
        """Path of the module list that holds the blocks."""
        return self.attention.partition(".{layer}")[0]

    @property
    def decoupled_config_class(self) -> type[PreTrainedConfig]:
        """`Dha<Family>Config`."""
        return DHA_CLASSES[self.family].config

    def check(self, config: Any) -> None:
        """Raise UnsupportedArchitectureError for a feature of this family that would break a conversion."""
        if getattr(config, "quantization_config", None) is not None:
            self.refuse("plain weights", "quantized ones", "dequantize the checkpoint first")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        # Families with `use_sliding_window` obey layer_types; in the others sliding_window holds for every layer.
        windowed = window is not None and not hasattr(config, "use_sliding_window")
        if kinds != {"full_attention"} or windowed:
            self.refuse(
                "full attention in every layer",
                f"sliding_window={window}" if kinds == {"full_attention"} else " and ".join(sorted(kinds)),
                "use a checkpoint without sliding windows (a conversion would need window-aware statistics)",
            )

    def refuse(self, wanted: str, got: str, remedy: str) -> NoReturn:
        """Raise UnsupportedArchitectureError in the usual one line."""
        raise UnsupportedArchitectureError(f"{self.family}: wanted {wanted}, got {got}; {remedy}")

    def shape(self, config: Any, layer: int = 0) -> AttentionShape:
        """One layer's attention, from a stock or a decoupled configuration of this family."""
        return DHA_CLASSES[self.family].attention_shape(config, layer)

    def traits(self, config: Any, layer: int) -> AttentionTraits:
        """What this family does around its heads."""
        shape = self.shape(config, layer)
        return AttentionTraits(
            rotary_dim=shape.rotary_dim,
            scaling=shape.scaling,
            qk_norm=cast(QkNorm, shape.qk_norm),
            norm_eps=shape.norm_eps,
            clip=shape.clip,
        )

    def split(self, tensors: Tensors, config: Any, layer: int) -> AttentionHeads:
        """The attention module's tensors as heads; the result shares memory with them."""
        shape = self.shape(config, layer)
        width, heads, keys = shape.head_dim, shape.num_query_heads, shape.num_key_heads
        q, q_bias = projection(tensors, "q_proj", heads, width)
        k, k_bias = projection(tensors, "k_proj", keys, width)
        v, v_bias = projection(tensors, "v_proj", keys, width)
        output = require(tensors, f"{self.output_projection}.weight", (shape.hidden_size, heads * width))
        return AttentionHeads(
            q=q,
            k=k,
            v=v,
            o=output.unflatten(1, (heads, width)).transpose(0, 1),
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            o_bias=tensors.get(f"{self.output_projection}.bias"),
            q_norm=norm_gain(tensors, "q_norm.weight", shape, heads),
            k_norm=norm_gain(tensors, "k_norm.weight", shape, keys),
            key_map=shape.key_map,
            value_map=shape.value_map,
            traits=self.traits(config, layer),
        )

    def join(self, heads: AttentionHeads) -> dict[str, Tensor]:
        """The family's own tensors for heads whose sharing is plain grouped-query attention.

        Raises PlanError if the maps are not equal contiguous groups, the same for keys and values.
        """
        check_grouped_query(heads, self.family, stock_gqa=self.stock_gqa)
        return separate_tensors(heads, self.output_projection)


def projection(tensors: Tensors, name: str, count: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight `[count, width, D]` and bias `[count, width]` of a projection to heads."""
    weight = require(tensors, f"{name}.weight", (count * width, None))
    bias = tensors.get(f"{name}.bias")
    return weight.unflatten(0, (count, width)), None if bias is None else bias.unflatten(0, (count, width))


def norm_gain(tensors: Tensors, name: str, shape: AttentionShape, count: int) -> Tensor | None:
    """The gain of a q/k norm: `[d]`, or `[count, d]` where one norm spans all heads."""
    if shape.qk_norm == "none":
        return None
    if shape.qk_norm == "head":
        return require(tensors, name, (shape.head_dim,))
    return require(tensors, name, (count * shape.head_dim,)).unflatten(0, (count, shape.head_dim))


def require(tensors: Tensors, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Tensor `name`, of the shape that the configuration promises (None matches any); CheckpointError otherwise."""
    if name not in tensors:
        raise CheckpointError(f"wanted a tensor {name!r} in the attention module, got only {sorted(tensors)}")
    got = tuple(tensors[name].shape)
    if len(got) != len(shape) or any(w is not None and w != g for w, g in zip(shape, got, strict=True)):
        raise CheckpointError(
            f"{name}: the configuration promises shape {shape}, the weights have {got}; fix config.json or the weights"
        )
    return tensors[name]


def check_grouped_query(heads: AttentionHeads, family: str, *, stock_gqa: bool = True) -> None:
    """Raise PlanError unless query head h reads key and value head `h * n // H`, as stock classes assume.

    Without `stock_gqa`, the stock class has as many key/value heads as query heads.
    """
    count, queries = heads.num_key_heads, heads.num_query_heads
    shared = tuple(h * count // queries for h in range(queries))
    if queries % count or heads.key_map != shared or heads.value_map != shared:
        raise PlanError(
            f"{family}: wanted equal contiguous groups for a stock checkpoint, got key map {heads.key_map} and value "
            f"map {heads.value_map}; use --target dha"
        )
    if not stock_gqa and count != queries:
        raise PlanError(
            f"{family}: the stock class wants one key and value head for each of {queries} query heads, got {count} "
            "shared ones; use --target dha"
        )


def separate_tensors(heads: AttentionHeads, output_projection: str) -> dict[str, Tensor]:
    """The tensors of an attention module with separate projections, as most families and all decoupled ones have."""
    tensors = {}
    for name in ("q", "k", "v"):
        tensors[f"{name}_proj.weight"] = getattr(heads, name).flatten(0, 1)
        if (bias := getattr(heads, f"{name}_bias")) is not None:
            tensors[f"{name}_proj.bias"] = bias.flatten()
    tensors[f"{output_projection}.weight"] = heads.o.transpose(0, 1).flatten(1)
    if heads.o_bias is not None:
        tensors[f"{output_projection}.bias"] = heads.o_bias
    gains = {"q_norm.weight": heads.q_norm, "k_norm.weight": heads.k_norm}
    return tensors | {name: gain.flatten() for name, gain in gains.items() if gain is not None}


def decoupled_tensors(heads: AttentionHeads) -> dict[str, Tensor]:
    """The tensors of a `DecoupledAttention` module that computes these heads."""
    return separate_tensors(heads, "o_proj")


def decoupled_heads(tensors: Tensors, like: AttentionHeads) -> AttentionHeads:
    """The heads held by a `DecoupledAttention` module that has the shape, maps and traits of `like`."""
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
