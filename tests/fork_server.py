"""Loads numba's registries and the compiled kernels, where each rank would take a second for it.

The ranks' fork server imports this before it forks them; no thread may be left, as none survives a fork.
"""

from tiny import tiny_data

tiny_data().setup()
