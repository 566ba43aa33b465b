"""Prefill and backward kernels against the specification in fp64, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from problems import folded, paged, random_map, shuffled_table
from torch.testing import assert_close

pytest.importorskip("triton")

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention import Rows, Scoring, head_maps, naive_attention
from headfuse.ops.decoupled_attention.library import prefill_op
from headfuse.ops.decoupled_attention.prefill import prefill_attention
from headfuse.ops.decoupled_attention.scoring import PLAIN

pytestmark = pytest.mark.usefixtures("_poisoned")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}


class Case:
    """Queries `[B, H, T, d]` that are the last of their rows' tokens; outside a row everything is NaN."""

    def __init__(self, heads, count, lengths, starts=None, dim=16, dtype=torch.float32, device="cpu"):
        queries, keys, values = heads
        total = max(lengths)
        self.maps = head_maps(random_map(keys, queries), random_map(values, queries), device)
        shapes = ((queries, count), (keys, total), (values, total))
        self.query, self.key, self.value = (torch.randn(len(lengths), *s, dim).to(device, dtype) for s in shapes)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.starts = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
        for row, length in enumerate(lengths):
            first = 0 if starts is None else starts[row]
            for cache in (self.key, self.value):
                cache[row, :, :first] = cache[row, :, length:] = float("nan")

    def expected(self, scoring=PLAIN):
        """Output, log-sum-exp and gradients in fp64; unused tokens are zero there, since 0 * nan is nan."""
        leaves = [x.double().nan_to_num(0).requires_grad_() for x in (self.query, self.key, self.value)]
        out, lse = naive_attention(*leaves, self.maps, lengths=self.lengths, starts=self.starts, scoring=scoring)
        torch.manual_seed(1)
        self.upstream = torch.randn(out.shape).to(out)
        return out, lse, torch.autograd.grad(out, leaves, self.upstream)

    def check(self, scoring=PLAIN, *, gradients=True, cache=None, table=None):
        out, lse, wanted = self.expected(scoring)
        key, value = cache or (self.key, self.value)
        leaves = [x.detach().requires_grad_(gradients) for x in (self.query, key, value)]
        numbers = scoring.scale_for(self.query.shape[-1]), scoring.softcap or 0.0, scoring.window or 0
        got, got_lse = prefill_op(*leaves, self.maps.tensors(), self.lengths, self.starts, table, *numbers)
        tolerance = TOLERANCE[self.query.dtype]
        near(got, out, tolerance)
        assert_close(got_lse.double(), lse, atol=tolerance, rtol=tolerance)
        if gradients:
            for mine, theirs in zip(torch.autograd.grad(got, leaves, self.upstream.to(got)), wanted, strict=True):
                near(mine, theirs, tolerance)


def near(got, expected, tolerance):
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < tolerance, error


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_rows(dtype, device):
    Case((4, 2, 3), 40, (70, 53), dtype=dtype, device=device).check()


def test_rows_as_long_as_their_queries(device):
    case = Case((4, 3, 1), 50, (50, 50), device=device)
    out, _ = prefill_attention(case.query, case.key, case.value, case.maps)
    near(out, case.expected()[0], 3e-6)
    assert out.transpose(1, 2).is_contiguous()


def test_padding_on_the_left(device):
    """Queries before a row's start see nothing: zeros, -inf, and no gradient."""
    Case((4, 2, 3), 45, (45, 45, 45), starts=(0, 13, 40), device=device).check()


def test_a_row_shorter_than_its_queries(device):
    Case((2, 1, 2), 20, (37, 6, 0), device=device).check()


@pytest.mark.parametrize(
    "scoring", [Scoring(softcap=2.0), Scoring(window=20), Scoring(scale=0.5, softcap=5.0, window=3)]
)
def test_soft_cap_and_window(scoring, device):
    Case((4, 2, 3), 40, (70, 53), starts=(3, 0), device=device).check(scoring)


@pytest.mark.parametrize("heads", [(1, 1, 1), (5, 2, 3), (11, 8, 5), (32, 2, 14), (20, 20, 1)])
def test_head_counts(heads, device):
    Case(heads, 17, (33,), device=device).check()


@pytest.mark.parametrize("dim", [24, 64])
def test_head_widths(dim, device):
    Case((3, 2, 2), 20, (35,), dim=dim, device=device).check()


@pytest.mark.parametrize("page", [16, 24])
def test_a_chunk_against_pages_in_any_order(page, device):
    case = Case((4, 2, 3), 21, (70, 53), starts=(0, 9), device=device)
    table = shuffled_table(2, -(-70 // page), device)
    cache = paged(case.key, page, table, folded=True), paged(case.value, page, table, folded=True)
    case.check(gradients=False, cache=cache, table=table)


def test_the_folded_cache_is_read_in_place(device):
    case = Case((4, 2, 3), 21, (70, 53), device=device)
    case.check(cache=(folded(case.key), folded(case.value)))


def test_gradients_repeat_every_bit(device):
    case = Case((8, 2, 3), 40, (40, 40), device=device)

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (case.query, case.key, case.value)]
        out = prefill_op(*leaves, case.maps.tensors(), None, None, None, 0.25, 0.0, 0)[0]
        return torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_channels_apart_are_refused(device):
    case = Case((4, 2, 3), 8, (8,), device=device)
    apart = case.key.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ConfigError, match="side by side"):
        prefill_attention(case.query, apart, case.value, case.maps, Rows())
