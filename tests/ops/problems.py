"""Random decoupled attention: maps, queries, caches in every layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headfuse.ops.decoupled_attention import HeadMaps, head_maps


def random_map(heads: int, queries: int) -> list[int]:
    """Every head at least once, in any order."""
    chosen = torch.cat([torch.arange(heads), torch.randint(heads, (queries - heads,))])
    return chosen[torch.randperm(queries)].tolist()


@dataclass
class Problem:
    """One decoding step; `key`, `value` are dense and `lengths` may be shorter than they are."""

    query: Tensor
    key: Tensor
    value: Tensor
    maps: HeadMaps
    lengths: Tensor
    starts: Tensor | None = None

    def naive_inputs(self):
        """In fp64, with the unused part of the cache poisoned like everywhere else."""
        query, key, value = (x.double() for x in (self.query[:, :, None], self.key, self.value))
        return query, key, value, self.maps


def decoding(
    heads=(8, 3, 5), lengths=(150, 77), dim=32, *, dtype=torch.float32, device="cpu", capacity=None, maps=None
):
    """A step of `heads` query, key and value heads; what lies beyond a row's length is NaN."""
    queries, keys, values = heads
    total = capacity or max(lengths)
    query = torch.randn(len(lengths), queries, dim).to(dtype)
    key = torch.randn(len(lengths), keys, total, dim).to(dtype)
    value = torch.randn(len(lengths), values, total, dim).to(dtype)
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = float("nan")
    drawn = maps or (random_map(keys, queries), random_map(values, queries))
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Problem(query.to(device), key.to(device), value.to(device), head_maps(*drawn, device), length)


def paged(cache: Tensor, page: int, table: Tensor, *, folded: bool) -> Tensor:
    """`cache` `[B, n, S, d]` cut into pages that lie where `table` says, NaN elsewhere: `[P, n, page, d]`."""
    rows, heads, total, dim = cache.shape
    filled = torch.full((rows, heads, table.shape[1] * page, dim), float("nan"), dtype=cache.dtype, device=cache.device)
    filled[:, :, :total] = cache
    pages = torch.full((int(table.max()) + 2, heads, page, dim), float("nan"), dtype=cache.dtype, device=cache.device)
    if folded:
        pages = pages.transpose(1, 2).contiguous().transpose(1, 2)
    pages[table.long()] = filled.unflatten(2, (table.shape[1], page)).transpose(1, 2)
    return pages


def shuffled_table(rows: int, pages: int, device) -> Tensor:
    """Pages of all rows in random order, with gaps."""
    order = torch.randperm(rows * pages + 3)[: rows * pages]
    return order.reshape(rows, pages).to(torch.int32).to(device)


def folded(cache: Tensor) -> Tensor:
    """The same cache with all heads of a token side by side, as `models/dha` keeps it."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)
