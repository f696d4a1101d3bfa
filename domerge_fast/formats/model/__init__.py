"""A whole model folder: the base model with the merge added to its weights."""
