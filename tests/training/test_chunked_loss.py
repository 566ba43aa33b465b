"""A loss over chunks against the same loss in one piece, and how often its logits are computed."""

import pytest
import torch
import torch.nn.functional as F

from headfuse.training.chunked_loss import OutputLayer, mean_over_chunks, project
from pico import pico
from same_losses import assert_same

N, D, V = 13, 8, 11


def both_sums(targets, hidden, layer, scale):
    """Cross-entropy, and something else of the logits."""
    logits = project(hidden, layer)
    return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), scale * logits.pow(2).sum()])


def problem(*, bias=True, frozen=()):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "hidden": torch.randn(N, D, generator=generator),
        "weight": torch.randn(V, D, generator=generator),
        "bias": torch.randn(V, generator=generator) if bias else None,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    return tensors, torch.randint(V, (N,), generator=generator)


def chunked(tensors, targets, **options):
    layer = OutputLayer(tensors["weight"], tensors["bias"], torch.float32)
    return mean_over_chunks(both_sums, (targets,), tensors["hidden"], layer, 0.1, shares=(0.25, 0.75), **options)


def whole(tensors, targets):
    layer = OutputLayer(tensors["weight"], tensors["bias"], torch.float32)
    return both_sums(targets, tensors["hidden"], layer, 0.1) / N


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight", "bias"), ("weight",)])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_value_and_gradients_are_those_of_the_whole_loss(size, frozen, bias):
    tensors, targets = problem(bias=bias, frozen=frozen)
    loss = chunked(tensors, targets, chunk_tokens=size)
    parts = whole(tensors, targets)
    torch.testing.assert_close(loss.parts, parts.detach())
    wanted = 0.25 * parts[0] + 0.75 * parts[1]
    torch.testing.assert_close(loss.total.detach(), wanted.detach())
    learning = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    found = torch.autograd.grad(3 * loss.total, learning)
    for one, other in zip(found, torch.autograd.grad(3 * wanted, learning), strict=True):
        torch.testing.assert_close(one, other)
    assert not loss.parts.requires_grad


def test_no_logits_are_computed_twice():
    tensors, targets = problem()
    sizes = []

    def noting(targets, hidden, layer):
        sizes.append(len(hidden))
        return F.cross_entropy(project(hidden, layer), targets, reduction="sum")[None]

    layer = OutputLayer(tensors["weight"], tensors["bias"], torch.float32)
    loss = mean_over_chunks(noting, (targets,), tensors["hidden"], layer, shares=(1.0,), chunk_tokens=5)
    loss.total.backward()
    assert sizes == [5, 4, 4]
    assert tensors["weight"].grad is not None


def test_nothing_is_differentiated_where_nothing_learns():
    tensors, targets = problem()
    with torch.no_grad():
        loss = chunked(tensors, targets, chunk_tokens=4)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.parts, whole(tensors, targets).detach())


def test_gradients_of_a_layer_in_bf16_are_added_up_in_fp32():
    tensors, targets = problem(bias=False)
    half = tensors["weight"].detach().bfloat16().requires_grad_()

    def gradient(size, weight, dtype):
        layer = OutputLayer(weight, None, dtype)
        hidden = tensors["hidden"].detach().to(dtype)
        loss = mean_over_chunks(both_sums, (targets,), hidden, layer, 0.1, shares=(1.0, 0.0), chunk_tokens=size)
        return torch.autograd.grad(loss.total, [weight])[0]

    exact = gradient(N, half.detach().float().requires_grad_(), torch.float32)
    found = gradient(1, half, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.01)


def test_a_tied_embedding_has_the_gradients_of_both_ends():
    model = pico("llama", tie_word_embeddings=True)
    ids = torch.arange(1, 18).view(1, -1)

    def loss(size):
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        layer = OutputLayer(model.lm_head.weight, None, torch.float32)
        targets = (ids[:, 1:].flatten(),)
        return mean_over_chunks(both_sums, targets, hidden, layer, 0.1, shares=(1.0, 1.0), chunk_tokens=size).total

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
    plain = F.cross_entropy(logits, ids[0, 1:]) + 0.1 * logits.pow(2).sum() / 16
    assert_same(model, loss(3), plain)
