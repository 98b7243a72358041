"""A search along the last displacement of the weights, between steps: EffOPD.

On-policy distillation soon moves the weights W along one direction. After the steps 1, 2, 4, 8, …
W is compared with the anchor A, the weights that the last search left, or the start. The
candidates are

  W + stride · k · (W − A),   k = 1, 2, …, candidates,

scored one after another on the same problems with the same random numbers. The search ends at the
first candidate that is not accepted, and training continues from the last one that was. The
optimizer's state stays as it is.

"Learning to Foresee", https://arxiv.org/abs/2605.11739. Where its text and its code differ,
`accept` offers both rules, and A is the code's.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import keys
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.losses import blockwise, kl
from s2d_jax.losses.blockwise import Head
from s2d_jax.rollouts import Batch, Prompt, Rollout, repetition
from s2d_jax.sharding import Params

_RULES = ("above", "at_least")
VERSION = 1  # raised when a search finds otherwise: it is in the names of stages that search
KEYS = {
    "candidates": keys.at_least(1),
    "stride": Key(lambda stride: 0 < stride < math.inf, "choose it above 0; the paper has 2"),
    "problems": keys.at_least(1),  # that score a candidate, of the stage's own
    "samples": keys.at_least(1),   # of each problem
    # "above" the best score so far, "at_least" it, or a chance: a control without scores
    "accept": Key(lambda rule: rule in _RULES or not isinstance(rule, bool) and 0 < rule <= 1,
                  f"choose {' or '.join(_RULES)}, or a chance above 0, up to 1"),
    # "reward": the mean reward, which spends labels; "kl": minus the mean reverse KL to the guide
    "signal": keys.one_of(("reward", "kl")),
    # "blocks": of each layer all but the first norm, as the authors' code; "all"
    "leaves": keys.one_of(("blocks", "all")),
}


def check(hp: ConfigDict, on_policy: bool, taught: bool) -> None:
  """Refuses searches that a stage cannot make; a message begins with the key's name.

  Args:
    hp: the stage's config; on_policy: whether the learner samples.
    taught: whether its guide is the teacher or reads hints. Another is the learner's own start.

  Raises:
    InputError: see the messages.
  """
  if "foresee" not in hp:
    return
  if not on_policy:
    raise InputError("foresee scores the learner's own samples and here another model samples: "
                     "take it out of this stage, or choose a stage such as reverse_kl.")
  if hp.lora.rank:
    raise InputError("foresee moves whole weights and this stage trains adapters, whose product "
                     "does not move along a line: set lora.rank to 0.")
  if hp.foresee.signal == "kl" and not taught:
    raise InputError("foresee has the signal 'kl', the distance to a guide, and this stage has "
                     "none but the learner's own start: choose 'reward'.")


def inputs(hp: ConfigDict) -> dict[str, int]:
  """The version of the search, for the name of a stage; {} where there are no searches."""
  return {"foresee": VERSION} if "foresee" in hp else {}


class Scored(NamedTuple):
  """The score of some weights, and the samples that it was taken from."""
  score: float
  rollout: Rollout


class Found(NamedTuple):
  """The result of a search."""
  params: Params
  multiple: float           # displacements that the weights were moved by; 0: they stayed
  scored: list[Scored]      # the weights before the search, and then the candidates

  def metrics(self) -> dict[str, float]:
    """The search's part of a step's metrics."""
    found = {"foresee_multiple": self.multiple}
    for k, one in enumerate(self.scored):
      found[f"foresee_score_{k}"] = one.score
      # A low divergence may be that of short or repetitive responses.
      rollout = one.rollout
      found[f"foresee_length_{k}"] = float(rollout.response_length_B.mean())
      found[f"foresee_repetition_{k}"] = float(np.mean(
          [repetition(rollout.response(b)) for b in range(len(rollout.prompt_id_B))]))
    return found


def scores(hp: ConfigDict) -> bool:
  """Whether candidates are scored; hp is the block `foresee`."""
  return hp.accept in _RULES


def reads_labels(hp: ConfigDict) -> bool:
  """Whether a stage's searches check samples against answers, which spends labels."""
  return "foresee" in hp and hp.foresee.signal == "reward" and scores(hp.foresee)


def due(steps: int) -> bool:
  """Whether a search follows step number `steps`, counted from 1: at powers of two."""
  return steps & (steps - 1) == 0


def problems(prompts: Sequence[Prompt], hp: ConfigDict, seed: int) -> list[Prompt]:
  """The problems that score candidates, the same in every search: first in a seeded order."""
  order = np.random.default_rng((seed, zlib.crc32(b"foresee"))).permutation(len(prompts))
  return [prompts[i] for i in order[: hp.problems]]


def extrapolate(params: Params, anchor: Params, multiple: jax.Array, leaves: str) -> Params:
  """W + multiple · (W − A) in float32; with 0, and of leaves that stay, W bit for bit."""
  def moved(path: Sequence[Any], x: jax.Array, start: jax.Array) -> jax.Array:
    names = [key.key for key in path]
    stays = leaves == "blocks" and (names[0] != "layers" or names[-1] == "attn_norm")
    wide = x.astype(jnp.float32)
    far = wide + multiple * (wide - start.astype(jnp.float32))
    return jnp.where(stays | (multiple == 0), x, far.astype(x.dtype))

  return jax.tree_util.tree_map_with_path(moved, params, anchor)


def reverse_kl(student_head: Head, guide_head: Head, batch: Batch,
               hp: ConfigDict) -> dict[str, jax.Array]:
  """{"reverse_kl": KL(student ‖ guide) of each token, in nats}, as `training.compare` runs it."""
  _, (kl_BT, _) = blockwise.divergence(lambda s, t: (kl.reverse_kl(s, t), {}), student_head,
                                       guide_head, batch.weight_BT, hp.block)
  return {"reverse_kl": kl_BT}


def search(params: Params, anchor: Params, score: Callable[[Params], Scored],
           jump: Callable[[Params, Params, float], Params], hp: ConfigDict,
           seed: tuple[int, ...]) -> Found:
  """Moves the weights to the last candidate that is accepted.

  Args:
    params, anchor: the weights W and A.
    score: scores weights; not called where `accept` is a chance.
    jump: `extrapolate` with the leaves chosen, compiled.
    seed: of the chance.
  """
  random = np.random.default_rng(seed)
  by_score = scores(hp)
  scored = [score(params)] if by_score else []
  best = 0.0
  for k in range(1, hp.candidates + 1):
    if by_score:
      # From W and not from the candidate before, which would be rounded k times.
      candidate = score(jump(params, anchor, hp.stride * k))
      # Each candidate before this one was accepted, so the last score is the best so far.
      accepted = candidate.score > scored[-1].score or (
          candidate.score == scored[-1].score and hp.accept == "at_least")
      scored.append(candidate)
    else:
      accepted = random.random() < hp.accept
    if not accepted:
      break
    best = hp.stride * k
  # Formed once more, so that only one candidate is in memory.
  return Found(jump(params, anchor, best) if best else params, best, scored)
