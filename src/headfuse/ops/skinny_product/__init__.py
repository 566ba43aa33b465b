"""Products of few rows with a matrix of weights, as every decoding step makes them: bound by reading the weights."""
