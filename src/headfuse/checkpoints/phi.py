"""Phi 1, 1.5 and 2: separate projections with biases; the output projection is called `dense`."""

from typing import Any

from headfuse.checkpoints.adapter import Adapter


class PhiAdapter(Adapter):
    """Everything but the optional layer norm of queries and keys, which no released Phi has."""

    def check(self, config: Any) -> None:
        """Refuse qk_layernorm."""
        super().check(config)
        if config.qk_layernorm:
            self.refuse(
                "no norm of queries and keys",
                "qk_layernorm=true",
                "use a released Phi (a conversion would need layer norms with means and biases in the decoupled class)",
            )
