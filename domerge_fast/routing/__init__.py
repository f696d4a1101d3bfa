"""Routed serving: a merge for every cluster of queries, and which one a query goes to."""

__all__: list[str] = []
