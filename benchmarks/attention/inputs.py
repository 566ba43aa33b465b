"""Random inputs of the attention benchmarks, one class for each kind of attention, and their fp64 references."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.cases import DTYPES, Case, maps_of
from headfuse.ops.decoupled_attention.decode import DecodeConfig, decode_attention
from headfuse.ops.decoupled_attention.library import prefill_op
from headfuse.ops.decoupled_attention.naive import naive_attention
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.sdpa import gather

ROTATED_BYTES = 2_000_000_000


class Inputs:
    """Several sets of random inputs of one case, and the reference output of the first."""

    def __init__(self, case: Case, sets: int | None = None) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.case, self.dtype = case, DTYPES[case.dtype]
        rows, total, dim = case.batch, case.context, case.head_dim
        self.lengths = torch.full((rows,), total, dtype=torch.int32, device="cuda")
        if case.ragged:
            drawn = torch.randint(total // 4, total + 1, (rows,), generator=generator, device="cuda")
            self.lengths = drawn.to(torch.int32)
        tokens = int(self.lengths.clamp(max=case.window or total).sum())
        self.bytes = tokens * (case.key_heads + case.value_heads) * dim * self.dtype.itemsize
        self.sets = sets or max(4, -(-ROTATED_BYTES // self.bytes))
        self.maps = maps_of(case)
        self.table = None
        if case.page:
            pages = -(-total // case.page)
            order = torch.randperm(rows * pages, generator=generator, device="cuda")
            self.table = order.reshape(rows, pages).to(torch.int32)
        self.query = self._random(generator, rows, case.query_heads, dim)
        self.key = self._cache(generator, case.key_heads)
        self.value = self._cache(generator, case.value_heads)

    def _random(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(self.sets, *shape, dtype=self.dtype, device="cuda", generator=generator)

    def _cache(self, generator: torch.Generator, heads: int) -> Tensor:
        """`[sets, pages, heads, tokens of a page, d]`, laid out as the case says."""
        case = self.case
        pages, page = (case.batch, case.context) if self.table is None else (self.table.numel(), case.page)
        if case.layout == "heads":
            return self._random(generator, pages, heads, page, case.head_dim)
        return self._random(generator, pages, page, heads, case.head_dim).transpose(2, 3)

    def launches(self, config: DecodeConfig | None) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """A decoding step on each set."""
        return [lambda index=index: self.step(index, config) for index in range(self.sets)]

    def step(self, index: int, config: DecodeConfig | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of set `index`."""
        return decode_attention(
            self.query[index],
            self.key[index],
            self.value[index],
            self.maps,
            Rows(self.lengths, block_table=self.table),
            scoring=self.case.scoring,
            config=config,
        )

    def dense(self, cache: Tensor) -> Tensor:
        """Set 0 of a cache as `[B, heads, S, d]`."""
        if self.table is None:
            return cache[0]
        return cache[0][self.table.long()].transpose(1, 2).flatten(2, 3)[:, :, : self.case.context]

    def reference(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of set 0 in fp64, one query head at a time."""
        keys, values, case = self.dense(self.key), self.dense(self.value), self.case
        positions = torch.arange(case.context, device="cuda")
        seen = positions < self.lengths[:, None]
        if case.window:
            seen &= positions >= self.lengths[:, None] - case.window
        outs, lses = [], []
        for head, (k, v) in enumerate(zip(self.maps.key.tolist(), self.maps.value.tolist(), strict=True)):
            query = self.query[0, :, head].double()
            scores = (keys[:, k].double() @ query[..., None])[..., 0] * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            lses.append(scores.logsumexp(-1))
            weights = torch.exp(scores - lses[-1][:, None])
            outs.append((weights[:, None] @ values[:, v].double())[:, 0])
        return torch.stack(outs, 1), torch.stack(lses, 1)

    def attention(self, backend: SDPBackend) -> list[Callable[[], Tensor]]:
        """Attention of torch on each set; for equal counts alone."""
        shared = self.case.key_heads != self.case.query_heads

        def launch(index: int) -> Tensor:
            with sdpa_kernel(backend):
                query = self.query[index, :, :, None]
                return F.scaled_dot_product_attention(query, self.key[index], self.value[index], enable_gqa=shared)

        return [lambda index=index: launch(index) for index in range(self.sets)]


class Learned:
    """Random inputs of many queries a row, the maps, and the gradient of the output; `ragged`: padding on the left."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.case, self.maps = case, maps_of(case)
        heads = (case.query_heads, case.key_heads, case.value_heads, case.query_heads)
        made = [
            torch.randn(
                case.batch, case.context, n, case.head_dim, dtype=DTYPES[case.dtype], device="cuda", generator=generator
            ).transpose(1, 2)
            for n in heads
        ]
        self.leaves, self.upstream = [x.requires_grad_() for x in made[:3]], made[3]
        self.starts = None
        if case.ragged:
            first = torch.randint(case.context // 2, (case.batch,), generator=generator, device="cuda")
            self.starts = first.to(torch.int32)

    def triton(self) -> Tensor:
        """The kernels' output."""
        scoring = self.case.scoring
        numbers = scoring.scale_for(self.case.head_dim), scoring.softcap or 0.0, scoring.window or 0
        return prefill_op(*self.leaves, self.maps.tensors(), None, self.starts, None, *numbers)[0]

    def gathered(self, backend: SDPBackend) -> Tensor:
        """The heads gathered to the query heads, then torch's attention; gradients of shared heads add up in order."""
        return self._repeated(gather, backend)

    def selected(self, backend: SDPBackend) -> Tensor:
        """The same by torch's own selection, whose gradients of shared heads are added up by atomic operations."""
        return self._repeated(lambda heads, index: heads.index_select(1, index.long()), backend)

    def _repeated(self, repeat: Callable[[Tensor, Tensor], Tensor], backend: SDPBackend) -> Tensor:
        query, key, value = self.leaves
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, repeat(key, self.maps.key), repeat(value, self.maps.value), is_causal=True
            )

    def gradients(self, out: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """Of queries, keys and values."""
        return torch.autograd.grad(out, self.leaves, self.upstream if upstream is None else upstream, retain_graph=True)

    def reference(self) -> tuple[Tensor, ...]:
        """Output and gradients in fp64, for small shapes."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        query, key, value = leaves
        out = naive_attention(query, key, value, self.maps, starts=self.starts, scoring=self.case.scoring)[0]
        return out, *torch.autograd.grad(out, leaves, self.upstream.double())
