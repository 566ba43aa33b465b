"""GPT-NeoX and Pythia: q, k and v fused head by head, `[q | k | v]` for each head in turn."""

from typing import Any

import torch
from torch import Tensor

from headfuse.checkpoints.adapter import Adapter, Tensors, check_grouped_query, require
from headfuse.checkpoints.heads import AttentionHeads


class GPTNeoXAdapter(Adapter):
    """The fused layout, with or without biases."""

    def split(self, tensors: Tensors, config: Any, layer: int) -> AttentionHeads:
        """The fused tensors as heads; the result shares memory with them."""
        shape = self.shape(config, layer)
        heads, width, hidden = shape.num_query_heads, shape.head_dim, shape.hidden_size
        fused = require(tensors, "query_key_value.weight", (3 * heads * width, hidden)).unflatten(0, (heads, 3, width))
        biases = (None, None, None)
        if "query_key_value.bias" in tensors:
            bias = require(tensors, "query_key_value.bias", (3 * heads * width,)).unflatten(0, (heads, 3, width))
            biases = bias.unbind(1)
        output = require(tensors, "dense.weight", (hidden, heads * width))
        return AttentionHeads(
            q=fused[:, 0],
            k=fused[:, 1],
            v=fused[:, 2],
            o=output.unflatten(1, (heads, width)).transpose(0, 1),
            q_bias=biases[0],
            k_bias=biases[1],
            v_bias=biases[2],
            o_bias=tensors.get("dense.bias"),
            key_map=shape.key_map,
            value_map=shape.value_map,
            traits=self.traits(config, layer),
        )

    def join(self, heads: AttentionHeads) -> dict[str, Tensor]:
        """The fused tensors; PlanError if any head is shared."""
        check_grouped_query(heads, self.family, stock_gqa=self.stock_gqa)
        tensors = {
            "query_key_value.weight": torch.stack([heads.q, heads.k, heads.v], dim=1).flatten(0, 2),
            "dense.weight": heads.o.transpose(0, 1).flatten(1),
        }
        biases = [bias for bias in (heads.q_bias, heads.k_bias, heads.v_bias) if bias is not None]
        if biases:
            tensors["query_key_value.bias"] = torch.stack(biases, dim=1).flatten()
        if heads.o_bias is not None:
            tensors["dense.bias"] = heads.o_bias
        return tensors
