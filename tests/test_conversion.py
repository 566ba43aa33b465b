"""Conversion in memory, on tiny models of every family: exact where it can be, on budget, repeatable."""

from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from headfuse import conversion
from headfuse.checkpoints.assembly import decoupled_model_state, stock_config, stock_model_state
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.conversion import PROBE_ROWS, Settings, check_reachable, convert_heads, gather_statistics
from headfuse.errors import ConfigError, PlanError
from headfuse.evaluation.cache_bytes import measured_cache_bytes
from headfuse.planning.grouping import HeadGroups
from headfuse.planning.plan import HeadPlan
from headfuse.sharing.methods import METHODS, SharingOptions
from headfuse.sharing.refit import RefitOptions
from headfuse.sharing.sensitivity import unit_costs
from pico import FAMILIES, NO_STOCK_GQA, case_name, every_case, every_family, logits_of, pico, tokens
from strategies import with_copies

ROWS = tokens(8, 12)
QUICK = RefitOptions(steps=2, rows=2, length=12, segment=6)
HALF, QUARTER = Fraction(1, 2), Fraction(1, 4)


def opened(model) -> LoadedModel:
    return LoadedModel.of(model, adapter_for(model.config))


def settings(method="closed-form", target="dha", share=HALF, **others) -> Settings:
    return Settings(**({"method": method, "target": target, "share": share, "refit": None} | others))


def targets(loaded: LoadedModel) -> tuple[str, ...]:
    return ("dha", "gqa") if loaded.adapter.stock_gqa else ("dha",)


def difference(loaded: LoadedModel, converted, wanted: torch.Tensor) -> float:
    with loaded.with_heads(converted.heads) as model:
        return (logits_of(model, ROWS[:2]) - wanted).abs().max().item()


def equal_heads(first, second) -> bool:
    return all(
        torch.equal(tensor, getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name, tensor in vars(a).items()
        if isinstance(tensor, torch.Tensor)
    )


@every_case
def test_a_full_budget_keeps_the_logits(family, overrides):
    loaded = opened(pico(family, **overrides))
    wanted = logits_of(loaded.model, ROWS[:2])
    statistics = gather_statistics(loaded, ROWS, settings())
    for target in targets(loaded):
        for method in METHODS:
            asked = settings(method, target, Fraction(1), refit=QUICK)
            converted = convert_heads(loaded, ROWS, asked, statistics=statistics)
            assert difference(loaded, converted, wanted) <= 1e-4
            assert equal_heads(converted.heads, loaded.heads)
            assert not converted.refits


@every_case
def test_the_cache_is_as_small_as_promised(family, overrides):
    loaded = opened(pico(family, **overrides))
    source = measured_cache_bytes(loaded.model)
    statistics = gather_statistics(loaded, ROWS, settings())
    heads = loaded.heads[0].num_key_heads
    for target in targets(loaded):
        for share in (share for share in (HALF, QUARTER) if share * heads >= 1):
            converted = convert_heads(loaded, ROWS, settings(target=target, share=share), statistics=statistics)
            assert converted.plan.target == target
            assert converted.plan.kv_bytes_per_token(4) == share * source
            with loaded.with_heads(converted.heads) as model:
                assert logits_of(model, ROWS).isfinite().all()
                assert measured_cache_bytes(model) == share * source


@every_family
def test_both_targets_can_be_assembled(family):
    loaded = opened(pico(family))
    for target in targets(loaded):
        converted = convert_heads(loaded, ROWS, settings(target=target))
        if target == "gqa":
            state = stock_model_state(loaded.model.state_dict(), loaded.adapter, converted.heads)
            model = type(loaded.model)(stock_config(loaded.model.config, loaded.adapter, converted.heads)).eval()
            model.load_state_dict(state)
            with loaded.with_heads(converted.heads) as reference:
                torch.testing.assert_close(logits_of(model, ROWS), logits_of(reference, ROWS), atol=1e-4, rtol=0)
        else:
            assert decoupled_model_state(loaded.model.state_dict(), loaded.adapter, converted.heads)


@contextmanager
def duplicated(family):
    """A multi-head model whose heads 0 and 2, 1 and 3 are copies of each other."""
    model = pico(family, **({"clip_qkv": None} if family == "olmo" else {}))
    adapter = adapter_for(model.config)
    pairs = ((0, 2), (1, 3))
    copies = [with_copies(heads, HeadGroups(pairs, pairs)) for heads in LoadedModel.of(model, adapter).heads]
    model.load_state_dict(stock_model_state(model.state_dict(), adapter, copies))
    yield opened(model)


@every_family
@pytest.mark.parametrize("method", ["procrustes", "closed-form"])
def test_duplicated_heads_are_merged_without_loss(family, method):
    with duplicated(family) as loaded:
        wanted = logits_of(loaded.model, ROWS[:2])
        for target in targets(loaded):
            converted = convert_heads(loaded, ROWS, settings(method, target))
            assert [(h.num_key_heads, h.num_value_heads) for h in converted.heads] == [(2, 2)] * 2
            assert difference(loaded, converted, wanted) <= 1e-4


@every_family
def test_a_refit_lowers_the_error_of_every_layer_that_shares(family):
    loaded = opened(pico(family))
    converted = convert_heads(loaded, ROWS, settings(refit=QUICK))
    assert [report.layer for report in converted.refits] == [0, 1]
    assert all(report.after <= report.before for report in converted.refits)
    assert set(converted.seconds) == {"statistics", "plan", "share", "refit"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["dha", "gqa"])
def test_the_model_stays_as_it_was(method, target):
    loaded = opened(pico("llama"))
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    wanted = logits_of(loaded.model, ROWS)
    convert_heads(loaded, ROWS, settings(method, target, refit=QUICK))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    assert state.keys() == loaded.model.state_dict().keys()
    assert torch.equal(logits_of(loaded.model, ROWS), wanted)


@pytest.mark.parametrize(
    ("counts", "expected"), [((1, None), (1, 4)), ((None, 3), (4, 3)), ((2, 1), (2, 1)), ((4, 4), (4, 4))]
)
def test_key_and_value_heads_can_be_named(counts, expected):
    loaded = opened(pico("llama"))
    converted = convert_heads(loaded, ROWS, settings(key_heads=counts[0], value_heads=counts[1]))
    assert [(h.num_key_heads, h.num_value_heads) for h in converted.heads] == [expected] * 2


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"method": "svd"}, ConfigError, "mean-pool, procrustes, closed-form"),
        ({"target": "mqa"}, ConfigError, "wanted a target, got 'mqa'; choose one of gqa, dha"),
        ({"budget": "greedy"}, ConfigError, "wanted a budget, got 'greedy'; choose one of uniform, adaptive"),
        ({"seed": 2**63}, ConfigError, "wanted a seed"),
        ({"share": 2.0}, PlanError, "at most 1, got 2.0"),
        ({"share": "150%"}, PlanError, "at most 100%"),
        ({"share": None}, PlanError, "wanted a share above 0 and at most 1, got None"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused_where_they_are_written(others, error, message):
    with pytest.raises(error, match=message):
        Settings(**others)


@pytest.mark.parametrize("share", ["30%", 0.3, Fraction(3, 10)])
def test_a_share_may_be_a_number_or_text(share):
    assert replace(Settings(share=share), seed=1).share == Fraction(3, 10)


@pytest.mark.parametrize("heads", [{"key_heads": 2}, {"key_heads": 2, "value_heads": 2}])
def test_an_adaptive_budget_spreads_a_share_and_no_numbers_of_heads(heads):
    with pytest.raises(PlanError, match="numbers of heads"):
        check_reachable(opened(pico("llama")), settings(budget="adaptive", **heads))


def test_named_heads_override_the_share():
    loaded = opened(pico("llama"))
    check_reachable(loaded, settings(share=Fraction(1, 100), key_heads=1))
    converted = convert_heads(loaded, ROWS, settings(target="gqa", share=Fraction(1, 3), key_heads=2, value_heads=2))
    assert [(h.num_key_heads, h.num_value_heads) for h in converted.heads] == [(2, 2)] * 2


@pytest.mark.parametrize("others", [{"key_heads": 0}, {"value_heads": 0}, {"key_heads": 5}, {"value_heads": -1}])
def test_heads_that_the_model_cannot_have_are_refused(others):
    with pytest.raises(PlanError, match="ask for 1 up to"):
        check_reachable(opened(pico("llama")), settings(**others))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"share": Fraction(3, 4)}, "reachable budgets"),
        ({"share": Fraction(1, 8)}, "reachable budgets"),
        ({"key_heads": 2}, "as many key heads as value heads"),
        ({"key_heads": 3, "value_heads": 3}, "reachable budgets"),
        ({"budget": "adaptive"}, "uniform"),
    ],
    ids=str,
)
def test_what_gqa_cannot_be_is_refused(others, message):
    with pytest.raises(PlanError, match=message):
        check_reachable(opened(pico("llama")), settings(target="gqa", **others))


@pytest.mark.parametrize("family", NO_STOCK_GQA)
def test_families_without_grouped_queries_refuse_gqa(family):
    with pytest.raises(PlanError, match="--target dha"):
        check_reachable(opened(pico(family)), settings(target="gqa"))


def test_less_than_one_head_is_refused():
    with pytest.raises(PlanError, match="smallest budget is 25%"):
        check_reachable(opened(pico("llama")), settings(share=Fraction(1, 5)))


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="closed-form"):
        convert_heads(opened(pico("llama")), ROWS, settings("svd"))


@pytest.mark.parametrize("method", ["closed-form", "procrustes"])
@pytest.mark.parametrize("share", [Fraction(3, 8), HALF, Fraction(15, 16), Fraction(1)])
def test_an_adaptive_budget_spends_its_heads(method, share):
    loaded = opened(pico("llama"))
    converted = convert_heads(loaded, ROWS, settings(method, share=share, budget="adaptive"))
    assert converted.plan.cached_heads() == share * 16


def test_an_adaptive_budget_by_cosine_spends_its_heads():
    loaded = opened(pico("llama"))
    asked = settings("procrustes", budget="adaptive", options=SharingOptions(criterion="cos"))
    assert convert_heads(loaded, ROWS, asked).plan.cached_heads() == 8


def test_an_adaptive_budget_measures_how_far_the_converted_model_is_from_the_original(monkeypatch):
    loaded, measured = opened(pico("llama")), []

    def watched(*layers, divergence, **options):
        def recorded(index, heads):
            measured.append((index, heads, divergence(index, heads)))
            return measured[-1][-1]

        return unit_costs(*layers, divergence=recorded, **options)

    monkeypatch.setattr(conversion, "unit_costs", watched)
    convert_heads(loaded, ROWS, settings(budget="adaptive"))
    assert len(measured) == 4
    original = logits_of(loaded.model, ROWS[:PROBE_ROWS]).log_softmax(-1)
    for index, heads, found in measured:
        with loaded.with_heads([heads if layer == index else own for layer, own in enumerate(loaded.heads)]) as model:
            replaced = logits_of(model, ROWS[:PROBE_ROWS]).log_softmax(-1)
        # KL(original || replaced), in nats a token
        assert found == pytest.approx((original.exp() * (original - replaced)).sum(-1).mean().item(), rel=1e-3)


def test_an_adaptive_budget_is_repeatable():
    loaded = opened(pico("gpt2"))
    first, again = (convert_heads(loaded, ROWS, settings(budget="adaptive", seed=7, refit=QUICK)) for _ in range(2))
    assert first.plan == again.plan
    assert equal_heads(first.heads, again.heads)


def test_groups_follow_the_seed():
    loaded = opened(pico("llama", num_attention_heads=16, num_key_value_heads=16))
    asked = [settings("procrustes", "gqa", seed=seed) for seed in (0, 1, 2, 3, 0)]
    first, *others, again = (convert_heads(loaded, ROWS, one).plan for one in asked)
    assert again == first
    assert any(plan != first for plan in others)


def test_an_adaptive_budget_needs_a_price():
    with pytest.raises(ConfigError, match="uniform"):
        convert_heads(opened(pico("llama")), ROWS, settings("mean-pool", budget="adaptive"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("target", ["dha", "gqa"])
def test_a_plan_reproduces_its_conversion(family, target):
    with duplicated(family) as loaded:  # the groups are no neighbours
        first = convert_heads(loaded, ROWS, settings(target=target, refit=QUICK))
        assert first.plan.layers[0].key_map == (0, 1, 0, 1)
        again = convert_heads(loaded, ROWS, settings(target="dha", refit=QUICK), plan=first.plan)
    assert again.plan == first.plan
    assert equal_heads(first.heads, again.heads)


def test_a_plan_stands_above_the_budget():
    loaded = opened(pico("llama", num_key_value_heads=2))
    plan = convert_heads(loaded, ROWS, settings(target="gqa", share=HALF)).plan
    out_of_reach = settings(target="gqa", share=QUARTER, budget="adaptive")
    assert convert_heads(loaded, ROWS, out_of_reach, plan=plan).plan == plan


def test_plans_of_other_models_are_refused():
    loaded = opened(pico("llama"))
    plan = convert_heads(loaded, ROWS, settings()).plan
    with pytest.raises(PlanError, match="give a plan of this model"):
        convert_heads(loaded, ROWS, settings(), plan=HeadPlan(target="dha", head_dim=8, layers=plan.layers[:1]))
    grouped = opened(pico("llama", num_key_value_heads=2))
    split = plan.layers[0].model_copy(update={"key_map": (0, 1, 0, 1)})
    with pytest.raises(PlanError, match="splits source head"):
        convert_heads(grouped, ROWS, settings(), plan=HeadPlan(target="dha", head_dim=8, layers=(split, split)))


def test_statistics_can_be_reused():
    loaded = opened(pico("phi"))
    statistics = gather_statistics(loaded, ROWS, settings())
    stages = []

    @contextmanager
    def recording(name, total, unit):
        stages.append(name)
        yield lambda _: None

    reused = convert_heads(loaded, ROWS, settings(), statistics=statistics, stages=recording)
    assert stages == ["grouping"]
    assert equal_heads(reused.heads, convert_heads(loaded, ROWS, settings()).heads)


@pytest.mark.parametrize(("family", "wanted"), [("llama", False), ("olmo2", False), ("qwen3", True)])
def test_moments_of_unit_rows_are_gathered_for_norms_over_each_head_alone(family, wanted):
    statistics = gather_statistics(opened(pico(family)), ROWS, settings())
    assert all((entry.unit_key_planes is not None) == wanted for entry in statistics)


def test_procrustes_by_cosine_gathers_what_it_needs():
    loaded = opened(pico("llama"))
    converted = convert_heads(loaded, ROWS, settings("procrustes", options=SharingOptions(criterion="cos")))
    assert converted.plan.cached_heads() == 8


@pytest.mark.parametrize("family", FAMILIES, ids=case_name)
def test_progress_adds_up(family):
    loaded, seen = opened(pico(family)), {}

    @contextmanager
    def counting(name, total, unit):
        name = name.split()[0]  # the statistics' says their size

        def advance(amount):
            seen[name][0] += amount

        seen[name] = [0, total]
        yield advance

    convert_heads(loaded, ROWS, settings(budget="adaptive", refit=QUICK), stages=counting)
    assert set(seen) == {"statistics", "sensitivity", "grouping", "refit"}
    assert all(done == total for done, total in seen.values())


def test_mean_pooling_passes_over_no_text_unless_it_restores_norms(monkeypatch):
    loaded, options = opened(pico("llama")), SharingOptions(restore_norm=True)
    asked = settings("mean-pool", "gqa")
    wanted = convert_heads(loaded, ROWS, asked, statistics=gather_statistics(loaded, ROWS, asked))

    def passed_over(*_, **__):
        raise AssertionError("a pass over the text")

    monkeypatch.setattr(conversion, "collect", passed_over)
    found = convert_heads(loaded, ROWS, asked)
    assert all(torch.equal(layer.k, other.k) for layer, other in zip(found.heads, wanted.heads, strict=True))
    for reading in (settings("mean-pool", "gqa", options=options), settings()):
        with pytest.raises(AssertionError, match="a pass over the text"):
            convert_heads(loaded, ROWS, reading)
