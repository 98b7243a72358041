"""Shared problems are found by normalised text."""

import pytest

from s2d_jax.data import overlap


@pytest.mark.parametrize("other", [
    r"What is $\frac{1}{2} + x$?", r"what is \(\dfrac{1}{2}+x\)",
    "What  is\n$\\tfrac{1}{2}\\, +x$ ?",
    r"What is $\displaystyle\frac{1}{2} + x$.", "Ｗhat is $\\frac{1}{2}+x$?"])
def test_spellings_of_one_problem(other):
  problem = r"What is $\frac{1}{2}+x$?"
  assert overlap.normalised(other) == overlap.normalised(problem)
  assert overlap.shared([{"problem": problem}], {"test": [{"problem": other}]}) == {
      "test": [{"problem": other}]}


@pytest.mark.parametrize("other", [
    r"What is $\frac{1}{2}-x$?", r"What is $\frac{1}{3}+x$?", r"What is $\frac{12}{}+x$?",
    r"What is $\frac{1}{2}+y$?", "What is"])
def test_other_problems_are_not_shared(other):
  labelled = [{"problem": r"What is $\frac{1}{2}+x$?"}]
  assert overlap.shared(labelled, {"test": [{"problem": other}]}) == {"test": []}


@pytest.mark.parametrize("text", [
    "", "?", "A. B.", r"\\[2pt] \\ \left( a \right)", r"\leftarrow \quadratic \dfraction",
    "1 . ? !",
    "ﬁ K Å", r"$ $ \$", r"\\\\ \\( x", "x . $ ."])
def test_normalising_twice_changes_nothing(text):
  once = overlap.normalised(text)
  assert overlap.normalised(once) == once
