"""The choice of a backend, its override, torch.compile, and imports without Triton."""

import subprocess
import sys

import pytest
import torch
from problems import decoding, random_map
from torch.testing import assert_close

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention import Rows, Scoring, attention, dispatch, head_maps, naive_attention
from headfuse.ops.decoupled_attention.dispatch import BACKENDS, chosen
from headfuse.ops.decoupled_attention.scoring import PLAIN

TRITON = dispatch.HAS_TRITON
# dynamo makes an instance of every autograd function that it traces, and torch warns of it.
by_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if TRITON or b != "triton"])


def step(heads=(8, 3, 5), lengths=(50, 37), count=1, device="cpu", **options):
    problem = decoding(heads, lengths, device=device, **options)
    query = torch.randn(len(lengths), heads[0], count, problem.query.shape[-1]).to(device)
    starts = torch.tensor([0, 11], dtype=torch.int32, device=device)[: len(lengths)]
    return query, problem.key, problem.value, problem.maps, Rows(problem.lengths, starts)


def expected(query, key, value, maps, rows, scoring=PLAIN):
    exact = (x.double() for x in (query, key, value))
    return naive_attention(*exact, maps, lengths=rows.lengths, starts=rows.starts, scoring=scoring)[0].to(query.dtype)


@every_backend
@pytest.mark.parametrize("count", [1, 9])
def test_every_backend_computes_the_same(backend, count, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    for scoring in (PLAIN, Scoring(window=7)):
        problem = step(count=count, device=device)
        assert_close(attention(*problem, scoring=scoring), expected(*problem, scoring), atol=1e-5, rtol=1e-5)


@every_backend
def test_every_backend_takes_pages_and_gives_gradients(backend, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    query, key, value, maps, rows = step(lengths=(48, 48), count=3, device=device)
    pages = [x.unflatten(2, (3, 16)).transpose(1, 2).flatten(0, 1) for x in (key, value)]
    table = torch.arange(6, dtype=torch.int32, device=device).reshape(2, 3)
    paged = Rows(rows.lengths, rows.starts, table)
    assert_close(attention(query, *pages, maps, paged), expected(query, key, value, maps, rows), atol=1e-5, rtol=1e-5)
    query.requires_grad_()
    (got,) = torch.autograd.grad(attention(query, key, value, maps, rows).square().sum(), query)
    (wanted,) = torch.autograd.grad(expected(query, key, value, maps, rows).square().sum(), query)
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_choice_follows_the_device_and_the_question():
    one, many = torch.empty(1, 8, 1, 32), torch.empty(1, 8, 4, 32)
    assert chosen(one, one, one, Rows(), PLAIN) == "grouped"
    assert chosen(many, many, many, Rows(), PLAIN) == "sdpa"
    assert chosen(many, many, many, Rows(), Scoring(softcap=1.0)) == "naive"
    assert chosen(one.clone().requires_grad_(), one, one, Rows(), PLAIN) == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="chooses for a GPU")
def test_on_hopper_prompts_go_to_the_kernel():
    from headfuse.ops.hopper import on_hopper

    prompt = torch.empty(2, 8, 100, 128, device="cuda", dtype=torch.bfloat16)
    wanted = "triton" if on_hopper(prompt.device) else "sdpa"
    assert chosen(prompt, prompt, prompt, Rows(), PLAIN) == wanted
    assert chosen(prompt.float(), prompt.float(), prompt.float(), Rows(), PLAIN) == "sdpa"
    assert chosen(prompt.clone().requires_grad_(), prompt, prompt, Rows(), PLAIN) == "sdpa"


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", "flex")
    with pytest.raises(ConfigError, match="wanted one of naive, sdpa, grouped, triton, got 'flex'"):
        attention(*step())


@by_dynamo
@every_backend
@pytest.mark.parametrize("count", [1, 5])
def test_compiled_attention_is_the_same(backend, count, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    torch.compiler.reset()
    problem = step(count=count, device=device)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*problem), expected(*problem), atol=1e-5, rtol=1e-5)


@by_dynamo
@every_backend
def test_compiled_gradients_are_the_same(backend, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    torch.compiler.reset()
    maps = head_maps(random_map(3, 8), random_map(5, 8), device)
    leaves = [torch.randn(2, heads, 12, 16, device=device, requires_grad=True) for heads in (8, 3, 5)]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves, maps).square().sum(), leaves)
    wanted = torch.autograd.grad(naive_attention(*leaves, maps)[0].square().sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not TRITON, reason="no Triton")
@pytest.mark.parametrize("name", ["grouped_decode", "triton_decode", "triton_prefill"])
def test_operators_keep_torch_s_rules(name, device):
    query, key, value, maps, rows = step(lengths=(20, 17), dim=16, count=4, device=device)
    key, value = key.nan_to_num(0), value.nan_to_num(0)
    query = query if name == "triton_prefill" else query[:, :, 0].contiguous()
    arguments = (query, key, value, maps.tensors(), rows.lengths, rows.starts, None, 0.25, 0.0, 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.headfuse, name), arguments, test_utils=tests)


def test_nothing_needs_triton_to_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, headfuse.ops.decoupled_attention as ops\n"
        "maps = ops.head_maps([0, 0], [0, 1])\n"
        "q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 2, 5, 16)\n"
        "torch.testing.assert_close(ops.attention(q, k, v, maps), ops.naive_attention(q, k, v, maps)[0])\n"
        "assert 'headfuse.ops.decoupled_attention.decode' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
