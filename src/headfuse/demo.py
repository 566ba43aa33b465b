"""`headfuse demo`: the model that ships with the package, converted by every method, before and after side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from headfuse.calibration import Calibration
from headfuse.checkpoints.loading import ROW_LENGTH, load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.comparison import Case, Comparison, Result
from headfuse.conversion import Settings
from headfuse.errors import CheckpointError
from headfuse.evaluation.generation import generate_text
from headfuse.placement import Placement
from headfuse.progress import Stages, silent
from headfuse.sharing.refit import RefitOptions
from headfuse.text.builtin import Part
from headfuse.text.rows import load_tokens

MODEL, KV = "demo", "25%"
PROMPT = "The function returns a new"
SAMPLE_TOKENS = 30
EVALUATION_TOKENS = 32768
# What every layer of the embedded model chooses: trying others would take as long as all the rest.
REFIT = RefitOptions(rates=(0.05,))
CASES: Sequence[Settings] = (
    Settings("mean-pool", "gqa", refit=None),
    Settings("procrustes", "gqa", refit=None),
    Settings("closed-form", "gqa", refit=None),
    Settings("closed-form", "dha", refit=None),
    Settings("closed-form", "dha", refit=REFIT),
)


@dataclass(frozen=True)
class Demonstration:
    """The table, and what the model writes before and after the last conversion of it."""

    kv_bytes_before: int
    rows: list[Result]
    prompt: str
    before: str
    after: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": MODEL,
            "kv_bytes_per_token": self.kv_bytes_before,
            "rows": [row.as_dict() for row in self.rows],
            "prompt": self.prompt,
            "before": self.before,
            "after": self.after,
        }


def demonstrate(*, seed: int = 0, placement: Placement | None = None, stages: Stages = silent) -> Demonstration:
    """Convert the demo model by every method, in memory, and let the last result write a sentence."""
    device, precision = (placement or Placement()).resolve()
    source = locate(MODEL)
    model, reference = (load_model(source, device=device) for _ in range(2))
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(f"{source.folder}: wanted the demo's tokenizer, it is gone; reinstall headfuse")

    def write(judged: PreTrainedModel) -> dict[str, Any]:
        return {"sample": generate_text(judged, tokenizer, PROMPT, max_new_tokens=SAMPLE_TOKENS)}

    loaded = LoadedModel.of(model, adapter_for(model.config))
    calibration = Calibration()
    parts: tuple[tuple[int, Part], ...] = ((calibration.tokens, "calibration"), (EVALUATION_TOKENS, "evaluation"))
    texts = [
        load_tokens(None, tokenizer, num_tokens=tokens, length=ROW_LENGTH, seed=seed, part=part)
        for tokens, part in parts
    ]
    comparison = Comparison(MODEL, loaded, reference, texts[0].tokens, texts[1], write)
    cases = [Case(KV, replace(settings, seed=seed, precision=precision)) for settings in CASES]
    rows = list(comparison.run(cases, stages=stages))
    kv_bytes = loaded.kv_bytes_per_token()
    return Demonstration(kv_bytes, rows, PROMPT, write(reference)["sample"], rows[-1].tasks["sample"])
