"""Checkers of answers, reward(problem, text) -> 0.0 or 1.0, and a process with limits for them."""
