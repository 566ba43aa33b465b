"""Which key head and which value head each query head reads, as tensors that the backends index with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headfuse.errors import ConfigError

# tl.dot wants at least 16 rows.
SMALLEST_TILE = 16


class Cell(NamedTuple):
    """Query heads that share no key or value head with the rest, and the consecutive heads that they read."""

    queries: tuple[int, ...]
    keys: range
    values: range


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one layer on one device. H query heads, K key heads, V value heads.

    `cells` has a line for each `Cell`: first key head, their number, first value head, their number, then three
    blocks of `cell_size`: query head (-1 fills up), its key head and its value head within the cell.
    `key_groups` and `value_groups` list the query heads of each key and each value head, filled up with -1.
    """

    key: Int[Tensor, "H"]
    value: Int[Tensor, "H"]
    cells: Int[Tensor, "C 4+3*G"]
    cell_size: int
    key_groups: Int[Tensor, "K g"]
    value_groups: Int[Tensor, "V g"]
    num_key_heads: int
    num_value_heads: int

    @property
    def num_query_heads(self) -> int:
        """H."""
        return len(self.key)


def head_maps(key_map: Sequence[int], value_map: Sequence[int], device: torch.device | str = "cpu") -> HeadMaps:
    """The tensors of `key_map` and `value_map`, each of length H; made once for each pair of maps and device.

    Raises ConfigError unless both maps name heads 0..n-1, each at least once, for the same number of query heads.
    """
    return _head_maps(tuple(key_map), tuple(value_map), str(torch.device(device)))


@lru_cache(maxsize=1024)
def _head_maps(key_map: tuple[int, ...], value_map: tuple[int, ...], device: str) -> HeadMaps:
    for head_map in (key_map, value_map):
        if not head_map or set(head_map) != set(range(max(head_map) + 1)) or len(key_map) != len(value_map):
            raise ConfigError(
                f"maps: wanted heads 0..n-1, each at least once, for the same query heads in both; got {key_map} "
                f"and {value_map}; renumber the heads"
            )
    cells = cells_of(key_map, value_map)
    size = tile(max(len(cell.queries) for cell in cells))
    lines = [_cell_line(cell, key_map, value_map, size) for cell in cells]
    key_groups, value_groups = _groups(key_map), _groups(value_map)
    with torch.inference_mode(False):  # they may be used with gradients later
        return HeadMaps(
            key=torch.tensor(key_map, device=device),
            value=torch.tensor(value_map, device=device),
            cells=torch.tensor(lines, dtype=torch.int32, device=device),
            cell_size=size,
            key_groups=torch.tensor(key_groups, dtype=torch.int32, device=device),
            value_groups=torch.tensor(value_groups, dtype=torch.int32, device=device),
            num_key_heads=len(key_groups),
            num_value_heads=len(value_groups),
        )


def cells_of(key_map: Sequence[int], value_map: Sequence[int]) -> list[Cell]:
    """The connected components of the heads, or one cell of all heads where a component's heads are not consecutive.

    Maps of grouped-query attention have a cell for each group; unrelated maps have one cell.
    """
    parts: list[tuple[set[int], set[int], set[int]]] = []
    for query, (key, value) in enumerate(zip(key_map, value_map, strict=True)):
        joined = ({query}, {key}, {value})
        for part in [part for part in parts if key in part[1] or value in part[2]]:
            parts.remove(part)
            joined = (joined[0] | part[0], joined[1] | part[1], joined[2] | part[2])
        parts.append(joined)
    cells = [Cell(tuple(sorted(q)), _span(k), _span(v)) for q, k, v in parts]
    if all(len(c.keys) == len(p[1]) and len(c.values) == len(p[2]) for c, p in zip(cells, parts, strict=True)):
        return sorted(cells, key=lambda cell: cell.keys.start)
    return [Cell(tuple(range(len(key_map))), range(max(key_map) + 1), range(max(value_map) + 1))]


def tile(rows: int) -> int:
    """The size of the matrix tile that holds so many rows."""
    return max(SMALLEST_TILE, 1 << (rows - 1).bit_length())


def _span(heads: set[int]) -> range:
    return range(min(heads), max(heads) + 1)


def _cell_line(cell: Cell, key_map: Sequence[int], value_map: Sequence[int], size: int) -> list[int]:
    fill = [-1] * (size - len(cell.queries))
    keys = [key_map[query] - cell.keys.start for query in cell.queries]
    values = [value_map[query] - cell.values.start for query in cell.queries]
    spans = [cell.keys.start, len(cell.keys), cell.values.start, len(cell.values)]
    return [*spans, *cell.queries, *fill, *keys, *fill, *values, *fill]


def _groups(head_map: Sequence[int]) -> list[list[int]]:
    groups = [[q for q, head in enumerate(head_map) if head == n] for n in range(max(head_map) + 1)]
    size = tile(max(len(group) for group in groups))
    return [group + [-1] * (size - len(group)) for group in groups]
