"""Examples packed into rows of equal length, several to a row, none of which sees another.

R is the rows of a step, T the positions of a row that are read, n the rows that one process takes. A batch is one
tensor of integers, so that a training loop can pin, share and split it like plain tokens: token ids, position ids, and
the bits of three fp32 weights of every token.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headfuse.errors import TextError
from headfuse.text.examples import EncodedExample, encode_examples, load_examples
from headfuse.text.rows import check_range

NUM_WEIGHTS = 3


class PackedRows(NamedTuple):
    """Rows of a step. Position ids start at 0 with every example, and with the padding behind the last one.

    The weights say how much the prediction of a token counts: a mean over the R * T predictions of the step, weighted
    by `prompt`, is the mean over its prompt tokens; by `answer`, over its answer tokens (the eos among them); by
    `sample`, over its examples, of the mean over the answer tokens of each. So neither the number of processes nor of
    micro-batches matters. The first token of an example is not predicted, nor is padding: they weigh nothing.
    """

    tokens: Int64[Tensor, "n T+1"]
    positions: Int64[Tensor, "n T+1"]
    prompt: Float32[Tensor, "n T+1"]
    answer: Float32[Tensor, "n T+1"]
    sample: Float32[Tensor, "n T+1"]

    @classmethod
    def of(cls, batch: Int64[Tensor, "n 5 T+1"]) -> "PackedRows":
        """What is in a batch."""
        weights = batch[:, -NUM_WEIGHTS:].int().view(torch.float32)
        return cls(batch[:, 0], batch[:, 1], *weights.unbind(1))

    def batch(self) -> Int64[Tensor, "n 5 T+1"]:
        """As one tensor."""
        weights = torch.stack([self.prompt, self.answer, self.sample], 1).view(torch.int32).long()
        return torch.cat([self.tokens[:, None], self.positions[:, None], weights], 1)


@dataclass(frozen=True)
class PackedExamples:
    """Rows of whole examples, as `Batches` takes them; `digest` says whether two are the same.

    `left_out` examples were longer than a row.
    """

    name: str
    digest: str
    length: int
    left_out: int
    contents: tuple[tuple[EncodedExample, ...], ...]

    def num_rows(self, length: int) -> int:
        """How many rows there are of `length` predicted tokens: the one that they were packed for."""
        assert length == self.length
        return len(self.contents)

    def extent(self, num_rows: int, length: int) -> tuple[str, int]:
        """What so many rows take, in words, and how much of that there is."""
        return f"{num_rows} packed rows", self.num_rows(length)

    def rows(self, numbers: Sequence[int], share: slice, length: int) -> Int64[Tensor, "n 5 T+1"]:
        """Of a step of the rows with these numbers, those of the `share`."""
        contents = [self.contents[number] for number in numbers]
        predictions = len(contents) * length
        samples = [example for content in contents for example in content]
        prompts = sum(example.num_prompt - 1 for example in samples)
        answers = sum(example.ids.size - example.num_prompt for example in samples)
        taken = contents[share]
        tokens, positions = np.zeros((2, len(taken), length + 1), np.int64)
        weights = np.zeros((NUM_WEIGHTS, len(taken), length + 1), np.float32)
        for row, content in enumerate(taken):
            end = 0
            for example in content:
                start, answer, end = end, end + example.num_prompt, end + example.ids.size
                tokens[row, start:end], positions[row, start:end] = example.ids, np.arange(end - start)
                weights[0, row, start + 1 : answer] = predictions / max(1, prompts)
                weights[1, row, answer:end] = predictions / answers
                weights[2, row, answer:end] = predictions / len(samples) / (end - answer)
            positions[row, end:] = np.arange(length + 1 - end)
        prompt, answer, sample = torch.from_numpy(weights)
        return PackedRows(torch.from_numpy(tokens), torch.from_numpy(positions), prompt, answer, sample).batch()


def packed_examples(
    source: str, tokenizer: PreTrainedTokenizerBase | None, *, length: int, vocab_size: int, seed: int
) -> PackedExamples:
    """The training examples of a source, packed into rows of `length` predicted tokens in an order drawn by `seed`.

    A row has room for `length + 1` tokens. Longer examples are left out, with a warning that counts them.
    Raises TextError if the source is unreadable, has no example that fits, or ids outside the vocabulary.
    """
    if tokenizer is None:
        raise TextError(f"{source}: wanted a tokenizer to read examples, got none; copy the original's into the folder")
    encoded = encode_examples(load_examples(source, "train"), tokenizer)
    check_range(source, 0, max(int(example.ids.max()) for example in encoded), vocab_size)
    packed = pack(source, encoded, length=length, seed=seed)
    if packed.left_out:
        warnings.warn(
            f"{source}: {packed.left_out} of {len(encoded)} examples exceed {length + 1} tokens and are left out",
            stacklevel=2,
        )
    return packed


def pack(name: str, examples: Sequence[EncodedExample], *, length: int, seed: int) -> PackedExamples:
    """First fit: in an order drawn by `seed`, each example goes into the first row that has room for it.

    Raises TextError if none fits.
    """
    room = length + 1
    fitting = [example for example in examples if example.ids.size <= room]
    if not fitting:
        shortest = min((example.ids.size for example in examples), default=0)
        raise TextError(
            f"{name}: wanted examples of at most {room} tokens, got none below {shortest}; take longer rows"
        )
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = first_fit([fitting[index].ids.size for index in order], room)
    contents = tuple(tuple(fitting[order[place]] for place in row) for row in rows)
    return PackedExamples(name, _digest(contents, length), length, len(examples) - len(fitting), contents)


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Rows of the numbers of things, each in the first row that had room for it when its turn came."""
    rows: list[list[int]] = []
    left: NDArray[np.int64] = np.full(len(sizes), room)
    smallest, full = min(sizes, default=0), 0
    for number, size in enumerate(sizes):
        while full < len(rows) and left[full] < smallest:
            full += 1
        # The first row that is still empty has room for anything.
        row = full + int(np.argmax(left[full : len(rows) + 1] >= size))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        left[row] -= size
    return rows


def _digest(contents: Sequence[Sequence[EncodedExample]], length: int) -> str:
    digest = hashlib.sha256(f"{length} {len(contents)}".encode())
    for content in contents:
        for example in content:
            digest.update(f" {example.num_prompt} {example.ids.size} ".encode())
            digest.update(example.ids.astype("<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()
