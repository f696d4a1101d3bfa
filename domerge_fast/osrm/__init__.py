"""OSRM: adapters that start, or are brought, where the inputs of other tasks have little energy.

A LoRA update B A moves a module's outputs on another task's inputs H [tokens, n] by H Aᵀ Bᵀ. If the
rows of A lie where H has little energy, merging the update in disturbs that task little.
Source: arXiv 2505.22934 (ACL 2025). The authors' code takes directions that are orthogonal to the
mean input of each other task, T - 1 vectors; here the second moments of all tokens are taken
(`statistic="mean"` has theirs), and after training the update is projected, not fitted anew.
"""

__all__: list[str] = []
