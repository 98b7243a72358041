"""Sparse-to-dense post-training in JAX: see README.md."""
