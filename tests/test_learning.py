"""DHA end to end on tiny models: it starts at the original, spends its budget and writes what it made."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.conversion import Settings, aligned_heads, convert_heads, gather_statistics
from headfuse.course import Course
from headfuse.errors import ConfigError, PlanError, TextError
from headfuse.fusion.objective import FusionObjective, SearchObjective
from headfuse.fusion.operators import fold_heads, fuse_attention, fused_projections
from headfuse.learning.learn import learn_heads
from headfuse.learning.options import ALIGNED, PAPER, Learning, learning_for
from headfuse.planning import annealing
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from headfuse.training.objectives import LanguageModelling
from headfuse.training.options import TrainingOptions
from pico import logits_of, pico, tokens
from short_runs import HERE, Stopped, learnable_text, stopping, weights_of

LENGTH = 16
BUDGET = 2048
TRAINING = TrainingOptions(tokens=BUDGET, rows=8, length=LENGTH, rate=3e-3, update="muon", save_every=5)
SEARCHED = Learning(
    training=TRAINING,
    start="original",
    search_share=0.1,
    fusion_share=0.3,
    search_steps=8,
    fusion_steps=12,
    operator_rate=5e-2,
)
HALF = Settings(share=Fraction(1, 2), refit=None)
# Grouped queries, biases, fused projections, norms behind the projections, an odd position embedding.
MODELS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("opt", {}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {}),
    ("phi", {}),
]


@pytest.fixture(autouse=True)
def _few_swaps(monkeypatch):
    monkeypatch.setattr(annealing, "SWAPS", 100)


def opened(family="llama", **overrides) -> LoadedModel:
    model = pico(family, **overrides).requires_grad_(False)
    return LoadedModel.of(model, adapter_for(model.config))


def course(root=None, size=BUDGET + 1, **fields) -> Course:
    return Course(learnable_text(size), HERE, root, **fields)


def learn(learning, settings=HALF, loaded=None, *, where=None):
    loaded = loaded or opened()
    needed = learning.start == "converted" or learning.grouping == "closed-form"
    converted = convert_heads(loaded, tokens(4, 32), settings) if needed else None
    return learn_heads(loaded, settings, learning, where or course(), converted=converted)


def counts(learned):
    return [layer.counts for layer in learned.converted.heads]


class Seen:
    """A loss that notes the logits of the first batch and learns nothing."""

    def __init__(self) -> None:
        self.logits = None

    def __call__(self, model, batch):
        if self.logits is None:
            self.logits = logits_of(model, batch)
        return LanguageModelling()(model, batch)


@pytest.mark.parametrize(("family", "overrides"), MODELS, ids=str)
@pytest.mark.parametrize("stage", ["search", "fusion"])
def test_search_and_fusion_start_at_the_original(family, overrides, stage, monkeypatch):
    loaded, seen, batch = opened(family, **overrides), Seen(), []
    kind = {"search": SearchObjective, "fusion": FusionObjective}[stage]
    plain = kind.forward

    def noting(self, model, rows):
        if not batch:
            batch.append(rows)
            seen(model, rows)
        return plain(self, model, rows)

    monkeypatch.setattr(kind, "forward", noting)
    few = replace(SEARCHED, search_share=0.5, fusion_share=0.5, search_steps=1, fusion_steps=1)
    learn(few, loaded=loaded)
    assert_close(seen.logits, logits_of(loaded.model, batch[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "overrides"), MODELS, ids=str)
def test_a_model_whose_operators_agree_is_its_fold(family, overrides):
    loaded = opened(family, **overrides)
    groups = [HeadGroups(*(contiguous_groups(n, n // 2) for n in layer.counts)) for layer in loaded.heads]
    modules = [attention_of(layer, index) for index, layer in enumerate(loaded.heads)]
    for module, group in zip(modules, groups, strict=True):
        fuse_attention(module, group)
        for projection, members in zip(fused_projections(module), (group.keys, group.values), strict=True):
            with torch.no_grad():
                projection.operators.normal_(generator=torch.Generator().manual_seed(0))
                for each in members:
                    projection.operators[list(each)] = projection.operators[each[0]].clone()
    with attention_replaced(loaded.layers, dict(enumerate(modules))):
        unfolded = logits_of(loaded.model, tokens(2, 11))
    folded = [fold_heads(*each) for each in zip(modules, loaded.heads, groups, strict=True)]
    with loaded.with_heads(folded) as model:
        assert_close(logits_of(model, tokens(2, 11)), unfolded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("given", "wanted"), [(None, TRAINING.rate * math.sqrt(3 / 8)), (1e-3, 1e-3)])
def test_small_batches_of_the_fusion_take_smaller_steps(given, wanted):
    reports = learn(replace(SEARCHED, fusion_rate=given)).reports
    # 614 tokens in about 12 steps are 3 rows a step, where healing has 8.
    assert reports["fusion"].tokens % (3 * LENGTH) == 0
    assert max(row["rate"] for row in reports["fusion"].metrics) == pytest.approx(wanted)
    assert max(row["rate"] for row in reports["healing"].metrics) == TRAINING.rate


def test_no_batch_exceeds_the_tokens_of_its_stage():
    learned = learn(replace(SEARCHED, fusion_share=1.5 * LENGTH / BUDGET, fusion_steps=1))
    assert learned.reports["fusion"].tokens == LENGTH


ROUTES = {
    "annealed": SEARCHED,
    "printed": replace(SEARCHED, grouping="printed"),
    "cka": replace(SEARCHED, grouping="cka", search_share=0.0),
    "contiguous": replace(SEARCHED, grouping="contiguous", search_share=0.0),
    "closed-form": replace(SEARCHED, grouping="closed-form", search_share=0.0),
    "contiguous, greedy": replace(SEARCHED, grouping="contiguous", layer_budget="greedy"),
    "greedy": replace(SEARCHED, layer_budget="greedy"),
    "knapsack": replace(SEARCHED, layer_budget="knapsack"),
    "sum of terms": replace(SEARCHED, per_term_margin=False, key_extent="dimension", value_extent="scalar"),
    "no fusion": replace(SEARCHED, fusion_share=0.0),
    "distilled": replace(SEARCHED, fusion_lm_weight=0.5, lm_weight=0.25),
    "no healing": replace(SEARCHED, search_share=0.25, fusion_share=0.75),
    "adamw": replace(SEARCHED, training=replace(TRAINING, update="adamw", micro_rows=2)),
    "converted": Learning(training=TRAINING),
    "converted, fused": Learning(training=TRAINING, fusion_share=0.2, fusion_steps=8, fusion_lm_weight=0.0),
}


@pytest.mark.parametrize("name", ROUTES)
def test_every_route_gives_the_promised_heads_within_its_tokens_and_leaves_the_original(name):
    loaded, learning = opened(), ROUTES[name]
    before, layers = weights_of(loaded.model), [attention for _, attention in loaded.layers]
    learned = learn(learning, loaded=loaded)
    assert sum(sum(each) for each in counts(learned)) <= 8
    if learning.layer_budget == "uniform":
        assert counts(learned) == [(2, 2), (2, 2)]
    elif learning.layer_budget == "greedy":
        assert sum(sum(each) for each in counts(learned)) == 8
    plan = learned.converted.plan
    assert [(layer.num_key_heads, layer.num_value_heads) for layer in plan.layers] == counts(learned)
    assert [layer.key_map for layer in plan.layers] == [layer.key_map for layer in learned.converted.heads]
    spent = sum(report.tokens for report in learned.reports.values())
    assert BUDGET - 400 < spent <= BUDGET
    assert all(report.losses["loss"] == report.losses["loss"] for report in learned.reports.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.model.state_dict().items())
    assert [attention for _, attention in loaded.layers] == layers
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with learned.with_heads() as model:
        assert logits_of(model, tokens(2, 11)).isfinite().all()
    stages = {"search", "fusion", "healing"}
    stages -= {"search"} if learning.search_share == 0 else set()
    stages -= {"fusion"} if learning.fusion_share == 0 else set()
    stages -= {"healing"} if learning.search_share + learning.fusion_share == 1 else set()
    assert set(learned.reports) == stages


def test_no_stage_reads_the_text_in_the_order_of_another(monkeypatch):
    seen, plain = [], Course.train
    monkeypatch.setattr(
        Course, "train", lambda self, t, batches, *rest: seen.append(batches) or plain(self, t, batches, *rest)
    )
    learn(SEARCHED)
    first = [tuple(batches.batch(0)[0].tolist()) for batches in seen]
    assert len(first) == len(set(first)) == 3


def test_two_levels_reach_a_quarter_by_a_half():
    learned = learn(replace(SEARCHED, levels=2), replace(HALF, share=Fraction(1, 4)))
    assert counts(learned) == [(1, 1), (1, 1)]
    assert list(learned.reports) == ["search-1", "fusion-1", "search-2", "fusion-2", "healing"]
    assert sum(report.tokens for report in learned.reports.values()) <= BUDGET


def test_a_grouped_query_model_is_fused_further():
    learned = learn(SEARCHED, loaded=opened(num_key_value_heads=2))
    assert counts(learned) == [(1, 1), (1, 1)]
    assert learned.converted.plan.layers[0].key_map == (0, 0, 0, 0)


def test_fusion_takes_the_groups_of_a_conversion():
    loaded = opened()
    converted = convert_heads(loaded, tokens(4, 32), HALF)
    learned = learn_heads(loaded, HALF, ROUTES["closed-form"], course(), converted=converted)
    maps = [(layer.key_map, layer.value_map) for layer in learned.converted.heads]
    assert maps == [(layer.key_map, layer.value_map) for layer in converted.plan.layers]
    assert list(learned.reports) == ["fusion", "healing"]


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "gpt2"])
def test_aligned_heads_compute_what_the_original_does_and_are_more_alike(family):
    loaded = opened(family)
    statistics = gather_statistics(loaded, tokens(8, 32), HALF)
    groups = [HeadGroups(*(contiguous_groups(n, n // 2) for n in layer.counts)) for layer in loaded.heads]
    aligned = aligned_heads(loaded, statistics, groups)
    before = logits_of(loaded.model, tokens(2, 11))
    with loaded.with_heads(aligned) as model:
        assert_close(logits_of(model, tokens(2, 11)), before, atol=1e-4, rtol=1e-4)

    def pooled(heads):
        return sum(layer.v[:2].mean(0).norm().item() for layer in heads)

    assert pooled(aligned) > pooled(loaded.heads)


def test_fusion_of_aligned_heads_starts_at_the_original():
    loaded = opened()
    statistics = gather_statistics(loaded, tokens(8, 32), HALF)
    converted = convert_heads(loaded, tokens(4, 32), HALF, statistics=statistics)
    learning = replace(ALIGNED, training=TRAINING, fusion_steps=8)
    learned = learn_heads(loaded, HALF, learning, course(), converted=converted, statistics=statistics)
    assert learned.reports["fusion"].metrics[0]["kl"] < 1e-3
    assert counts(learned) == [(2, 2), (2, 2)]


def test_a_converted_gqa_model_stays_one():
    settings = replace(HALF, target="gqa", method="mean-pool")
    for learning in (ROUTES["converted"], ROUTES["converted, fused"]):
        learned = learn(learning, settings)
        assert learned.converted.plan.target == "gqa"
        assert all(layer.key_map == layer.value_map == (0, 0, 1, 1) for layer in learned.converted.heads)


def test_healing_brings_a_converted_model_nearer_to_the_original():
    loaded = opened()
    converted = convert_heads(loaded, tokens(4, 32), HALF)
    learned = learn_heads(loaded, HALF, ROUTES["converted"], course(), converted=converted)
    kl = [row["kl"] for row in learned.reports["healing"].metrics]
    assert sum(kl[-5:]) < 0.9 * sum(kl[:5])


def test_the_fusion_brings_the_heads_of_a_group_together():
    learning = replace(SEARCHED, search_share=0.05, fusion_share=0.95, fusion_steps=100)
    rows = learn(learning).reports["fusion"].metrics
    assert rows[0]["pair_mse"] == pytest.approx(1.0)
    assert rows[-1]["pair_mse"] < 0.1
    assert {"key_mean_pool_distance", "value_norm_ratio"} <= set(rows[-1])


@pytest.mark.parametrize("stage", ["search", "fusion", "healing"])
def test_a_conversion_that_was_stopped_in_any_stage_ends_as_if_it_had_not_been(tmp_path, stage):
    wanted = learn(SEARCHED, where=course(tmp_path / "whole"))
    stages = stopping(7, step_tokens=LENGTH, name=stage)
    with pytest.raises(Stopped):
        learn(SEARCHED, where=course(tmp_path / "run", stages=stages))
    assert (tmp_path / "run" / stage).is_dir()
    found = learn(SEARCHED, where=course(tmp_path / "run"))
    assert {name: report.metrics for name, report in found.reports.items()} == {
        name: report.metrics for name, report in wanted.reports.items()
    }
    for left, right in zip(found.converted.heads, wanted.converted.heads, strict=True):
        assert all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("q", "k", "v", "o"))


FUSED = {name: learning for name, learning in ROUTES.items() if name in ("annealed", "contiguous", "converted, fused")}


@pytest.mark.parametrize("name", FUSED)
def test_keys_that_a_norm_ties_together_are_refused_before_any_work(name, tmp_path):
    loaded = opened("olmo2")
    with pytest.raises(PlanError, match="key norm over all heads") as error:
        learn(FUSED[name], loaded=loaded, where=course(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert counts(learn(ROUTES["converted"], loaded=loaded)) == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("changed", "settings", "error", "words"),
    [
        ({}, {"target": "gqa"}, ConfigError, "wanted target dha"),
        ({}, {"budget": "adaptive"}, ConfigError, "adaptive budget"),
        ({}, {"key_heads": 2}, ConfigError, "got numbers of heads"),
        ({}, {"share": Fraction(3, 4)}, PlanError, "wanted equal groups of 4 heads, got a budget of 3"),
        ({"layer_budget": "greedy"}, {"share": Fraction(3, 100)}, PlanError, "from 4 to 16"),
        ({"layer_budget": "knapsack"}, {"share": Fraction(3, 100)}, PlanError, "raise the budget"),
        ({"search_share": 0.001}, {}, ConfigError, "at least one row of 16 tokens for the search, got 2"),
        ({"fusion_share": 0.001}, {}, ConfigError, "at least one row of 16 tokens for the fusion, got 2"),
    ],
    ids=str,
)
def test_what_the_original_start_cannot_obey_is_refused_before_any_work(tmp_path, changed, settings, error, words):
    with pytest.raises(error, match=words) as raised:
        learn(replace(SEARCHED, **changed), replace(HALF, **settings), where=course(tmp_path / "run"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_text_below_the_budget_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(TextError, match="--repeat"):
        learn(SEARCHED, where=course(tmp_path / "run", size=1000))
    assert not (tmp_path / "run").exists()
    repeating = replace(SEARCHED, training=replace(TRAINING, repeat=True))
    assert "healing" in learn(repeating, where=course(size=1000)).reports


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"search_share": 0.6, "fusion_share": 0.6}, "from 0 to 1 together, got 0.6 and 0.6"),
        ({"search_share": -0.1}, "from 0 to 1 together, got -0.1"),
        ({"search_share": 0.0}, "wanted a search .* grouping 'annealed'"),
        ({"search_share": 0.0, "grouping": "printed"}, "wanted a search .* grouping 'printed'"),
        ({"search_share": 0.0, "grouping": "contiguous", "layer_budget": "greedy"}, "wanted a search .* 'greedy'"),
        ({"search_share": 0.0, "grouping": "contiguous", "layer_budget": "knapsack"}, "wanted a search .* 'knapsack'"),
        ({"start": "converted"}, "wanted no search and one level"),
        ({"start": "converted", "search_share": 0.0, "levels": 2}, "wanted no search and one level .* 2 levels"),
        ({"levels": 0}, "wanted levels of at least one, got 0"),
        ({"fusion_steps": 0}, "wanted fusion_steps of at least one"),
        ({"lm_weight": 2.0}, "lm_weight from 0 to 1, got 2.0"),
        ({"fusion_lm_weight": -1.0}, "lm_weight from 0 to 1, got -1.0"),
    ],
    ids=str,
)
def test_stages_without_a_use_or_a_source_are_refused(changed, words):
    with pytest.raises(ConfigError, match=words) as error:
        replace(SEARCHED, **changed)
    assert "\n" not in str(error.value)


def test_the_start_decides_the_stages():
    assert learning_for("delta", TRAINING) == replace(PAPER, training=TRAINING, lm_weight=0.0)
    assert learning_for("closed-form", TRAINING) == Learning(TRAINING)
    given = learning_for("delta", TRAINING, 0.1, 0.2, 0.5)
    assert (given.search_share, given.fusion_share, given.lm_weight) == (0.1, 0.2, 0.5)
