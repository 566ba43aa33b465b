"""Samples of text from a model."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoints.loading import positions_of
from headfuse.errors import ConfigError
from headfuse.evaluation.inference import ends_of, measuring
from headfuse.generation.decoding import Decoder
from headfuse.generation.sampling import GREEDY, Sampling


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    compiled: bool = False,
) -> str:
    """What `model` writes after `prompt`, without the prompt; by default it always takes the likeliest token.
    `compiled` compiles the model's blocks for the steps: it takes a while, and is undone.

    The global random state is left as it was. Raises ConfigError for no new tokens, a prompt without tokens, or more of
    both than the model has positions.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.numel():
        raise ConfigError("wanted a prompt of at least one token, got none; write some text")
    tokens, limit = ids.shape[1] + max_new_tokens, positions_of(model.config)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"wanted at most {limit} tokens, the model's positions, got {ids.shape[1]} of prompt and {max_new_tokens} "
            "new ones; write fewer"
        )
    ends = ends_of(model)
    with measuring(model):
        decoder = Decoder(model, sampling=sampling, eos=ends, pad=ends[0] if ends else 0, compiled=compiled)
        written = decoder.write(ids, max_new_tokens=max_new_tokens, seed=seed)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
