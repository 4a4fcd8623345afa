"""Numerical primitives of one form each, whatever computes them; nothing here knows a model.

Importing it bounds the caches in which oneDNN keeps the matrix products that it has compiled, one per shape. Packed
rows give new shapes in every step, each with memory of its own: up to the default of 1024 a training run grows by
gigabytes, and spends its time on fresh pages. Variables that are set already stand.
"""

import os

# Read by the first product; the one is PyTorch's own cache, the other oneDNN's below it.
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
