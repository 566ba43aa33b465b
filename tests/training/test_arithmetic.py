"""Training on Hopper tries cuDNN's attention first, deterministic runs take what repeats; nothing stays behind."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from headfuse.training import arithmetic as module
from headfuse.training.arithmetic import CUBLAS_SETTING, HOPPER_ORDER, arithmetic

CPU = torch.device("cpu")


def state() -> tuple[list[SDPBackend], bool, bool, bool]:
    return (
        _cur_sdpa_kernel_backends(with_priority=True),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture
def _told_to_be_deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_taken_and_given_back(monkeypatch, hopper, deterministic):
    monkeypatch.setattr(module, "on_hopper", lambda _: hopper)
    monkeypatch.delenv(CUBLAS_SETTING[0], raising=False)
    before = state()
    with arithmetic(CPU, deterministic=deterministic):
        order, *others = state()
        assert order == (HOPPER_ORDER if hopper and not deterministic else before[0])
        assert others == [True, True, False] if deterministic else others == list(before[1:])
    assert state() == before


@pytest.mark.usefixtures("_told_to_be_deterministic")
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_stricter_wish_is_kept(monkeypatch, deterministic):
    monkeypatch.setattr(module, "on_hopper", lambda _: True)
    before = state()
    with arithmetic(CPU, deterministic=deterministic):
        assert state()[:3] == before[:3]
    assert state() == before
