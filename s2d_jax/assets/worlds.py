"""The embedded worlds: the problems of each, the text of its base models, the longest sequences."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from s2d_jax.data.arithmetic import problems as arithmetic
from s2d_jax.data.composition import problems as composition

_Pairs = list[tuple[str, str]]  # (text before, text to predict)


class World(NamedTuple):
  """A world as the scripts of this package read it. Both have the reward of arithmetic."""

  splits: Callable[[], dict[str, list[dict]]]
  steps: Callable[[int, int], _Pairs]   # (seed, count) -> single steps, all of them right
  corpus: Callable[..., _Pairs]         # questions with a response
  family: Callable[[Mapping], str]      # of a row
  prompt_tokens: int                    # of the longest problem
  response_tokens: int                  # of the longest worked solution, its end included


WORLDS = {
  "arithmetic": World(arithmetic.splits, arithmetic.sums, arithmetic.corpus, arithmetic.family,
                      prompt_tokens=13, response_tokens=21),
  "composition": World(composition.splits, composition.steps, composition.corpus,
                       composition.family, prompt_tokens=12, response_tokens=26),
}
