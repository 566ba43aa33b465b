"""The head plan: which key head and which value head each query head reads, in every layer, and what that costs."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headfuse.errors import PlanError

HeadMap = Annotated[tuple[int, ...], Field(min_length=1)]
Target = Literal["gqa", "dha"]


class LayerPlan(BaseModel):
    """One layer: query head `h` reads key head `key_map[h]` and value head `value_map[h]`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    key_map: HeadMap
    value_map: HeadMap

    @model_validator(mode="after")
    def _check(self) -> "LayerPlan":
        if len(self.key_map) != len(self.value_map):
            raise ValueError(f"key_map has {len(self.key_map)} query heads, value_map {len(self.value_map)}")
        for name, head_map in (("key_map", self.key_map), ("value_map", self.value_map)):
            if set(head_map) != set(range(max(head_map) + 1)):
                raise ValueError(f"{name} must use every head 0..n-1, got {head_map}")
        return self

    @property
    def num_key_heads(self) -> int:
        """Key heads of the layer."""
        return max(self.key_map) + 1

    @property
    def num_value_heads(self) -> int:
        """Value heads of the layer."""
        return max(self.value_map) + 1


class HeadPlan(BaseModel):
    """A whole model's plan; a small JSON that `convert --plan` reads back."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    version: Literal[1] = 1
    target: Target
    head_dim: Annotated[int, Field(gt=0)]
    layers: Annotated[tuple[LayerPlan, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "HeadPlan":
        if len({len(layer.key_map) for layer in self.layers}) != 1:
            raise ValueError("every layer must have the same number of query heads")
        if self.target == "gqa":
            counts = {n for layer in self.layers for n in (layer.num_key_heads, layer.num_value_heads)}
            if len(counts) != 1 or any(layer.key_map != layer.value_map for layer in self.layers):
                raise ValueError("target gqa needs one map for keys and values and one head count in all layers")
            sizes = {layer.key_map.count(g) for layer in self.layers for g in range(layer.num_key_heads)}
            if len(sizes) != 1:
                raise ValueError(f"target gqa needs groups of one size, got sizes {sorted(sizes)}")
        return self

    @property
    def num_query_heads(self) -> int:
        """Query heads of every layer."""
        return len(self.layers[0].key_map)

    def cached_heads(self) -> int:
        """Key heads plus value heads over all layers."""
        return sum(layer.num_key_heads + layer.num_value_heads for layer in self.layers)

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that the cache holds for one token: exactly what generation allocates."""
        return self.cached_heads() * self.head_dim * bytes_per_element

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "HeadPlan":
        """Read a plan; PlanError names the file and the first thing wrong with it."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: wanted a head plan, got {error}; give the plan.json of a conversion") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise PlanError(f"{path}: {where}: {first['msg']}; give the plan.json of a conversion") from error
