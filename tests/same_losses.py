"""Whether two losses are the same, in value and in every gradient."""

import torch

from pico import pico


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, found, wanted):
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-6, atol=1e-6)
    found, wanted = gradients(model, found), gradients(model, wanted)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-6 + 1e-5 * scale, msg=name)


def teacher_for(family, **overrides):
    model = pico(family, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
