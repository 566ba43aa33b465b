"""Train the demo model's tokenizer and turn the extracted text into token files.

    python tools/demo_model/prepare_tokens.py --text TEXT --out DATA

TEXT is the folder written by ``fetch_corpora.py``. DATA receives

* ``tokenizer.json``, ``tokenizer_config.json``: byte-level BPE, loadable with ``AutoTokenizer``;
* ``train.npz``: all training documents as one array ``tokens`` (uint16);
* ``val.npz``: the held-out documents, one array per corpus;
* ``data.json``: sources and token counts.

A document is a run of paragraphs of about 4000 characters and begins with the token ``<|bos|>``.
One hundredth of each corpus is held out; one corpus is kept out of training altogether.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOS = "<|bos|>", "<|eos|>"  # token ids 0 and 1
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "model_max_length": 1024,
    "clean_up_tokenization_spaces": False,
}
DOCUMENT_CHARS = 4000
UNSEEN_CORPUS = "janeausten"
UNSEEN_DOCUMENTS = 64
MIN_HELD_OUT = 16


def documents(text: str) -> Iterator[str]:
    """Cuts ``text`` at paragraph borders into documents of about ``DOCUMENT_CHARS``."""
    paragraphs: list[str] = []
    size = 0
    for paragraph in text.strip().split("\n\n"):
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT_CHARS:
            yield "\n\n".join(paragraphs)
            paragraphs, size = [], 0
    if paragraphs:
        yield "\n\n".join(paragraphs)


def split_corpora(folder: Path, rng: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns the training and the held-out documents of each corpus in ``folder``."""
    train, held_out = {}, {}
    for path in sorted(folder.glob("*.txt")):
        docs = list(documents(path.read_text("utf-8")))
        rng.shuffle(docs)
        if path.stem == UNSEEN_CORPUS:
            held_out[path.stem] = docs[:UNSEEN_DOCUMENTS]
        else:
            count = max(MIN_HELD_OUT, len(docs) // 100)
            held_out[path.stem], train[path.stem] = docs[:count], docs[count:]
    return train, held_out


def train_tokenizer(docs: list[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer that puts the BOS token before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        docs,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, docs: list[str]) -> np.ndarray:
    """Returns the tokens of all documents as one array."""
    encodings = tokenizer.encode_batch(docs)
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encodings])


def write_json(path: Path, content: dict) -> None:
    """Writes ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Writes the tokenizer and the token files."""
    parser = argparse.ArgumentParser(description="Prepare the demo model's tokens.")
    parser.add_argument("--text", type=Path, required=True, help="folder of extracted text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = split_corpora(args.text, random.Random(args.seed))
    train_docs = [doc for docs in train.values() for doc in docs]

    tokenizer = train_tokenizer(train_docs)
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_json(args.out / "tokenizer_config.json", TOKENIZER_CONFIG)

    train_tokens = {name: encode(tokenizer, docs) for name, docs in train.items()}
    val_tokens = {name: encode(tokenizer, docs) for name, docs in held_out.items()}
    np.savez_compressed(args.out / "train.npz", tokens=np.concatenate([*train_tokens.values()]))
    np.savez_compressed(args.out / "val.npz", **val_tokens)
    summary = {
        "train_tokens": {name: len(tokens) for name, tokens in train_tokens.items()},
        "validation_tokens": {name: len(tokens) for name, tokens in val_tokens.items()},
        "unseen_corpus": UNSEEN_CORPUS,
        "sources": json.loads((args.text / "sources.json").read_text()),
    }
    write_json(args.out / "data.json", summary)
    print(f"training tokens: {sum(summary['train_tokens'].values()):,}")
    print(f"validation tokens: {summary['validation_tokens']}")


if __name__ == "__main__":
    main()
