"""What a run says of itself: one JSON line a step, tokens a second, and how much of the hardware that uses."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headfuse.training.trackers import Follower

# Dense bf16 matrix throughput in FLOP/s, from the makers' data sheets; by a part of the device's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """What the device could do in bf16; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: nn.Module, length: int) -> float:
    """Multiply-adds (as two operations) of one forward pass for one token at this sequence length.

    Two a matrix weight (the output projection too where it is tied, an embedding that is only looked up not), and
    for the causal attention `2 * d * length` a query head: half of scores and mixture, `d` the head's width.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    if output.weight is inputs.weight:
        looked_up.pop(id(inputs.weight), None)
    config: Any = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * width * length
    return 2.0 * (weights - sum(looked_up.values())) + attention


class MetricsLog:
    """A `.jsonl` file with one object a step; a resumed run continues it after the step it resumes from.

    `follow` is told of every step that is added.
    """

    def __init__(self, path: Path | None, *, first_step: int = 0, follow: Follower = lambda _: None) -> None:
        self.path, self.follow = path, follow
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(_parsed, lines) if row is not None and row["step"] <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        partial.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a step."""
        self.rows.append(row)
        self.follow(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log; None for one that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
