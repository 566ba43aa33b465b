"""Which tokens of a cache each row has."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Row b has tokens `starts[b] <= s < lengths[b]` (default: all), found through the block table if there is one.

    A cache is paged: `[P, n, N, d]` is P pages of N tokens, and line b of the block table names row b's pages in
    order. A dense cache `[B, n, S, d]` is one page a row and has no table. All are int32 on the device and are never
    read by the host.
    """

    lengths: Int[Tensor, "B"] | None = None
    starts: Int[Tensor, "B"] | None = None
    block_table: Int[Tensor, "B pages"] | None = None

    def capacity(self, cache: Float[Tensor, "P n N d"]) -> int:
        """The tokens that the cache has room for in each row."""
        return cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def in_order(self, cache: Float[Tensor, "P n N d"]) -> Float[Tensor, "B n S d"]:
        """The cache row by row: itself if it is dense, else a copy of its pages."""
        if self.block_table is None:
            return cache
        return cache[self.block_table.long()].transpose(1, 2).flatten(2, 3)


ALL_TOKENS = Rows()
