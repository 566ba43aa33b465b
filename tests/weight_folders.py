"""Editing the configuration and the weights of a model folder, to see what comes of it."""

import json

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
KEY = "model.layers.1.self_attn.k_proj.weight"


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def as_pickle(folder, content=None):
    """The weights, or other content, in torch's own format instead."""
    torch.save(load_file(folder / WEIGHTS) if content is None else content, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
