"""Implementations of the ops; see registry.py for the table."""
