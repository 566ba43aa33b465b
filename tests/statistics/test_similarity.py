"""CKA: what it is blind to, what it sees, and the mean that the paper calls redundancy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from headfuse.statistics.similarity import cka, redundancy
from strategies import seeded

SEEDS = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_cka_is_the_paper_s_formula():
    heads = normal(0, 3, 4, 10)
    found = cka(heads)
    for i in range(3):
        for j in range(3):
            # The paper's W is D x d: its columns are our rows.
            a, b = heads[i].mT, heads[j].mT
            sizes = (a.mT @ a).norm() ** 2 * (b.mT @ b).norm() ** 2
            assert found[i, j].item() == pytest.approx(((a.mT @ b).norm() ** 2 / sizes.sqrt()).item())


@given(st.integers(1, 5), st.integers(1, 6), SEEDS)
def test_cka_is_symmetric_with_its_largest_value_on_the_diagonal(count, width, seed):
    found = cka(normal(seed, count, width, 8))
    assert_close(found, found.mT)
    assert_close(found.diagonal(), torch.ones(count, dtype=torch.float64))
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()


@given(SEEDS)
def test_cka_sees_neither_rotations_of_channels_nor_scale(seed):
    heads = normal(seed, 4, 6, 12)
    rotations = torch.linalg.qr(normal(seed + 1, 4, 6, 6))[0]
    scales = normal(seed + 2, 4, 1, 1)
    assert_close(cka(scales * (rotations @ heads)), cka(heads))


def test_heads_that_read_different_inputs_are_unrelated():
    basis = torch.eye(8).unflatten(0, (2, 4))
    assert torch.equal(cka(basis), torch.eye(2, dtype=torch.float64))
    assert redundancy(cka(basis)) == 0.0


def test_a_vanishing_head_is_like_no_other():
    heads = normal(0, 3, 2, 5)
    heads[1] = 0.0
    found = cka(heads)
    assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
    assert torch.isfinite(found).all()


def test_redundancy_is_the_mean_over_pairs():
    similarity = torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.6], [0.2, 0.6, 1.0]])
    assert redundancy(similarity) == pytest.approx(0.3)
    assert redundancy(cka(normal(0, 1, 2, 3).expand(4, 2, 3))) == pytest.approx(1.0)
    assert redundancy(torch.ones(1, 1)) == 0.0
