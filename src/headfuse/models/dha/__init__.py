"""`Dha<Family>ForCausalLM`: stock families with decoupled heads, registered with transformers' auto classes, and the
attention that they can run with, `attn_implementation="headfuse"`.

Each family's file, `decoupling.py` and `decoupled_attention.py` are copied into exported checkpoints, so they
import only torch, transformers and each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from headfuse.models import attention
from headfuse.models.dha import gpt2, gpt_neox, llama, mistral, olmo, olmo2, opt, phi, qwen2, qwen3
from headfuse.models.dha.decoupled_attention import AttentionShape


class DhaClasses(NamedTuple):
    """What a family's file defines; `attention_shape` takes stock and decoupled configurations alike."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    attention_shape: Callable[[Any, int], AttentionShape]


# Keyed by the stock model_type; the decoupled one is "dha_" + key.
DHA_CLASSES: dict[str, DhaClasses] = {
    "gpt2": DhaClasses(gpt2.DhaGPT2Config, gpt2.DhaGPT2ForCausalLM, gpt2.attention_shape),
    "gpt_neox": DhaClasses(gpt_neox.DhaGPTNeoXConfig, gpt_neox.DhaGPTNeoXForCausalLM, gpt_neox.attention_shape),
    "llama": DhaClasses(llama.DhaLlamaConfig, llama.DhaLlamaForCausalLM, llama.attention_shape),
    "mistral": DhaClasses(mistral.DhaMistralConfig, mistral.DhaMistralForCausalLM, mistral.attention_shape),
    "olmo": DhaClasses(olmo.DhaOlmoConfig, olmo.DhaOlmoForCausalLM, olmo.attention_shape),
    "olmo2": DhaClasses(olmo2.DhaOlmo2Config, olmo2.DhaOlmo2ForCausalLM, olmo2.attention_shape),
    "opt": DhaClasses(opt.DhaOPTConfig, opt.DhaOPTForCausalLM, opt.attention_shape),
    "phi": DhaClasses(phi.DhaPhiConfig, phi.DhaPhiForCausalLM, phi.attention_shape),
    "qwen2": DhaClasses(qwen2.DhaQwen2Config, qwen2.DhaQwen2ForCausalLM, qwen2.attention_shape),
    "qwen3": DhaClasses(qwen3.DhaQwen3Config, qwen3.DhaQwen3ForCausalLM, qwen3.attention_shape),
}

for classes in DHA_CLASSES.values():
    AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.model, exist_ok=True)

attention.register()
