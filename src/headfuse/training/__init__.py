"""Training a model on packed text: the batches, what is minimised, and one loop for one device or many."""
