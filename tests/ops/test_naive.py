"""The specification, against attention that a reader can check by eye, and the gathered backend against it."""

import pytest
import torch
from problems import random_map
from torch.testing import assert_close

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention import Scoring, head_maps, naive_attention, sdpa_attention
from headfuse.ops.decoupled_attention.scoring import PLAIN

COUNTS = (1, 2, 3, 5, 8, 11, 32)
PAIRS = [(keys, values) for keys in COUNTS for values in COUNTS]


def inputs(heads=(8, 3, 5), queries=4, total=9, dim=16):
    count, keys, values = heads
    maps = head_maps(random_map(keys, count), random_map(values, count))
    shapes = ((count, queries), (keys, total), (values, total))
    query, key, value = (torch.randn(2, *shape, dim, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value, maps


def by_hand(query, key, value, maps, first, last, scoring=PLAIN):
    """One query of one row over keys `first..last`."""
    out = []
    for head, (k, v) in enumerate(zip(maps.key, maps.value, strict=True)):
        scores = key[k, first : last + 1] @ query[head] * (scoring.scale or query.shape[-1] ** -0.5)
        if scoring.softcap:
            scores = scoring.softcap * (scores / scoring.softcap).tanh()
        out.append(scores.softmax(-1) @ value[v, first : last + 1])
    return torch.stack(out)


def test_a_query_sees_the_keys_up_to_its_own():
    query, key, value, maps = inputs()
    out, _ = naive_attention(query, key, value, maps)
    for row in range(2):
        for t in range(4):
            expected = by_hand(query[row, :, t], key[row], value[row], maps, 0, 5 + t)
            assert_close(out[row, :, t], expected)


def test_rows_have_their_own_lengths_starts_window_and_cap():
    query, key, value, maps = inputs()
    scoring = Scoring(scale=0.3, softcap=1.5, window=3)
    lengths, starts = torch.tensor([9, 6]), torch.tensor([0, 3])
    out, lse = naive_attention(query, key, value, maps, lengths=lengths, starts=starts, scoring=scoring)
    for row, t, first, last in ((0, 3, 6, 8), (0, 0, 3, 5), (1, 3, 3, 5), (1, 1, 3, 3)):
        expected = by_hand(query[row, :, t], key[row], value[row], maps, first, last, scoring)
        assert_close(out[row, :, t], expected)
    assert (out[1, :, 0] == 0).all()  # position 2 comes before the row's first key
    assert (lse[1, :, 0] == -torch.inf).all()
    assert lse[1, :, 1:].isfinite().all()


@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_the_gathered_backend_is_the_specification(keys, values):
    query, key, value, maps = inputs((32, keys, values), queries=3, total=5, dim=8)
    lengths, starts = torch.tensor([5, 4]), torch.tensor([0, 1])
    for options in ({}, {"lengths": lengths, "starts": starts}, {"scoring": Scoring(window=2)}):
        expected = naive_attention(query, key, value, maps, **options)[0]
        got = sdpa_attention(query, key, value, maps, **options)
        assert_close(got, expected)
        upstream = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (query, key, value), upstream)
        assert_close(torch.autograd.grad(got, (query, key, value), upstream), wanted)


def test_what_no_query_sees_may_be_anything():
    query, key, value, maps = inputs()
    lengths = torch.tensor([7, 5])
    whole = naive_attention(query, key, value, maps, lengths=lengths)[0]
    key, value = key.detach().clone(), value.detach().clone()
    for row, length in enumerate(lengths.tolist()):
        key[row, :, length:] = value[row, :, length:] = float("nan")
    assert_close(naive_attention(query, key, value, maps, lengths=lengths)[0], whole)
    assert_close(sdpa_attention(query, key, value, maps, lengths=lengths), whole)


def test_gradients_of_shared_heads_are_summed_in_fp32():
    maps = head_maps([0] * 32, [0] * 32)
    query = torch.zeros(1, 32, 1, 16, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 1, 1, 16).to(torch.bfloat16).requires_grad_().unbind()
    out = sdpa_attention(query, key, value, maps)
    upstream = torch.full_like(out, 1.0)
    upstream[:, 0] = 256.0  # 256 + 1 is 256 in bf16: adding one head after another would lose all the others
    (gradient,) = torch.autograd.grad(out, value, upstream)
    assert (gradient == 256 + 31).logical_or(gradient == 288).all()


def test_torch_attention_has_no_soft_cap():
    with pytest.raises(ConfigError, match="softcap"):
        sdpa_attention(*inputs(), scoring=Scoring(softcap=30.0))


@pytest.mark.parametrize("option", ["softcap", "window"])
def test_a_cap_or_a_window_of_nothing_is_refused(option):
    with pytest.raises(ConfigError, match="leave it out"):
        Scoring(**{option: 0})


@pytest.mark.parametrize("maps", [([0, 2], [0, 0]), ([0, 1], [0]), ([], [])])
def test_maps_that_skip_heads_or_differ_in_length_are_refused(maps):
    with pytest.raises(ConfigError, match="each at least once"):
        head_maps(*maps)


def test_every_query_head_has_its_place_among_the_groups():
    for _ in range(50):
        keys, values = (int(count) for count in torch.randint(1, 9, (2,)))
        maps = head_maps(random_map(keys, 8), random_map(values, 8))
        assert (maps.num_query_heads, maps.num_key_heads, maps.num_value_heads) == (8, keys, values)
        for groups, head_map in ((maps.key_groups, maps.key), (maps.value_groups, maps.value)):
            for head, group in enumerate(groups.tolist()):
                assert [q for q in group if q >= 0] == (head_map == head).nonzero()[:, 0].tolist()
        through_keys = maps.key_slots.flatten()[maps.value_slots.flatten()]
        assert through_keys[maps.out_slots].tolist() == list(range(8))
        assert (maps.out_slots // maps.value_slots.shape[1] == maps.value).all()
