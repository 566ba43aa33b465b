"""Put the trained demo model, its tokenizer and its model card into the package.

    python tools/demo_model/assemble.py --data DATA --model MODEL

DATA is the folder written by ``prepare_tokens.py``, MODEL the one written by ``train.py``.
"""

import argparse
import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

ASSET = Path(__file__).parents[2] / "src" / "headfuse" / "assets" / "demo-mha"
MAX_BYTES = 12_000_000
MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json", "training.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PROMPT = "The function returns"

CARD = """\
# demo-mha

A small LLaMA-architecture language model with multi-head attention (every query head has its own
key and value head). It exists to try out and test the conversion of attention heads: its text is
English-like, mostly in the manner of technical documentation, and not to be relied on.

| | |
|---|---|
| parameters | {parameters:,} (bf16) |
| layers, width, MLP width | {num_hidden_layers}, {hidden_size}, {intermediate_size} |
| query heads, KV heads | {num_attention_heads}, {num_key_value_heads} |
| context | {max_position_embeddings} tokens |
| tokenizer | byte-level BPE, {vocab_size} tokens |
| trained on | {tokens_seen:,} tokens, from {distinct_tokens:,} distinct ones |
| training | {steps:,} steps in {seconds:.0f} s on one {hardware} |

## Validation loss

Nats per token on held-out documents, in sequences of {length} tokens. No text of `{unseen_corpus}`
was trained on; the mean is over the other corpora.

| corpus | loss |
|---|---|
{loss_rows}
| mean | {validation_loss_mean:.3f} |

## Training text

`{unseen_corpus}` was used for validation only.

| corpus | package | version | licence of the text | MB |
|---|---|---|---|---|
{source_rows}

`training.json` records the run; `tools/demo_model` in the source tree reproduces it.
"""


def model_card(model: Path, data: Path) -> str:
    """Returns the model card, filled in from the run's and the data's records."""
    training = json.loads((model / "training.json").read_text())
    facts = json.loads((data / "data.json").read_text())
    losses = training["validation_loss"].items()
    fields = ("corpus", "package", "version", "licence", "megabytes")
    return CARD.format(
        **json.loads((model / "config.json").read_text()),
        **training,
        length=training["options"]["length"],
        loss_rows="\n".join(f"| {name} | {loss:.3f} |" for name, loss in losses),
        source_rows="\n".join(
            "| " + " | ".join(str(source[field]) for field in fields) + " |" for source in facts["sources"]
        ),
    )


def main() -> None:
    """Assembles the asset, checks its size and generates a sample from it."""
    parser = argparse.ArgumentParser(description="Assemble the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of token files")
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--out", type=Path, default=ASSET, help="folder to write")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    for folder, names in ((args.model, MODEL_FILES), (args.data, TOKENIZER_FILES)):
        for name in names:
            shutil.copyfile(folder / name, args.out / name)
    (args.out / "README.md").write_text(model_card(args.model, args.data))

    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        raise SystemExit(f"the asset is larger than {MAX_BYTES / 1e6:.0f} MB")

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
