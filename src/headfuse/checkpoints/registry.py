"""The families that headfuse converts, and why it does not convert some others."""

from typing import Any

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.gpt2 import GPT2Adapter
from headfuse.checkpoints.gpt_neox import GPTNeoXAdapter
from headfuse.checkpoints.phi import PhiAdapter
from headfuse.errors import UnsupportedArchitectureError

# Keyed by the configuration's model_type. CodeLlama, Vicuna, SmolLM2 and DeepSeek 7B (V1) are "llama".
ADAPTERS: dict[str, Adapter] = {
    "gpt2": GPT2Adapter("gpt2", "transformer.h.{layer}.attn", "c_proj", stock_gqa=False),
    "gpt_neox": GPTNeoXAdapter("gpt_neox", "gpt_neox.layers.{layer}.attention", "dense", stock_gqa=False),
    "llama": Adapter("llama"),
    "mistral": Adapter("mistral"),
    "olmo": Adapter("olmo"),
    "olmo2": Adapter("olmo2", adds_to_stream=False),  # a norm follows the attention
    "opt": Adapter("opt", "model.decoder.layers.{layer}.self_attn", "out_proj", stock_gqa=False),
    "phi": PhiAdapter("phi", output_projection="dense"),
    "qwen2": Adapter("qwen2"),
    "qwen3": Adapter("qwen3"),
}

_LATENT = "multi-head latent attention, which caches one latent vector instead of heads: it is small already"
_EXPERTS = "a mixture of experts: its blocks would need a decoupled class and a test of their own"
_WINDOWS = "sliding-window layers, which would need window-aware statistics"
_RECURRENT = "recurrent or convolutional layers beside attention, which would need a class for the hybrid cache"
_INTERLEAVED = "rotary planes of adjacent channels, where headfuse rotates (f, f + d/2)"
_ALIBI = "ALiBi position biases, which decoupled attention does not add"
_DONE = "decoupled heads already: convert the original checkpoint instead"

REASONS: dict[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"), _LATENT),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gpt_oss", "cohere2", "olmo3"), _WINDOWS),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba", "zamba", "zamba2"), _RECURRENT),
    **dict.fromkeys(("falcon_h1", "recurrent_gemma", "qwen3_next", "nemotron_h", "lfm2"), _RECURRENT),
    **dict.fromkeys(("gptj", "codegen", "glm", "glm4", "cohere"), _INTERLEAVED),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **{f"dha_{family}": _DONE for family in ADAPTERS},
}


def adapter_for(config: Any) -> Adapter:
    """The adapter of a configuration's family, once it has accepted the configuration.

    Raises UnsupportedArchitectureError, with the reason, for an unknown family or a feature that breaks conversion.
    """
    family = getattr(config, "model_type", None) or type(config).__name__
    if family not in ADAPTERS:
        reason = f" ({reason})" if (reason := REASONS.get(family)) else ""
        raise UnsupportedArchitectureError(
            f"wanted a model of one of the families {', '.join(ADAPTERS)}; got {family!r}{reason}; use one of these "
            "or add an adapter in headfuse/checkpoints and a decoupled class in headfuse/models/dha"
        )
    adapter = ADAPTERS[family]
    adapter.check(config)
    return adapter


def adapter_of_converted(config: Any) -> Adapter:
    """The adapter of the family of a model that may be converted already; UnsupportedArchitectureError as above."""
    family = (getattr(config, "model_type", None) or "").removeprefix("dha_")
    return ADAPTERS[family] if family in ADAPTERS else adapter_for(config)
