"""The model card: what people should know of a converted model, in the format of the Hugging Face Hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from headfuse.checkpoints.source import Source


@dataclass(frozen=True)
class ModelCard:
    """The facts of a card. Bytes are per token of context over all layers; `evaluation` maps a metric to its value."""

    base_model: str
    on_hub: bool
    licence: str | None
    method: str
    target: str
    kv_bytes_before: int
    kv_bytes_after: int
    evaluation: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def for_source(cls, source: Source, *, method: str, target: str, kv_bytes: tuple[int, int]) -> "ModelCard":
        """The card of a conversion of `source`; `kv_bytes` are the bytes per token before and after."""
        licence = base_licence(source.folder)
        return cls(source.public_name, source.kind == "hub", licence, method, target, *kv_bytes)

    def render(self) -> str:
        """The card as Markdown with its YAML head."""
        return f"---\n{self._head()}---\n\n{self._body()}"

    def save(self, path: Path) -> None:
        """Write the card."""
        path.write_text(self.render(), encoding="utf-8")

    def _head(self) -> str:
        head: dict[str, object] = {"library_name": "transformers", "tags": ["headfuse", "kv-cache", self.target]}
        if self.on_hub:
            head |= {"base_model": self.base_model, "base_model_relation": "finetune"}
        if self.licence:
            head["license"] = self.licence
        return yaml.safe_dump(head, sort_keys=False)

    def _body(self) -> str:
        ratio = self.kv_bytes_after / self.kv_bytes_before
        rows = [
            ("base model", self.base_model),
            ("method", self.method),
            ("target", self.target),
            ("KV cache before", f"{self.kv_bytes_before:,} bytes per token"),
            ("KV cache after", f"{self.kv_bytes_after:,} bytes per token ({ratio:.1%})"),
            ("licence of the base model", self.licence or "unknown: see the base model"),
        ]
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        text = (
            f"# {self.base_model.rpartition('/')[2]}, fewer KV heads\n\n"
            f"`{self.base_model}` converted by headfuse to read fewer key and "
            f"value heads: a smaller cache, the same query heads.\n\n| | |\n|---|---|\n{table}\n\n"
            "`headfuse/plan.json` says which head each query head of the base model reads, `headfuse/manifest.json` "
            "how this was made.\n"
        )
        if self.evaluation:
            metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in self.evaluation.items())
            text += f"\n## Evaluation\n\n| metric | value |\n|---|---|\n{metrics}\n"
        if self.target == "dha":
            text += (
                "\n## Use\n\nLoad with `trust_remote_code=True`, or import `headfuse.models.dha` first: "
                "layers have their own numbers of key and value heads.\n"
            )
        return text


def healed_card(card: str, *, tokens: int, teacher: str | None) -> str:
    """A rendered card with the line that the model was trained after its conversion; `teacher` by its public name."""
    against = "the next token alone" if teacher is None else f"the predictions of `{teacher}`"
    return f"{card.rstrip()}\n\nHealed: all weights were then trained on {tokens:,} tokens towards {against}.\n"


def base_licence(folder: Path) -> str | None:
    """The licence of a model folder: `license` in the head of its README.md, else what LICENSE begins with."""
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        if text.startswith("---\n") and "\n---" in text[4:]:
            try:
                head = yaml.safe_load(text[4:].split("\n---", 1)[0])
            except yaml.YAMLError:
                head = None
            if isinstance(head, dict) and isinstance(head.get("license"), str):
                return head["license"]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        if (folder / name).is_file():
            start = (folder / name).read_text(encoding="utf-8", errors="replace")[:500]
            return next((short for words, short in KNOWN_LICENCES.items() if words in " ".join(start.split())), None)
    return None


# The Hub's short names by words at the start of the licence.
KNOWN_LICENCES = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit", "BSD 3-Clause": "bsd-3-clause"}
