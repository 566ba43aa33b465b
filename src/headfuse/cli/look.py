"""`headfuse inspect` and `headfuse demo`: what a model is, and what converting does to one."""

from headfuse.cli.options import Device, Json, Model, Seed
from headfuse.cli.values import show


def inspect(model: Model, *, allow_pickle: bool = False, as_json: Json = False) -> None:
    """Show a model's attention, what its KV cache costs and which conversions apply."""
    from headfuse.checkpoints.describe import describe
    from headfuse.checkpoints.source import locate
    from headfuse.report.tables import description_table

    found = describe(locate(model, allow_pickle=allow_pickle))
    show(found.model_dump(mode="json"), description_table(found), as_json=as_json)


def demo(*, seed: Seed = 0, device: Device = None, as_json: Json = False) -> None:
    """Convert the model that ships with headfuse by every method and compare."""
    from headfuse.demo import demonstrate
    from headfuse.placement import Placement
    from headfuse.progress import for_terminal
    from headfuse.report.tables import demonstration_table

    found = demonstrate(seed=seed, placement=Placement(device), stages=for_terminal())
    show(found.as_dict(), demonstration_table(found), as_json=as_json)
