"""Every Gram that sharing reads, derived from the input's moment, is the Gram of the activations themselves."""

from dataclasses import replace

import torch
from hypothesis import given
from torch.testing import assert_close

from headfuse.statistics.moments import from_planes, head_moments, planes
from strategies import HeadCase, head_cases, project


def complex_planes(rows: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Activations `[n, T, d]` as complex numbers `[n, T, F]`."""
    half = rotary_dim // 2
    return torch.complex(rows[..., :half], rows[..., half:rotary_dim])


@given(head_cases())
def test_value_moments_are_the_gram_of_the_values(case):
    value = project(case.heads.v, case.heads.v_bias, case.x)
    assert_close(case.moments.values, torch.einsum("iTa,jTb->iajb", value, value) / len(case.x))


@given(head_cases())
def test_key_moments_are_the_grams_of_planes_and_unrotated_channels(case):
    width = case.heads.traits.rotary_dim
    key = project(case.heads.k, case.heads.k_bias, case.x)
    turning, rest = complex_planes(key, width), key[..., width:]
    assert_close(case.moments.key_planes, torch.einsum("iTf,jTf->fij", turning, turning.conj()) / len(case.x))
    assert_close(case.moments.key_rest, torch.einsum("iTa,jTb->iajb", rest, rest) / len(case.x))


@given(head_cases())
def test_query_moments_are_summed_over_the_heads_that_read_a_key(case):
    heads, width = case.heads, case.heads.traits.rotary_dim
    query = project(heads.q, heads.q_bias, case.x)
    for key in range(heads.num_key_heads):
        readers = query[[h for h, read in enumerate(heads.key_map) if read == key]]
        energy = complex_planes(readers, width).abs().pow(2).mean(1).sum(0)
        rest = readers[..., width:]
        assert_close(case.moments.query_planes[:, key], energy)
        assert_close(case.moments.query_rest[key], torch.einsum("hTa,hTb->ab", rest, rest) / len(case.x))


@given(head_cases())
def test_the_output_metric_is_summed_over_the_heads_that_read_a_value(case):
    heads = case.heads
    for value in range(heads.num_value_heads):
        readers = [h for h, read in enumerate(heads.value_map) if read == value]
        assert_close(case.moments.output_metric[value], sum(heads.o[h].mT @ heads.o[h] for h in readers))


@given(head_cases())
def test_planes_and_back_are_bit_equal(case):
    width = case.heads.traits.rotary_dim
    assert torch.equal(from_planes(planes(case.heads.k, width), case.heads.k[:, width:]), case.heads.k)


@given(head_cases())
def test_moments_are_double_precision_for_heads_of_any_dtype(case):
    rounded = HeadCase(case.heads.to(torch.bfloat16), case.x)
    moments = head_moments(rounded.heads, case.statistics)
    assert {tensor.dtype for tensor in vars(moments).values()} == {torch.float64, torch.complex128}
    value = project(rounded.heads.v, rounded.heads.v_bias, case.x)
    assert_close(moments.values, torch.einsum("iTa,jTb->iajb", value, value) / len(case.x))


@given(head_cases())
def test_biases_of_zero_are_as_good_as_none(case):
    heads = replace(case.heads, q_bias=None, k_bias=None, v_bias=None)
    zeros = [torch.zeros(w.shape[:2], dtype=w.dtype) for w in (heads.q, heads.k, heads.v)]
    biased = replace(heads, q_bias=zeros[0], k_bias=zeros[1], v_bias=zeros[2])
    found, expected = head_moments(biased, case.statistics), head_moments(heads, case.statistics)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name
