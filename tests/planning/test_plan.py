"""The plan: a small JSON that comes back as it went, and refuses what no model can be."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headfuse.errors import PlanError
from headfuse.planning.budget import head_plan
from headfuse.planning.grouping import HeadGroups
from headfuse.planning.plan import HeadPlan, LayerPlan
from strategies import group_tuples


@st.composite
def plans(draw: st.DrawFn) -> HeadPlan:
    heads, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    identity = tuple(range(heads))
    groups = [HeadGroups(draw(group_tuples(heads)), draw(group_tuples(heads))) for _ in range(layers)]
    return head_plan("dha", draw(st.integers(1, 128)), [(identity, identity)] * layers, groups)


@given(plan=plans())
def test_plan_survives_json(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert HeadPlan.load(path) == plan


@given(plan=plans())
def test_every_query_head_reads_one_head_and_bytes_follow_from_the_count(plan):
    for layer in plan.layers:
        assert set(layer.key_map) == set(range(layer.num_key_heads))
        assert set(layer.value_map) == set(range(layer.num_value_heads))
    cached = sum(layer.num_key_heads + layer.num_value_heads for layer in plan.layers)
    assert plan.cached_heads() == cached
    assert plan.kv_bytes_per_token(2) == 2 * cached * plan.head_dim


def layer(key_map: tuple[int, ...], value_map: tuple[int, ...]) -> LayerPlan:
    return LayerPlan(key_map=key_map, value_map=value_map)


@pytest.mark.parametrize(
    ("key_map", "value_map", "reason"),
    [
        ((0, 0), (0,), "2 query heads"),
        ((0, 2), (0, 1), "every head"),
        ((-1, 0), (0, 1), "every head"),
        ((), (), "at least 1"),
    ],
)
def test_unsound_layers_are_refused(key_map, value_map, reason):
    with pytest.raises(ValidationError, match=reason):
        layer(key_map, value_map)


def test_layers_agree_on_query_heads():
    with pytest.raises(ValidationError, match="same number of query heads"):
        HeadPlan(target="dha", head_dim=8, layers=(layer((0,), (0,)), layer((0, 0), (0, 0))))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((layer((0, 0, 1, 1), (0, 1, 0, 1)),), "one map"),
        ((layer((0, 0, 1, 1), (0, 0, 1, 1)), layer((0, 0, 0, 0), (0, 0, 0, 0))), "one head count"),
        ((layer((0, 0, 0, 1), (0, 0, 0, 1)),), r"sizes \[1, 3\]"),
    ],
)
def test_gqa_plans_are_uniform(layers, reason):
    with pytest.raises(ValidationError, match=reason):
        HeadPlan(target="gqa", head_dim=8, layers=layers)
    assert HeadPlan(target="dha", head_dim=8, layers=layers).num_query_heads == 4


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": "8"}, "head_dim"),
        ({"surplus": 1}, "surplus"),
        ({"layers": []}, "layers"),
    ],
)
def test_bad_files_are_named_with_the_bad_key(change, where, tmp_path):
    path = tmp_path / "plan.json"
    sound = json.loads(HeadPlan(target="dha", head_dim=8, layers=(layer((0,), (0,)),)).model_dump_json())
    path.write_text(json.dumps(sound | change))
    with pytest.raises(PlanError, match=rf"plan\.json: {where}"):
        HeadPlan.load(path)


def test_missing_or_unreadable_files_are_plan_errors(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json"):
        HeadPlan.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="wanted a head plan"):
        HeadPlan.load(tmp_path / "binary.json")
