"""How alike the key heads and the value heads of each layer are: writes benchmarks/results/similarity.json.

    python benchmarks/similarity.py --model DIR --maps 0,4,7

CKA and redundancy as in DHA (arXiv 2406.06567, App. B.1), on the weights; `unrelated` is what two heads of random
weights would have.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headfuse.checkpoints.assembly import split_model
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.loading import load_model
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.statistics.similarity import cka, redundancy
from training_free import provenance

RESULTS = Path(__file__).parent / "results" / "similarity.json"
DIGITS = 4


def main() -> None:
    """Measure every layer of one model."""
    options, started = parse(), time.monotonic()
    model = load_model(locate(options.model))
    heads = split_model(model, adapter_for(model.config))
    drawn = drawn_layers(options.maps, len(heads))
    layers = [measured(index, layer, mapped=index in drawn) for index, layer in enumerate(heads)]
    meta = provenance("similarity.py", arguments(options), options.commit, time.monotonic() - started)
    write(Path(options.out), {"meta": meta, "model": options.name, "unrelated": unrelated(heads[0]), "layers": layers})


def drawn_layers(maps: str, count: int) -> list[int]:
    """The layers whose maps are kept: those asked for, else the first, the middle and the last."""
    return [int(index) for index in maps.split(",")] if maps else [0, count // 2, count - 1]


def measured(index: int, heads: AttentionHeads, *, mapped: bool) -> dict[str, Any]:
    """Redundancy of one layer, with its maps if asked for."""
    keys, values = cka(heads.k), cka(heads.v)
    row: dict[str, Any] = {
        "layer": index,
        "key_redundancy": round(redundancy(keys), DIGITS),
        "value_redundancy": round(redundancy(values), DIGITS),
    }
    if mapped:
        row["key_cka"] = [[round(value, DIGITS) for value in line] for line in keys.tolist()]
        row["value_cka"] = [[round(value, DIGITS) for value in line] for line in values.tolist()]
    print(f"layer {index:>2}  keys {row['key_redundancy']:.4f}  values {row['value_redundancy']:.4f}", flush=True)
    return row


def unrelated(heads: AttentionHeads) -> float:
    """CKA of two heads of independent normal weights, d / (D + d + 1): the ratio of the expected energies."""
    return round(heads.head_dim / (heads.hidden_size + heads.head_dim + 1), DIGITS)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results whole or not at all, a layer or a line of a map to a line."""
    text = json.dumps(results, indent=1)
    for row in results["layers"]:
        for line in [*row.get("key_cka", []), *row.get("value_cka", [])]:
            text = text.replace(json.dumps(line, indent=1).replace("\n", "\n" + " " * 4), json.dumps(line))
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def arguments(options: argparse.Namespace) -> Iterator[str]:
    """The options that choose what is measured, as they were given."""
    for name in ("name", "maps"):
        if value := getattr(options, name):
            yield f"--{name} '{value}'"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--name", default="reference", help="what the results call it")
    parser.add_argument("--maps", default="", help="layers whose CKA maps are kept, by commas: '0,4,7'")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
