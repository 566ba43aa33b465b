"""Attention of decoupled heads on a GPU: correctness, then time against a copy and the attention of others.

    python benchmarks/decode_attention.py check --out check.json
    python benchmarks/decode_attention.py tune  --out tune.json --budget 150
    python benchmarks/decode_attention.py table --tuned tune.json --out decode_attention.json --budget 120
    python benchmarks/decode_attention.py prefill  --out prefill_attention.json --budget 90
    python benchmarks/decode_attention.py backward --out backward_attention.json --budget 90

`tune` and `table` time torch's attention (cuDNN, Flash) and FlashInfer's decoding, where that is installed, on equal
counts of grouped heads. `prefill` and `backward` compare the kernels with a gather of the heads and torch's attention,
each call between two events. Every decoding time is the median of CUDA-graph replays; one graph runs a kernel over
several sets of inputs, together far larger than the L2 cache, so that nothing is read from there and nothing dirty is
left in it. What is timed has been found right first, in the same process. A worker process does the measuring: when it
crashes or hangs, what it was at is recorded as failed and a new worker goes on with the rest. Checks come first, and
begin only within a third of the budget from when the kernels are compiled; a note names those left out.
"""

import argparse
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
OUT = {"table": "decode_attention.json", "prefill": "prefill_attention.json", "backward": "backward_attention.json"}


def main() -> None:
    """Play the asked role: the driver's, or that of one of its processes, which import no more than they need."""
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("decode_attention: wanted a CUDA device, got none; run it on a machine that has one")
    if options.role == "work":
        from attention.worker import work as play
    elif options.role == "compile":
        from attention.compiling import compile_share as play
    else:
        from attention.driver import drive as play
    play(options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("check", "tune", "table", "prefill", "backward"))
    parser.add_argument(
        "--out", help=f"JSON, rewritten after every result; default, for {', '.join(OUT)}: in benchmarks/results"
    )
    parser.add_argument("--budget", type=float, default=150, help="seconds")
    parser.add_argument("--tuned", help="the JSON of `tune`: use the best configuration it found for a case")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    for name in ("--role", "--done"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--share", "--of"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    for name in ("--deadline", "--checks-deadline"):
        parser.add_argument(name, type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None and options.mode not in OUT:
        parser.error(f"--out: wanted a JSON file for the mode {options.mode}, got none; name one")
    options.out = options.out or str(RESULTS / OUT[options.mode])
    return options


if __name__ == "__main__":
    main()
