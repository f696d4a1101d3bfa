"""Searched merges: coefficients found by trying them out, under constraints that the answer has
shown to hold."""
