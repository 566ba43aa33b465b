"""Which key head and which value head each query head reads, as tensors that the backends index with."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from headfuse.errors import ConfigError

# tl.dot wants at least 16 rows.
SMALLEST_TILE = 16


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one layer on one device. H query heads, K key heads, V value heads.

    `key_groups` and `value_groups` list the query heads of each key and each value head, filled up with -1 to a tile.
    Unpadded matrix products go through `key_slots`, the query head in each place of the key heads' groups;
    `value_slots`, the place there of each query head in the value heads' groups; `out_slots`, each query head's place
    among those.
    """

    key: Int[Tensor, "H"]
    value: Int[Tensor, "H"]
    key_groups: Int[Tensor, "K tile"]
    value_groups: Int[Tensor, "V tile"]
    key_slots: Int[Tensor, "K g"]
    value_slots: Int[Tensor, "V h"]
    out_slots: Int[Tensor, "H"]

    @property
    def num_query_heads(self) -> int:
        """H."""
        return len(self.key)

    @property
    def num_key_heads(self) -> int:
        """K."""
        return len(self.key_groups)

    @property
    def num_value_heads(self) -> int:
        """V."""
        return len(self.value_groups)

    @cached_property
    def consecutive(self) -> bool:
        """Whether the query heads follow each other group by group, in equal groups, for keys and for values."""
        given = torch.arange(self.num_query_heads, device=self.key.device)
        return torch.equal(self.key_slots.flatten(), given) and torch.equal(self.out_slots, given)

    def tensors(self) -> list[Tensor]:
        """The fields in order: what a torch operator can be given."""
        return [getattr(self, field.name) for field in fields(self)]


def head_maps(key_map: Sequence[int], value_map: Sequence[int], device: torch.device | str = "cpu") -> HeadMaps:
    """The tensors of `key_map` and `value_map`, each of length H; made once for each pair of maps and device.

    Raises ConfigError unless both maps name heads 0..n-1, each at least once, for the same number of query heads.
    """
    make = _made if torch.compiler.is_compiling() else _made_once  # tracing goes around caches, and warns
    return make(tuple(key_map), tuple(value_map), str(torch.device(device)))


def _made(key_map: tuple[int, ...], value_map: tuple[int, ...], device: str) -> HeadMaps:
    for head_map in (key_map, value_map):
        if not head_map or set(head_map) != set(range(max(head_map) + 1)) or len(key_map) != len(value_map):
            raise ConfigError(
                f"maps: wanted heads 0..n-1, each at least once, for the same query heads in both; got {key_map} "
                f"and {value_map}; renumber the heads"
            )
    key_groups, value_groups = groups_of(key_map), groups_of(value_map)
    key_slots, value_slots = (
        _filled(key_groups, 0, _widest(key_groups)),
        _filled(value_groups, 0, _widest(value_groups)),
    )
    key_places, value_places = _places(key_groups), _places(value_groups)
    with torch.inference_mode(False):  # they may be used with gradients later
        return HeadMaps(
            key=torch.tensor(key_map, device=device),
            value=torch.tensor(value_map, device=device),
            key_groups=torch.tensor(
                _filled(key_groups, -1, tile(_widest(key_groups))), dtype=torch.int32, device=device
            ),
            value_groups=torch.tensor(
                _filled(value_groups, -1, tile(_widest(value_groups))), dtype=torch.int32, device=device
            ),
            key_slots=torch.tensor(key_slots, device=device),
            value_slots=torch.tensor([[key_places[q] for q in line] for line in value_slots], device=device),
            out_slots=torch.tensor([value_places[q] for q in range(len(key_map))], device=device),
        )


def tile(rows: int) -> int:
    """The size of the matrix tile that holds so many rows."""
    return max(SMALLEST_TILE, 1 << (rows - 1).bit_length())


_made_once = lru_cache(maxsize=1024)(_made)


def groups_of(head_map: Sequence[int]) -> list[list[int]]:
    """The query heads of each head."""
    return [[q for q, head in enumerate(head_map) if head == n] for n in range(max(head_map) + 1)]


def _filled(groups: list[list[int]], fill: int, size: int) -> list[list[int]]:
    return [group + [fill] * (size - len(group)) for group in groups]


def _places(groups: list[list[int]]) -> dict[int, int]:
    """Where each query head is if the groups, all filled up to the largest, follow each other."""
    size = _widest(groups)
    return {query: n * size + slot for n, group in enumerate(groups) for slot, query in enumerate(group)}


def _widest(groups: list[list[int]]) -> int:
    return max(len(group) for group in groups)
