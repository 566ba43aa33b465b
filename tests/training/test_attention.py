"""Training on Hopper tries cuDNN's attention first; elsewhere, and for deterministic runs, torch chooses as ever."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from headfuse.training import attention
from headfuse.training.attention import HOPPER_ORDER, fastest_attention

CPU = torch.device("cpu")


def order() -> list[SDPBackend]:
    return _cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize(("hopper", "deterministic"), [(True, False), (True, True), (False, False)])
def test_it_is_tried_first_where_that_is_faster_and_allowed(monkeypatch, hopper, deterministic):
    monkeypatch.setattr(attention, "on_hopper", lambda _: hopper)
    before = order()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with fastest_attention(CPU):
            assert order() == (HOPPER_ORDER if hopper and not deterministic else before)
    finally:
        torch.use_deterministic_algorithms(False)
    assert order() == before
