"""Whether two tokenizers are one."""

from transformers import PreTrainedTokenizerBase

# Words, numbers, spaces and letters beyond ASCII: tokenizers that agree on it and on the vocabulary are one.
PROBE = "The naïve café sold 12,345 teas;  it's 世界 🙂\n\tdef f(x): return x"


def agree(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same ids for the same text, as far as a probe tells."""
    return first.get_vocab() == second.get_vocab() and first(PROBE)["input_ids"] == second(PROBE)["input_ids"]
