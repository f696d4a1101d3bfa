"""Merging inside other packages, each in a module of its own that imports that package."""
