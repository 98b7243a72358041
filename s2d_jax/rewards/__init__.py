"""Checkers: pure functions reward(problem, text) -> 0.0 or 1.0, and a pool that survives them."""
