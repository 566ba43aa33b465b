"""A byte-level tokenizer of 261 tokens, built in memory: any text round-trips, and a few merges cross letters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 0, 1
VOCABULARY = 261
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]


def tiny_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Specials `<s>` and `</s>`, the 256 bytes, and " t", "he" and " the"."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
