"""The linear layers of decoding steps: products of few rows, bound by reading the weights.

Each is computed by what suits few rows (`ops/skinny_product`). Projections of one input become one product, as small
ones leave a GPU's memory idle at their ends: their weights are moved side by side and stay parameters of their own, so
nothing is held twice; the first call computes all of them, and the others are handed out as slices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headfuse.ops.skinny_product.product import few_rows, skinny_linear, suits

# What a module calls on one input, before it uses any of the results.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class StepProjections:
    """The plain linear layers among the children of some modules, siblings joined.

    Moves the weights of siblings; values, shapes and names stay. Weights that later move again, to another device, part
    from it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.places: list[tuple[nn.Module, str, _Part]] = []
        for module in modules:
            siblings = [names for names in SIBLINGS if joinable([getattr(module, name, None) for name in names])]
            joined = {name for names in siblings for name in names}
            alone = [(name,) for name, child in module.named_children() if name not in joined and joinable([child])]
            for names in (*siblings, *alone):
                product = _Product([getattr(module, name) for name in names])
                self.places.extend((module, name, part) for name, part in zip(names, product.parts(), strict=True))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the context, which holds calls without gradients alone, these products stand for the layers."""
        own = [getattr(module, name) for module, name, _ in self.places]
        try:
            for module, name, part in self.places:
                setattr(module, name, part)
            yield
        finally:
            for (module, name, part), linear in zip(self.places, own, strict=True):
                setattr(module, name, linear)
                part.product.forget()


def joinable(linears: Sequence[object]) -> bool:
    """Whether all are linear layers without hooks, alike in inputs and in kind of weights, all or none with a bias."""
    if not all(type(each) is nn.Linear and not each._forward_hooks and not each._forward_pre_hooks for each in linears):
        return False
    kinds = {
        (each.in_features, each.bias is None, each.weight.dtype, each.weight.device)
        for each in linears
        if isinstance(each, nn.Linear)
    }
    return len(kinds) == 1


def side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all the parameters, along their first axis. They become views of it, unless they are already."""
    first, ends = parameters[0], [each.data_ptr() + each.nbytes for each in parameters]
    storages = {each.untyped_storage().data_ptr() for each in parameters}
    following = [each.data_ptr() for each in parameters[1:]] == ends[:-1]
    if len(storages) == 1 and following and all(each.is_contiguous() for each in parameters):
        shape = (sum(len(each) for each in parameters), *first.shape[1:])
        return first.detach().as_strided(shape, first.stride(), first.storage_offset())
    joined = torch.cat([each.detach() for each in parameters])
    for parameter, part in zip(parameters, joined.split([len(each) for each in parameters]), strict=True):
        parameter.data = part
    return joined


class _Product(nn.Module):
    """The product of one input with the weights of some layers, kept until every part of it has been taken."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        biases = [each.bias for each in linears if each.bias is not None]
        self.register_buffer("weight", side_by_side([each.weight for each in linears]), persistent=False)
        self.register_buffer("bias", side_by_side(biases) if biases else None, persistent=False)
        self.skinny = suits(self.weight)
        self.widths = [each.out_features for each in linears]
        self.forget()

    def of(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... n"]:
        """All channels."""
        layer = skinny_linear if self.skinny and few_rows(x) and x.dtype == self.weight.dtype else nn.functional.linear
        return layer(x, self.weight, self.bias)

    def parts(self) -> list["_Part"]:
        """What stands for each linear layer."""
        firsts = [sum(self.widths[:index]) for index in range(len(self.widths))]
        return [_Part(self, first, first + width) for first, width in zip(firsts, self.widths, strict=True)]

    def forget(self) -> None:
        """Nothing is kept."""
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.left = 0


class _Part(nn.Module):
    """Stands for one layer."""

    def __init__(self, product: _Product, first: int, last: int) -> None:
        super().__init__()
        self.product, self.first, self.last = product, first, last

    @property
    def weight(self) -> Tensor:
        """The layer's weights: some models look at their type."""
        return self.product.weight[self.first : self.last]

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... n"]:
        """The layer's channels of the product."""
        product = self.product
        if product.left == 0:
            product.input, product.left = x, len(product.widths)
            product.output = product.of(x)
        assert x is product.input, "siblings that get different inputs cannot be joined"
        assert product.output is not None
        mine = product.output[..., self.first : self.last]
        product.left -= 1
        if product.left == 0:
            product.forget()
        return mine
