"""The precision that a device is given where nobody asks for one."""

import pytest
import torch

from headfuse.precision import best_precision


@pytest.mark.parametrize(("native", "precision"), [(False, "fp32"), (True, "bf16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, native, precision):
    supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert best_precision(torch.device("cuda")) == precision
