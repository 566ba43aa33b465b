"""Heads as a runnable attention module, and back: one forward for parity checks, refits and exported models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

from torch import nn

from headfuse.checkpoints.adapter import decoupled_heads, decoupled_tensors
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.models.dha.decoupled_attention import AttentionShape, DecoupledAttention


def attention_of(heads: AttentionHeads, layer: int) -> DecoupledAttention:
    """A module that computes these heads, with its own copy of the weights, frozen and in evaluation mode."""
    traits = heads.traits
    shape = AttentionShape(
        hidden_size=heads.hidden_size,
        head_dim=heads.head_dim,
        key_map=heads.key_map,
        value_map=heads.value_map,
        scaling=traits.scaling,
        rotary_dim=traits.rotary_dim,
        input_bias=heads.q_bias is not None,
        output_bias=heads.o_bias is not None,
        qk_norm=traits.qk_norm,
        norm_eps=traits.norm_eps,
        clip=traits.clip,
    )
    module = DecoupledAttention(SimpleNamespace(_attn_implementation="sdpa"), layer, shape)
    module = module.to(device=heads.q.device, dtype=heads.q.dtype)
    module.load_state_dict({name: tensor.contiguous() for name, tensor in decoupled_tensors(heads).items()})
    module.place_maps()
    return module.eval().requires_grad_(False)


def heads_of(module: DecoupledAttention, like: AttentionHeads) -> AttentionHeads:
    """The heads that a module made by `attention_of(like)` holds now (copies)."""
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return decoupled_heads(state, like)


@contextmanager
def attention_replaced(
    layers: Sequence[tuple[nn.Module, nn.Module]], replacements: Mapping[int, nn.Module]
) -> Iterator[None]:
    """Within the context, the attention of the given layers is computed by other modules; undone on leaving.

    `layers` pairs every decoder layer with its attention module.
    """
    originals = {}
    try:
        for index, replacement in replacements.items():
            layer, attention = layers[index]
            name = next(name for name, child in layer.named_children() if child is attention)
            originals[index] = name
            setattr(layer, name, replacement)
        yield
    finally:
        for index, name in originals.items():
            layer, attention = layers[index]
            setattr(layer, name, attention)
