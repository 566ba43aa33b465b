"""Operations on tensors that no library has: they know no model, no folder and no recipe."""
