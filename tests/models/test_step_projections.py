"""Projections of a step: siblings are one product, with the values of their layers and no memory of their own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from headfuse.models.step_projections import StepProjections, joinable, side_by_side
from pico import pico, tokens
from pico_dha import pico_dha


class Products(TorchDispatchMode):
    """Counts the products of matrices that linear layers make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(model) -> tuple[int, torch.Tensor]:
    with torch.no_grad(), Products() as counted:
        logits = model(tokens(2, 7)).logits
    return counted.count, logits


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (lambda: pico("llama"), 3),
        (lambda: pico("qwen2"), 3),
        (lambda: pico_dha("llama"), 3),
        (lambda: pico_dha("opt"), 2),
        (lambda: pico("gpt2"), 0),
    ],
)
def test_a_block_makes_fewer_products_and_computes_the_same(make, saved):
    model = make()
    layers = model.config.num_hidden_layers
    before, wanted = products(model)
    joined = StepProjections(list(model.modules()))
    with joined.at_work():
        count, logits = products(model)
    assert count == before - saved * layers
    torch.testing.assert_close(logits, wanted)
    assert products(model)[0] == before


def test_weights_move_once_and_are_held_once():
    linears = [nn.Linear(6, width) for width in (4, 2, 3)]
    values = [each.weight.detach().clone() for each in linears]
    weights = [each.weight for each in linears]
    joined = side_by_side(weights)
    assert torch.equal(joined, torch.cat(values))
    assert {each.untyped_storage().data_ptr() for each in weights} == {joined.untyped_storage().data_ptr()}
    assert side_by_side(weights).data_ptr() == joined.data_ptr()
    with torch.no_grad():
        linears[1].weight.fill_(7)
    assert torch.equal(joined[4:6], torch.full((2, 6), 7.0))
    part = [linears[2].weight, linears[0].weight]  # of one storage, in another order
    assert torch.equal(side_by_side(part), torch.cat([values[2], values[0]]))


def test_a_joined_model_is_written_as_any_other(tmp_path):
    model = pico("llama")
    wanted = {name: each.clone() for name, each in model.state_dict().items()}
    StepProjections(list(model.modules()))
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], each) for name, each in wanted.items())


def test_only_plain_layers_of_one_kind_are_joined():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert joinable([nn.Linear(4, 4), nn.Linear(4, 2)])
    assert not joinable([nn.Linear(4, 4), None])
    assert not joinable([nn.Linear(4, 4), hooked])
    assert not joinable([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
    assert not joinable([nn.Linear(4, 4), nn.Linear(5, 4)])
    assert not joinable([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64)])


def test_siblings_of_other_inputs_are_refused_and_nothing_stays_behind():
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("gate_proj", "up_proj")})
    gate, up = (lambda: block["gate_proj"]), (lambda: block["up_proj"])
    joined, x = StepProjections([block]), torch.ones(1, 4)
    with pytest.raises(AssertionError, match="different inputs"), joined.at_work():
        gate()(x)
        up()(x + 1)
    with joined.at_work():
        first = gate()(x + 1)
    torch.testing.assert_close(first, gate()(x + 1))
