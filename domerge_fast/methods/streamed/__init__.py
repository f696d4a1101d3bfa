"""Merges of any number of adapters, which are read one batch after another."""
