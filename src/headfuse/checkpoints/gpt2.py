"""GPT-2: q, k and v fused as three blocks of columns of a Conv1D, whose weights are transposed `nn.Linear` ones."""

from typing import Any

import torch
from torch import Tensor

from headfuse.checkpoints.adapter import Adapter, Tensors, check_grouped_query, require
from headfuse.checkpoints.heads import AttentionHeads


class GPT2Adapter(Adapter):
    """Also GPT-2's relatives that scale each layer by the inverse of its number."""

    def check(self, config: Any) -> None:
        """Refuse cross-attention, and scores computed out of order in fp32."""
        super().check(config)
        if config.add_cross_attention:
            self.refuse("a decoder alone", "add_cross_attention=true", "convert a model without an encoder")
        if config.reorder_and_upcast_attn:
            self.refuse(
                "scores in the weights' dtype",
                "reorder_and_upcast_attn=true",
                "set it to false in config.json (the same function, rounded otherwise in half precision)",
            )

    def split(self, tensors: Tensors, config: Any, layer: int) -> AttentionHeads:
        """The fused Conv1D tensors as heads; the result shares memory with them."""
        shape = self.shape(config, layer)
        heads, width, hidden = shape.num_query_heads, shape.head_dim, shape.hidden_size
        fused = require(tensors, "c_attn.weight", (hidden, 3 * heads * width)).T.unflatten(0, (3, heads, width))
        bias = require(tensors, "c_attn.bias", (3 * heads * width,)).unflatten(0, (3, heads, width))
        output = require(tensors, "c_proj.weight", (heads * width, hidden))
        return AttentionHeads(
            q=fused[0],
            k=fused[1],
            v=fused[2],
            o=output.unflatten(0, (heads, width)).transpose(1, 2),
            q_bias=bias[0],
            k_bias=bias[1],
            v_bias=bias[2],
            o_bias=require(tensors, "c_proj.bias", (hidden,)),
            key_map=shape.key_map,
            value_map=shape.value_map,
            traits=self.traits(config, layer),
        )

    def join(self, heads: AttentionHeads) -> dict[str, Tensor]:
        """The fused Conv1D tensors; PlanError if any head is shared."""
        check_grouped_query(heads, self.family, stock_gqa=self.stock_gqa)
        biases = [bias for bias in (heads.q_bias, heads.k_bias, heads.v_bias) if bias is not None]
        assert heads.o_bias is not None
        return {
            "c_attn.weight": torch.stack([heads.q, heads.k, heads.v]).flatten(0, 2).T.contiguous(),
            "c_attn.bias": torch.stack(biases).flatten(),
            "c_proj.weight": heads.o.transpose(1, 2).flatten(0, 1),
            "c_proj.bias": heads.o_bias,
        }
