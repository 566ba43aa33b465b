"""How fast a model serves: time to the first token, tokens a second, attention against the copy rate, what fits."""
