"""Training on Hopper tries cuDNN's attention first, deterministic runs take what repeats; nothing stays behind."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention

from headfuse.errors import ConfigError
from headfuse.training import arithmetic as module
from headfuse.training.arithmetic import CUBLAS_SETTING, HOPPER_ORDER, REPEATING_ORDER, arithmetic

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
        assert order == (REPEATING_ORDER if deterministic else HOPPER_ORDER if hopper else before[0])
        assert others == ([True, False, False] if deterministic else list(before[1:]))
    assert state() == before


@pytest.mark.usefixtures("_told_to_be_deterministic")
def test_who_told_torch_to_be_deterministic_is_not_given_cudnn(monkeypatch):
    monkeypatch.setattr(module, "on_hopper", lambda _: True)
    before = state()
    with arithmetic(CPU, deterministic=False):
        assert state() == before
    assert state() == before


def test_what_cannot_repeat_is_refused_by_its_name():
    before = state()
    wanted = "wanted the same bits in every run, got put_, .*leave --deterministic out"
    with pytest.raises(ConfigError, match=wanted), arithmetic(CPU, deterministic=True):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert state() == before


@pytest.mark.parametrize(
    ("said", "error", "wanted"),
    [
        ("it uses CuBLAS ... set CUBLAS_WORKSPACE_CONFIG=:4096:8 or", ConfigError, "CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        ("out of memory", RuntimeError, "out of memory"),
    ],
)
def test_other_errors_of_torch(said, error, wanted):
    with pytest.raises(error, match=wanted), arithmetic(CPU, deterministic=True):
        raise RuntimeError(said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU attention repeats anyway")
@pytest.mark.parametrize("width", [32, 64, 128])
def test_gradients_of_attention_repeat(width):
    device = torch.device("cuda")
    drawn = torch.randn(3, 4, 8, 2048, width, device=device, dtype=torch.bfloat16)

    def gradients() -> torch.Tensor:
        leaf = drawn.clone().requires_grad_(True)
        with arithmetic(device, deterministic=True):
            scaled_dot_product_attention(*leaf, is_causal=True).float().square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    first = gradients()
    assert all(torch.equal(gradients(), first) for _ in range(5))
