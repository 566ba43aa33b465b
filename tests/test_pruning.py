"""Align, gate, merge on tiny models: it starts at the source, ends as stock GQA, and can be stopped anywhere."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from headfuse.checkpoints.assembly import stock_config, stock_model_state
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.conversion import Settings, convert_heads, gather_statistics, groups_of_plan
from headfuse.course import Course
from headfuse.errors import ConfigError, HeadfuseError, PlanError, TextError
from headfuse.gating.gates import CLASSICAL, OFFICIAL
from headfuse.pruning import Lesson, Pruning, check_prunable, prune_heads, source_heads
from headfuse.sharing.methods import SharingOptions
from headfuse.sharing.refit import RefitOptions
from headfuse.training import loop, optimizers
from headfuse.training.objectives import LanguageModelling
from headfuse.training.options import TrainingOptions
from pico import logits_of, pico, tokens
from short_runs import HERE, Stopped, curve, learnable_text, stopping, weights_of

ROWS, LENGTH, STEPS = 4, 16, 40
TRAINING = TrainingOptions(tokens=STEPS * ROWS * LENGTH, rows=ROWS, length=LENGTH, rate=3e-3, save_every=6)
PRUNING = Pruning(training=TRAINING)
HALF = Settings(method="procrustes", target="gqa", share=Fraction(1, 2), refit=None)


def opened(family="llama", **overrides) -> LoadedModel:
    model = pico(family, **overrides).requires_grad_(False)
    return LoadedModel.of(model, adapter_for(model.config))


def course(root=None, **fields) -> Course:
    return Course(learnable_text(STEPS * ROWS * LENGTH + 1), HERE, root, **fields)


def prune(pruning=PRUNING, settings=HALF, loaded=None, *, where=None, lesson=None):
    loaded, where = loaded or opened(), where or course()
    rows = tokens(8, 32)
    statistics = gather_statistics(loaded, rows, settings)
    converted = convert_heads(loaded, rows, settings, statistics=statistics)
    lesson = lesson or Lesson.of(where.text, pruning, loaded.model)
    return prune_heads(loaded, settings, pruning, where, lesson, converted=converted, statistics=statistics)


def metrics(learned, name):
    (report,) = learned.reports.values()
    return curve(report, name)


SETTINGS = {
    "mean-pool": replace(HALF, method="mean-pool"),
    "regroup only": replace(HALF, options=SharingOptions(align=False)),
    "align only": replace(HALF, options=SharingOptions(group_on="none")),
    "align and regroup": HALF,
    "by keys": replace(HALF, options=SharingOptions(group_on="key")),
    "by cosine": replace(HALF, options=SharingOptions(criterion="cos")),
    "norm restored": replace(HALF, options=SharingOptions(restore_norm=True)),
    "closed form": replace(HALF, method="closed-form"),
    "closed form, refitted": replace(HALF, method="closed-form", refit=RefitOptions(steps=3, rows=2, length=16)),
}
ARMS = {
    "official": PRUNING,
    "classical": replace(PRUNING, distribution="classical"),
    "lagrangian": replace(PRUNING, controller="lagrangian"),
    "textbook": replace(PRUNING, distribution="classical", controller="lagrangian"),
    "ramp": replace(PRUNING, controller="ramp"),
    "no gates": replace(PRUNING, gates=False),
    "muon": replace(PRUNING, training=replace(TRAINING, update="muon", micro_rows=2)),
    "recomputed": replace(PRUNING, training=replace(TRAINING, checkpoint_activations=True)),
    "language": replace(PRUNING, lm_weight=1.0),
}


def assert_pruned(learned, loaded, before):
    """Stock GQA of half the heads that computes what the training left, and an untouched source."""
    assert all(layer.key_map == layer.value_map == (0, 0, 1, 1) for layer in learned.converted.heads)
    config = stock_config(loaded.model.config, loaded.adapter, learned.converted.heads)
    stock = type(loaded.model)(config).eval()
    state = learned.model.model.state_dict()
    stock.load_state_dict(stock_model_state(state, loaded.adapter, learned.converted.heads))
    with learned.with_heads() as model:
        assert_close(logits_of(stock, tokens(2, 11)), logits_of(model, tokens(2, 11)), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("gates", [True, False])
def test_every_start_becomes_a_stock_model_and_leaves_the_original(name, gates):
    loaded = opened()
    before = weights_of(loaded.model)
    learned = prune(replace(PRUNING, gates=gates), SETTINGS[name], loaded)
    assert_pruned(learned, loaded, before)
    assert list(learned.reports) == ["pruning" if gates else "healing"]
    assert learned.reports[PRUNING.stage if gates else "healing"].steps == STEPS


@pytest.mark.parametrize("name", ARMS)
def test_every_way_of_closing_gates_ends_with_all_of_them_closed(name):
    loaded, pruning = opened(), ARMS[name]
    before = weights_of(loaded.model)
    learned = prune(pruning, loaded=loaded)
    assert_pruned(learned, loaded, before)
    assert all(value == value for value in metrics(learned, "loss"))
    if pruning.gates:
        off = metrics(learned, "share_off")
        assert off[0] == 0.0
        assert off[32:] == [1.0] * 8
        assert metrics(learned, "mean_gate")[0] > 0.98
        assert metrics(learned, "target")[6] == pytest.approx(0.5)
        assert metrics(learned, "penalty")[-1] == 0.0


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("mistral", {"head_dim": 16}),
        ("phi", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["align and regroup", "by cosine", "closed form, refitted"])
def test_the_first_step_is_at_the_source(family, overrides, name):
    loaded = opened(family, **overrides)
    learned = prune(settings=SETTINGS[name], loaded=loaded)
    assert metrics(learned, "kl")[0] < 1e-3
    assert metrics(learned, "kl")[33] > 1e-3


def test_regrouping_alone_pools_the_heads_of_similar_groups_as_they_are():
    loaded, rows = opened(), tokens(8, 32)
    found, aligned = (convert_heads(loaded, rows, SETTINGS[name]) for name in ("regroup only", "align and regroup"))
    assert found.plan == aligned.plan
    for layer, groups, source in zip(found.heads, groups_of_plan(found.plan, loaded.heads), loaded.heads, strict=True):
        for name, members in (("k", groups.keys), ("v", groups.values)):
            wanted = torch.stack([getattr(source, name)[list(group)].mean(0) for group in members])
            assert_close(getattr(layer, name), wanted)


def test_the_source_is_rotated_and_reordered_without_a_change_of_function():
    loaded, rows = opened(), tokens(8, 32)
    statistics = gather_statistics(loaded, rows, HALF)
    converted = convert_heads(loaded, rows, HALF, statistics=statistics)
    heads = source_heads(loaded, HALF, converted, statistics)
    assert not torch.allclose(heads[0].v, loaded.heads[0].v)
    with loaded.with_heads(heads) as model:
        found = logits_of(model, tokens(2, 11))
    assert_close(found, logits_of(loaded.model, tokens(2, 11)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_keys_behind_a_norm_are_said_not_to_be_aligned(family):
    loaded = opened(family)
    before = weights_of(loaded.model)
    with pytest.warns(UserWarning, match="values are aligned, keys are not"):
        check_prunable(loaded, HALF, PRUNING)
    learned = prune(loaded=loaded)
    assert_pruned(learned, loaded, before)
    assert metrics(learned, "kl")[0] < 1e-3
    check_prunable(loaded, SETTINGS["regroup only"], PRUNING)


def test_the_merged_heads_learn_at_twice_the_rate_and_gates_at_their_own(monkeypatch):
    seen, plain = {}, optimizers.build_optimizers

    def noting(groups, options):
        seen.update({group.name: group for group in groups})
        return plain(groups, options)

    monkeypatch.setattr(loop, "build_optimizers", noting)
    prune(replace(PRUNING, controller="lagrangian"), loaded=opened("qwen2"))
    assert seen["merged"].rate == seen["merged_biases"].rate == pytest.approx(2 * TRAINING.rate)
    assert len(seen["merged"].parameters) == len(seen["merged_biases"].parameters) == 4
    assert seen["gates"].rate == OFFICIAL.rate
    assert seen["multipliers"].ascent
    assert [name for name, group in seen.items() if group.decayed] == ["model"]
    counted = [parameter for group in seen.values() for parameter in group.parameters]
    assert len(counted) == len({id(parameter) for parameter in counted})
    prune(replace(PRUNING, gate_rate=0.5))
    assert seen["gates"].rate == 0.5


def test_training_brings_the_pruned_model_nearer_to_the_original():
    kl = metrics(prune(replace(PRUNING, gates=False)), "kl")
    assert sum(kl[-5:]) < 0.9 * sum(kl[:5])


def test_another_objective_can_be_handed_in():
    loaded, where, calls = opened(), course(), []

    def minimised(model, batch):
        calls.append(batch.shape)
        return LanguageModelling()(model, batch)

    batches = Lesson.of(where.text, PRUNING, loaded.model).batches
    learned = prune(loaded=loaded, where=where, lesson=Lesson(minimised, batches))
    assert len(calls) == STEPS
    assert "kl" not in learned.reports["pruning"].losses
    assert {"lm", "sparsity", "share_off"} <= set(learned.reports["pruning"].losses)


@pytest.mark.parametrize("name", ["official", "textbook", "ramp", "no gates"])
@pytest.mark.parametrize("after", [8, 35])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, name, after):
    pruning = ARMS[name]
    wanted = prune(pruning, where=course(tmp_path / "whole"))
    with pytest.raises(Stopped):
        prune(pruning, where=course(tmp_path / "run", stages=stopping(after)))
    found = prune(pruning, where=course(tmp_path / "run"))
    assert found.reports[pruning.stage].metrics == wanted.reports[pruning.stage].metrics
    for left, right in zip(found.converted.heads, wanted.converted.heads, strict=True):
        assert all(torch.equal(getattr(left, part), getattr(right, part)) for part in ("q", "k", "v", "o"))


@pytest.mark.parametrize(
    ("changed", "settings", "error", "words"),
    [
        ({}, {"target": "dha"}, ConfigError, "wanted target gqa"),
        ({}, {"key_heads": 3, "value_heads": 3}, PlanError, "reachable budgets"),
        ({}, {"key_heads": 2, "value_heads": 1}, PlanError, "as many key heads as value heads"),
        ({}, {"budget": "adaptive"}, PlanError, "its budget is uniform"),
        ({"training": replace(TRAINING, length=200)}, {}, ConfigError, "128 positions"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_refused(changed, settings, error, words):
    with pytest.raises(error, match=words) as raised:
        check_prunable(opened(), replace(HALF, **settings), replace(PRUNING, **changed))
    assert "\n" not in str(raised.value)


def test_a_family_whose_stock_class_has_no_grouped_queries_is_refused():
    with pytest.raises(PlanError, match="no grouped-query attention"):
        check_prunable(opened("gpt2"), HALF, PRUNING)


def test_a_text_below_the_budget_is_refused_with_what_to_do():
    with pytest.raises(TextError, match="--repeat"):
        Lesson.of(learnable_text(1000), PRUNING, pico("llama"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"distribution": "concrete"}, "official, classical"),
        ({"controller": "none"}, "projection, lagrangian, ramp"),
        ({"warmup": 0.9}, "warmup <= hard"),
        ({"hard": 1.5}, "got 0.3 and 1.5"),
        ({"gate_rate": 0.0}, "gate_rate above zero"),
        ({"merged_rate": -1.0}, "merged_rate above zero"),
        ({"lm_weight": 2.0}, "lm_weight from 0 to 1"),
    ],
    ids=str,
)
def test_impossible_options_are_one_line(changed, words):
    with pytest.raises(HeadfuseError, match=words) as error:
        replace(PRUNING, **changed)
    assert "\n" not in str(error.value)


def test_distributions_bring_their_own_rate():
    assert (OFFICIAL.rate, CLASSICAL.rate) == (pytest.approx(0.03), 1.0)
