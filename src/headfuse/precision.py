"""How precisely a model runs: fp32 as it is, or bf16 by autocast where the hardware is fast at it."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch  # at run time inside the functions: the command line needs the names only

Precision = Literal["fp32", "bf16"]


def precision_context(device: "torch.device", precision: Precision) -> "torch.autocast":
    """Autocast to bf16, or nothing for fp32."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def best_precision(device: "torch.device") -> Precision:
    """Return "bf16" where the hardware multiplies it faster than fp32, else "fp32"."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # oneDNN emulates bf16 without AVX512-BF16 or AMX, slower than fp32.
    emulated = not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "fp32" if emulated or not _native_bf16() else "bf16"


def _native_bf16() -> bool:
    import torch

    capability = getattr(torch.cpu, "get_capabilities", None)
    if capability is not None:
        flags = capability()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())
