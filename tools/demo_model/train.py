"""Train the demo model: a small LLaMA with as many KV heads as query heads.

    python tools/demo_model/train.py --data DATA --out MODEL --seconds 300

DATA is the folder written by ``prepare_tokens.py``. MODEL receives the model in bf16, its
configuration and ``training.json`` (the run's facts and the validation loss of the saved weights).
The learning rate follows the share of ``--seconds`` (or ``--steps``, if that is further on) used.
Runs on one CUDA GPU; without one it runs on the CPU, which is only good for a short test.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WARMUP_STEPS = 200
FINAL_LR_SHARE = 0.05
UNTIMED_STEPS = 3  # they pay for compilation
REPORT_STEPS = 50
EVALUATIONS = 10  # spread evenly over the run


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of token files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seconds", type=float, default=300, help="training time after start-up")
    parser.add_argument("--steps", type=int, help="stop after this many steps at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8, help="query heads, and as many KV heads")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--intermediate", type=int, default=704, help="MLP width")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Returns the randomly initialised model."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.heads * args.head_dim,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """Returns AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def batches(tokens: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yields batches of ``length + 1`` tokens for ever.

    Each pass over the tokens cuts them at another offset and visits the pieces in a new order.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        pieces = (len(tokens) - offset - 1) // length
        starts = offset + length * torch.randperm(pieces, generator=generator).to(tokens.device)
        for chosen in starts.split(batch)[: pieces // batch]:
            yield tokens[chosen[:, None] + positions].long()


def token_loss(model: LlamaForCausalLM, sequences: Tensor) -> Tensor:
    """Returns the mean loss in nats of predicting each token from those before it."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, val: dict[str, Tensor], length: int) -> dict[str, float]:
    """Returns the loss in nats per token of each corpus, on sequences of ``length`` tokens."""
    losses = {}
    for name, tokens in val.items():
        sequences = tokens.unfold(0, length + 1, length)
        parts = [token_loss(model, part).item() * len(part) for part in sequences.split(16)]
        losses[name] = sum(parts) / len(sequences)
    return losses


def mean_loss(losses: dict[str, float], unseen: str) -> float:
    """Returns the mean over the corpora that are also trained on."""
    seen = [loss for name, loss in losses.items() if name != unseen]
    return sum(seen) / len(seen)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Returns the rate: linear warm-up, then a cosine down to a share of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decay = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def train(
    model: LlamaForCausalLM,
    tokens: Tensor,
    val: dict[str, Tensor],
    unseen: str,
    args: argparse.Namespace,
) -> tuple[int, float]:
    """Trains in place; returns the number of steps and the seconds taken."""
    optimizer = build_optimizer(model, args.lr)
    amp = torch.autocast(tokens.device.type, dtype=torch.bfloat16)
    compute_loss = token_loss if args.no_compile else torch.compile(token_loss)
    started = time.monotonic()
    next_evaluation = 1
    for step, batch in enumerate(batches(tokens, args.batch, args.length, args.seed)):
        if step <= UNTIMED_STEPS:
            started = time.monotonic()
        seconds = time.monotonic() - started
        progress = max(seconds / args.seconds, step / args.steps if args.steps else 0)
        if progress >= 1:
            return step, seconds

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, progress)
        with amp:
            loss = compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % REPORT_STEPS == REPORT_STEPS - 1:
            value = loss.item()  # waits for the device, so that the clock is right
            seconds = time.monotonic() - started
            tokens_per_step = args.batch * args.length
            speed = (step + 1 - UNTIMED_STEPS) * tokens_per_step / seconds
            print(
                f"step {step + 1}  loss {value:.3f}  "
                f"{(step + 1) * tokens_per_step / 1e6:.0f} M tokens  {speed:,.0f} tokens/s  "
                f"ETA {seconds * (1 / progress - 1):.0f} s",
                flush=True,
            )
        if progress * EVALUATIONS >= next_evaluation:
            next_evaluation += 1
            with amp:
                losses = evaluate(model, val, args.length)
            print(
                f"step {step + 1}  validation {mean_loss(losses, unseen):.3f}  {unseen} {losses[unseen]:.3f}",
                flush=True,
            )
    raise AssertionError("batches() never ends")


def main() -> None:
    """Trains, saves and evaluates the model."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    facts = json.loads((args.data / "data.json").read_text())
    tokens = np.load(args.data / "train.npz")["tokens"].astype(np.int32)
    tokens = torch.from_numpy(tokens).to(device)
    with np.load(args.data / "val.npz") as arrays:
        val = {name: torch.from_numpy(arrays[name].astype(np.int64)).to(device) for name in arrays}

    model = build_model(args).to(device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M tokens")
    steps, seconds = train(model, tokens, val, facts["unseen_corpus"], args)

    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    losses = evaluate(saved, val, args.length)
    options = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    training = {
        "validation_loss": {name: round(loss, 4) for name, loss in losses.items()},
        "validation_loss_mean": round(mean_loss(losses, facts["unseen_corpus"]), 4),
        "unseen_corpus": facts["unseen_corpus"],
        "parameters": saved.num_parameters(),
        "steps": steps,
        "tokens_seen": steps * args.batch * args.length,
        "distinct_tokens": len(tokens),
        "seconds": round(seconds, 1),
        "options": options,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    print(json.dumps(training, indent=2))


if __name__ == "__main__":
    main()
