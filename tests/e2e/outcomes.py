"""What a conversion leaves behind: everything, or nothing."""

import json

from headfuse.manifest import Manifest
from headfuse.planning.plan import HeadPlan


def assert_nothing_written(tmp_path):
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]
    assert not left


def assert_complete(out, done, target):
    """Every promised file is there and the cache is as small as was said."""
    plan = HeadPlan.load(out / "headfuse" / "plan.json")
    assert plan.target == target
    manifest = Manifest.load(out / "headfuse" / "manifest.json")
    assert manifest.command[:2] == ("headfuse", "convert")
    assert manifest.source.name == "model"
    parity = json.loads((out / "headfuse" / "parity.json").read_text())
    assert parity == done["parity"]
    assert all(value <= 1e-4 for value in parity.values())
    assert done["kv_bytes_per_token"]["after"] == plan.kv_bytes_per_token(4)
    assert (out / "README.md").is_file()
    assert (out / "tokenizer.json").is_file()
    return plan
