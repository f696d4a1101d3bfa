"""Numerics that belong to no backend."""
