"""How DHA's stages spend a budget of tokens: the paper's way, ours, and what suits a start."""

from dataclasses import dataclass, field, replace
from typing import Literal

from headfuse.conversion import Settings
from headfuse.errors import ConfigError
from headfuse.fusion.operators import Extent
from headfuse.training.objectives import check_lm_weight
from headfuse.training.options import TrainingOptions

Start = Literal["original", "converted"]
Grouping = Literal["annealed", "printed", "cka", "contiguous", "closed-form"]
LayerBudget = Literal["uniform", "greedy", "knapsack"]

# Tokens in a row of the search, which moves operators alone: it needs many steps rather than long contexts.
SEARCH_LENGTH = 128


@dataclass(frozen=True)
class Learning:
    """How DHA's stages spend a budget of tokens. Shares are of all tokens; healing gets what they leave.

    `training` holds for fusion and healing; its `tokens` are the whole budget. `lm_weight` is the share of
    language-model loss in healing, the rest distils from the original; the search and the fusion see the
    language-model loss alone, as in the paper, unless `fusion_lm_weight` says otherwise. Both want many small steps
    (an operator has to travel from 1 to 1 / g at `operator_rate` a step), so their batches follow from their numbers
    of steps: the paper's, for the 1000 steps in which it spends 0.2B tokens. Where those batches are smaller than the
    healing's the weights' rate goes down in the fusion with the square root of their size, unless `fusion_rate` is
    given; the paper has one rate for both (batches of 64 and 256 rows). `grouping` "closed-form" fuses the
    original heads in the groups that a conversion chose by their prices, without a search; there the heads of a group
    are first rotated onto each other, which leaves the function as it is.
    """

    training: TrainingOptions = field(default_factory=TrainingOptions)
    start: Start = "converted"
    search_share: float = 0.0
    fusion_share: float = 0.0
    lm_weight: float = 0.0
    fusion_lm_weight: float = 1.0
    grouping: Grouping = "annealed"
    layer_budget: LayerBudget = "uniform"
    key_extent: Extent = "tied"
    value_extent: Extent = "dimension"
    fusion_rate: float | None = None
    operator_rate: float = 1e-2
    multiplier_rate: float = 1e-2
    search_steps: int = 240
    fusion_steps: int = 760
    margin_warmup: float = 0.7
    margin_decay: float = 0.25
    per_term_margin: bool = True
    levels: int = 1

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing, a search without a use, and a use of distances without a search."""
        check_lm_weight(self.lm_weight)
        check_lm_weight(self.fusion_lm_weight)
        shares = (self.search_share, self.fusion_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                f"wanted shares of search and fusion from 0 to 1 together, got {self.search_share:g} and "
                f"{self.fusion_share:g}; choose others"
            )
        for name in ("search_steps", "fusion_steps", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"wanted {name} of at least one, got {getattr(self, name)}; choose a larger one")
        if self.start == "converted" and (self.search_share or self.levels > 1):
            raise ConfigError(
                f"wanted no search and one level from converted heads, whose groups are chosen, got a search share of "
                f"{self.search_share:g} and {self.levels} levels; start from the original heads for those"
            )
        if self.grouping == "closed-form" and (self.levels > 1 or self.layer_budget != "uniform"):
            raise ConfigError(
                f"wanted one level and the conversion's own budget with its groups, got {self.levels} levels and layer "
                f"budget {self.layer_budget!r}; leave them out"
            )
        if self.start == "original" and self.searches and not self.search_share:
            raise ConfigError(
                f"wanted a search for the distances that grouping {self.grouping!r} and layer budget "
                f"{self.layer_budget!r} go by, got a search share of 0; give it a share of the tokens"
            )

    @property
    def searches(self) -> bool:
        """Whether the groups of the start "original" go by distances that only a search measures."""
        if self.grouping in ("cka", "closed-form"):
            return False
        return self.grouping != "contiguous" or self.layer_budget != "uniform"

    @property
    def search_tokens(self) -> int:
        """Tokens of the search of one level."""
        return int(self.search_share * self.training.tokens / self.levels)

    @property
    def search_length(self) -> int:
        """Tokens in a row of the search."""
        return min(SEARCH_LENGTH, self.training.length)

    @property
    def fusion_tokens(self) -> int:
        """Tokens of the fusion of one level."""
        return int(self.fusion_share * self.training.tokens / self.levels)


# The paper's own settings. It says neither the share of the stages in a small budget (0.2B of up to 5B tokens) nor
# the margin's decay; docs/dha.md has what was chosen and LOG.md why.
PAPER = Learning(
    start="original",
    search_share=0.024,
    fusion_share=0.076,
    lm_weight=1.0,
    layer_budget="greedy",
    key_extent="tied",
)


# Ours: heads of the closed form's groups are aligned before they are fused, and the fusion distils too.
ALIGNED = Learning(start="original", grouping="closed-form", fusion_share=0.25, fusion_lm_weight=0.0)
# Names of the stages that fuse the original heads; any other start is a sharing method's.
FUSED_STARTS = {"delta": PAPER, "aligned": ALIGNED}
FUSED_RATES = {"delta": 1e-3, "aligned": 6e-4}


def rate_for(settings: Settings, *, fused: str | None = None) -> float:
    """The peak learning rate of the weights that did best on the 30M reference (LOG.md).

    `fused` is the start of a fusion of original heads, if one comes. The further from the original the training
    starts, or what is fused ends, the larger it is.
    """
    if fused is not None:
        return FUSED_RATES[fused]
    if settings.refit is not None:
        return TrainingOptions.rate
    return {"mean-pool": 1e-3, "procrustes": 5e-4}.get(settings.method, 3e-4)


def learning_for(
    init: str,
    training: TrainingOptions,
    search_share: float | None = None,
    fusion_share: float | None = None,
    lm_weight: float = 0.0,
) -> Learning:
    """The stages that suit a start.

    "delta": the paper's; "aligned": fusion of aligned heads; a sharing method's name: healing of what it makes.
    """
    suited = FUSED_STARTS.get(init, Learning())
    return replace(
        suited,
        training=training,
        search_share=suited.search_share if search_share is None else search_share,
        fusion_share=suited.fusion_share if fusion_share is None else fusion_share,
        lm_weight=lm_weight,
    )
