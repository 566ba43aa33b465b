"""What `headfuse inspect` tells of a model: its attention, what its cache costs, which conversions apply and why not.

Read from config.json and the headers of the weight files, so a 70B model takes no longer than a small one.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, computed_field

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.headers import OUTPUT_EMBEDDINGS, Headers, is_buffer, read_headers
from headfuse.checkpoints.loading import load_config, positions_of
from headfuse.checkpoints.registry import ADAPTERS, adapter_for
from headfuse.checkpoints.source import Source
from headfuse.checkpoints.validation import check_layers
from headfuse.errors import UnsupportedArchitectureError
from headfuse.models.dha.decoupled_attention import AttentionShape

# Those that share heads without training (`sharing.methods` has them by these names), and those that train.
SharingName = Literal["mean-pool", "procrustes", "closed-form"]
Method = Literal[SharingName, "dha", "align"]
Target = Literal["gqa", "dha"]
SHARING: tuple[SharingName, ...] = get_args(SharingName)
METHODS: tuple[Method, ...] = get_args(Method)
TARGETS: tuple[Target, ...] = get_args(Target)
PERCENTS = (50.0, 25.0, 12.5)
KV_BYTES_PER_ELEMENT = 2  # bf16 or fp16


class Fact(BaseModel):
    """Base of what follows: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Rope(Fact):
    """How positions enter: `channels` of each head are rotated; `scaling` is transformers' rope_type if not plain."""

    kind: Literal["full", "partial", "none"]
    channels: int
    theta: float | None = None
    scaling: str | None = None
    factor: float | None = None


class CacheSize(Fact):
    """The cache at a share of the model's own: mean heads per layer, bytes per token (None: below one head a layer).

    `gqa_heads` is the head count of a stock checkpoint of this size, None where no stock checkpoint has it.
    """

    percent: float
    heads_per_layer: float
    bytes_per_token: int | None
    gqa_heads: int | None


class Applicability(Fact):
    """Whether a method can produce a target; `note` says why not, or what is lost where it does."""

    method: Method
    target: Target
    applies: bool
    note: str | None = None


class Description(Fact):
    """One model. `key_heads` and `value_heads` have one entry a layer; sizes are in bytes."""

    model: str
    family: str
    layers: int
    hidden_size: int
    query_heads: int
    head_dim: int
    key_heads: tuple[int, ...]
    value_heads: tuple[int, ...]
    rope: Rope
    biases: tuple[str, ...]
    qk_norm: str
    clip: float | None
    context: int | None
    parameters: int
    dtype: str
    weight_bytes: int
    kv_bytes_per_element: int
    cache: tuple[CacheSize, ...]
    methods: tuple[Applicability, ...]

    @computed_field
    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the model's own cache holds for one token."""
        return (sum(self.key_heads) + sum(self.value_heads)) * self.head_dim * self.kv_bytes_per_element


def describe(source: Source) -> Description:
    """Describe a model without loading a weight; the cache is counted in bf16 or fp16.

    A family feature that rules conversions out (sliding windows, say) is described, with the reason in `methods`.
    Raises CheckpointError for an unsound folder, UnsupportedArchitectureError for a family without adapter.
    """
    config = load_config(source.folder)
    adapter, refusal = _adapter(config)
    headers = read_headers(source.folder, allow_pickle=source.allow_pickle)
    if refusal is None:
        check_layers(source.folder, headers, adapter, config)
    shapes = [adapter.shape(config, layer) for layer in range(config.num_hidden_layers)]
    first = shapes[0]
    weights = {name: h for name, h in headers.items() if not is_buffer(name) and not _is_copy(name, config)}
    return Description(
        model=source.name,
        family=config.model_type,
        layers=len(shapes),
        hidden_size=first.hidden_size,
        query_heads=first.num_query_heads,
        head_dim=first.head_dim,
        key_heads=tuple(shape.num_key_heads for shape in shapes),
        value_heads=tuple(shape.num_value_heads for shape in shapes),
        rope=_rope(config, first),
        biases=("q", "k", "v") * first.input_bias + ("o",) * first.output_bias,
        qk_norm=first.qk_norm,
        clip=first.clip,
        context=positions_of(config),
        parameters=sum(_count(header.shape) for header in weights.values()),
        dtype=_dtype(weights),
        weight_bytes=sum(header.num_bytes for header in weights.values()),
        kv_bytes_per_element=KV_BYTES_PER_ELEMENT,
        cache=tuple(_cache(shapes, adapter, percent) for percent in (100.0, *PERCENTS)),
        methods=tuple(_applicability(m, t, adapter, shapes, refusal) for m in METHODS for t in TARGETS),
    )


def _adapter(config: Any) -> tuple[Adapter, str | None]:
    """The family's adapter, and why it would refuse to convert this model if it would.

    Converted models have the shapes of their family, so they can be described too.
    """
    try:
        return adapter_for(config), None
    except UnsupportedArchitectureError as error:
        family = config.model_type.removeprefix("dha_")
        if family not in ADAPTERS:
            raise
        return ADAPTERS[family], "decoupled heads already" if family != config.model_type else str(error)


def _rope(config: Any, shape: AttentionShape) -> Rope:
    if not shape.rotary_dim:
        return Rope(kind="none", channels=0)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    return Rope(
        kind="full" if shape.rotary_dim == shape.head_dim else "partial",
        channels=shape.rotary_dim,
        theta=parameters.get("rope_theta"),
        scaling=None if kind == "default" else kind,
        factor=parameters.get("factor"),
    )


def _cache(shapes: Sequence[AttentionShape], adapter: Adapter, percent: float) -> CacheSize:
    own = sum(shape.num_key_heads + shape.num_value_heads for shape in shapes)
    cached = int(own * percent / 100)
    heads = own * percent / 100 / (2 * len(shapes))
    fits = heads == int(heads) and heads > 0 and shapes[0].num_query_heads % int(heads) == 0
    stock = adapter.stock_gqa or int(heads) == shapes[0].num_query_heads
    return CacheSize(
        percent=percent,
        heads_per_layer=round(heads, 3),
        bytes_per_token=cached * shapes[0].head_dim * KV_BYTES_PER_ELEMENT if heads >= 1 else None,
        gqa_heads=int(heads) if fits and stock else None,
    )


def _applicability(
    method: Method, target: Target, adapter: Adapter, shapes: Sequence[AttentionShape], refusal: str | None
) -> Applicability:
    obstacle = refusal or _obstacle(method, target, adapter, shapes)
    if obstacle:
        return Applicability(method=method, target=target, applies=False, note=obstacle)
    return Applicability(method=method, target=target, applies=True, note=_caveat(method, adapter, shapes[0]))


def _obstacle(method: Method, target: Target, adapter: Adapter, shapes: Sequence[AttentionShape]) -> str | None:
    if all(shape.num_key_heads == shape.num_value_heads == 1 for shape in shapes):
        return "one key and one value head in every layer already: nothing to share"
    if target == "gqa" and not adapter.stock_gqa:
        return f"transformers' {adapter.family} class has one key/value head per query head; use --target dha"
    if method == "align" and target == "dha":
        return "it ends as a stock checkpoint; use --target gqa"
    return None


def _caveat(method: Method, adapter: Adapter, shape: AttentionShape) -> str | None:
    """What the model's attention takes from a method that otherwise applies."""
    notes = []
    if shape.qk_norm != "none" and method != "mean-pool":
        notes.append(
            "queries and keys are normalised after their projection, so keys are not aligned: one is chosen or they "
            "are pooled, then refitted; values are treated in full"
        )
    if shape.clip is not None and method != "mean-pool":
        notes.append(
            "the projections' outputs are clipped, which a folded transform moves: approximate where clipping bites"
        )
    if method == "dha" and shape.qk_norm == "all":
        notes.append("no fusion (--init delta, --fusion-share): keys behind a norm over all heads do not fold")
    if not adapter.adds_to_stream and method in ("closed-form", "dha"):
        notes.append("a norm follows the attention, so the error that is minimised is the one before that norm")
    return "; ".join(notes) or None


def _is_copy(name: str, config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False)) and name in OUTPUT_EMBEDDINGS


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _dtype(weights: Headers) -> str:
    """The type of most of the weights, by bytes."""
    sizes: dict[str, int] = {}
    for header in weights.values():
        name = str(header.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + header.num_bytes
    return max(sizes, key=lambda name: sizes[name])
