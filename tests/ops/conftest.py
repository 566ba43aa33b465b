"""Allocations that show what a kernel left unwritten."""

import pytest
import torch


@pytest.fixture
def _poisoned(monkeypatch):
    """What is allocated but never written is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
