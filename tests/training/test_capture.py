"""A captured step computes what the same step computes as it is: on a GPU only, where there are graphs."""

import pytest
import torch

from headfuse.errors import ConfigError
from headfuse.training.capture import cleared, gradients_function
from headfuse.training.objectives import Distillation, last_hidden
from headfuse.training.processes import Processes
from pico import pico, tokens
from short_runs import curve, run, short, trained_of, weights_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_gradients_start_from_none_at_every_call():
    weight = torch.nn.Parameter(torch.ones(3))

    def function(batch):
        (weight * batch).sum().backward()
        return {"loss": weight.detach().sum()}

    gradients = gradients_function(function, [weight], captured=False)
    for scale in (1.0, 2.0, 3.0):
        gradients(torch.full((3,), scale))
        assert torch.equal(weight.grad, torch.full((3,), scale))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi", "qwen3"])
def test_rows_taken_whole_have_the_hidden_states_of_a_usual_pass(family):
    model, rows = pico(family), tokens(3, 17)
    wanted = model.base_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    found, _ = last_hidden(model, rows)
    assert torch.equal(found, wanted.flatten(0, 1))
    assert model.config._attn_implementation == "sdpa"


def test_steps_are_captured_on_a_gpu_alone():
    with pytest.raises(ConfigError, match="wanted one process on a GPU to capture its steps, got 1 on cpu"):
        run(trained_of(pico("llama")), short(captured=True))


@needs_gpu
@pytest.mark.parametrize("micro_rows", [None, 2])
@pytest.mark.parametrize("update", ["adamw", "muon"])
def test_captured_steps_give_the_same_curve_and_weights(update, micro_rows):
    here = Processes(torch.device("cuda"))
    found = []
    for captured in (False, True):
        model, teacher = pico("llama").to("cuda"), pico("llama", num_key_value_heads=2).to("cuda")
        trained = trained_of(model, Distillation(teacher), teacher=teacher)
        report = run(trained, short(update=update, captured=captured, micro_rows=micro_rows), here=here)
        found.append((curve(report), weights_of(model)))
    (wanted, weights), (losses, same) = found
    assert losses == wanted
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@needs_gpu
def test_every_shape_of_batch_is_recorded_apart():
    weight = torch.nn.Parameter(torch.randn(8, device="cuda"))

    def function(batch):
        loss = (weight * batch).pow(2).sum()
        loss.backward()
        return {"loss": loss.detach()}

    captured, plain = gradients_function(function, [weight], captured=True), cleared(function, [weight])
    for step in range(20):
        batch = torch.randn(2 + step % 2, 8, device="cuda")
        loss, gradient = captured(batch)["loss"], weight.grad.clone()
        assert torch.equal(loss, plain(batch)["loss"])
        assert torch.equal(gradient, weight.grad)
