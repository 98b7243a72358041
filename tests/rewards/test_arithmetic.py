"""The arithmetic reward, by example."""

import pytest

from s2d_jax.rewards import arithmetic


@pytest.mark.parametrize(
  "text, expected",
  [
    ("12+34=46+57=03", 1.0),
    ("03", 1.0),
    ("12+34=99+57=03", 1.0),  # wrong steps do not count
    ("12+34=46+57=3", 0.0),
    ("12+34=46+57=03+", 0.0),
    ("12+34=46+57=030", 0.0),
    ("12+34=03+57=60", 0.0),
    ("", 0.0),
  ],
)
def test_reward(text, expected):
  got = arithmetic.reward({"problem": "12+34+57", "answer": "03"}, text)
  assert got == expected and type(got) is float
