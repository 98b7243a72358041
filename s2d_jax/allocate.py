"""Shares of problem families among the prompts of a step, decided every few steps: ReAD.

Learning from one family may help or harm another. Every `interval` steps the learner is probed: its
mean log-probability, in nats a token, of responses that the teacher gave once, family by family. A
rule then chooses the shares of the following steps. No answer is read.

"Reinforcement-Guided Capability Distillation", https://arxiv.org/abs/2605.11290. Its learned
requirements, its curriculum and its limits on templates are left out: its release writes the
requirements by hand, and our families have neither grades of difficulty nor templates.

Arrays end in their axes: F families, N decisions so far, A actions, K inputs of a model.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import keys, manifest
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.rollouts import Prompt


def parse(text: str) -> dict[str, float]:
  """{"left": 0.25, "right": 0.75} of "left=0.25,right=0.75"; {} of an empty text."""
  pairs = (item.partition("=") for item in filter(None, text.split(",")))
  return {name.strip(): float(share) for name, _, share in pairs}


def _are_shares(text: str) -> bool:
  shares = parse(text).values()
  # A name that stands twice would count once.
  return not text or (len(shares) == len([*filter(None, text.split(","))]) and min(shares) >= 0
                      and abs(sum(shares) - 1) < 1e-6)


_SHARES = Key(_are_shares, "write families with shares that sum to one, as in left=0.25,right=0.75")
_PROBING = ("ensemble", "transfer", "largest_gap")
VERSION = 1  # raised when a rule decides otherwise: it is in the names of stages
KEYS = {
  "interval": keys.at_least(1),   # steps between decisions
  "rule": keys.one_of((*_PROBING, "uniform", "fixed")),
  "weights": _SHARES,             # of the rule "fixed"; empty for the others
  "requirement": _SHARES,         # how much each family counts; empty: equally
  # of a model's spread, added to its mean; 30 % less after each tenth of the stage without a gain
  "kappa": Key(lambda weight: weight >= 0, "choose 0 or more; the paper has 1"),
  # of families that become worse
  "beta": Key(lambda weight: weight >= 0, "choose 0 or more; the paper has 0.5"),
  "explore": keys.at_least(1),    # random decisions before a model is asked; the paper has 5
  "problems": keys.at_least(1),   # that are probed, of the probe's split, equally many a family
}


def probes(hp: ConfigDict) -> bool:
  """Whether the stage's rule reads probes of the learner."""
  return "allocate" in hp and hp.allocate.rule in _PROBING


def check(hp: ConfigDict, has_teacher: bool) -> None:
  """Refuses shares that a stage cannot take; a message begins with the key's name.

  Args:
    hp: the stage's config.
    has_teacher: whether a frozen model samples, or the teacher guides. A reference does not count:
      it is the learner's own start.

  Raises:
    InputError: see the messages.
  """
  if "allocate" not in hp:
    return
  rule = hp.allocate.rule
  if "pass_samples" in hp:
    raise InputError("allocate chooses problems and this stage weights them by pass rates already: "
                     "take one of the two out.")
  if hp.get("rounds", 0) > 1:
    raise InputError(f"allocate decides the problems of a step once and rounds is {hp.rounds}: set "
                     "rounds to 0 or 1.")
  if probes(hp) and not has_teacher:
    raise InputError(f"allocate.rule is {rule!r}, which compares with a teacher, and this stage "
                     "has none: choose 'uniform' or 'fixed'.")
  if (rule == "fixed") != bool(hp.allocate.weights):
    raise InputError(f"allocate.weights is {hp.allocate.weights!r} and the rule {rule!r}: the rule "
                     "'fixed' needs weights, and no other reads them.")
  if hp.allocate.requirement and rule not in _PROBING:
    raise InputError(f"allocate.requirement is {hp.allocate.requirement!r} and the rule {rule!r} "
                     "does not read it: leave it empty.")


def check_families(hp: ConfigDict, split: str, family_of: Callable[[int], str] | None,
                   prompts: Sequence[Prompt], probed: Sequence[Prompt]) -> None:
  """Refuses problems that do not have the families of a stage; as `check`.

  Args:
    split: the name of the stage's problems; family_of: of a problem's id, or None.
    prompts: of the stage; probed: of the probe's split.
  """
  if family_of is None:
    raise InputError("allocate chooses families and the task has none: give planning.Task a "
                     "`family`, or take it out.")
  names = [family_of(p.id) for p in prompts]
  for prompt, name in zip(prompts, names, strict=True):
    if not isinstance(name, str):
      raise InputError(f"allocate reads families and that of problem {prompt.id} is {name!r}: let "
                       "the task's `family` return a text.")
  found = sorted(set(names))
  for key in ("weights", "requirement"):
    for name in parse(hp.allocate[key]):
      if name not in found:
        raise InputError(f"allocate.{key} names the family {name!r} and no problem of the split "
                         f"{split} is of it: choose from {', '.join(found)}.")
  for name, most in zip(found, _most(hp, found), strict=True):
    if names.count(name) < most:
      raise InputError(f"allocate may draw {most} prompts of a step from the family {name!r}, "
                       f"which has {names.count(name)} problems: lower prompts.")
  if probes(hp):
    if hp.allocate.problems < len(found):
      raise InputError(f"allocate.problems is {hp.allocate.problems} and there are {len(found)} "
                       "families, of which each is probed: raise it.")
    for name, needed in zip(found, counts(np.ones(len(found)) / len(found), hp.allocate.problems),
                            strict=True):
      there = sum(family_of(p.id) == name for p in probed)
      if there < needed:
        raise InputError(f"allocate.problems takes {needed} probed problems of the family {name!r} "
                         f"and the probe's split has {there}: lower it.")


def _most(hp: ConfigDict, families: Sequence[str]) -> list[int]:
  """The most prompts of a step that each family may give."""
  if probes(hp):
    return [hp.prompts] * len(families)
  return counts(decide([], 0, None, None, families, hp, ()).share_F, hp.prompts)


def inputs(hp: ConfigDict, prompts: Sequence[Prompt] | None, scored: Sequence[Prompt] | None,
           family_of: Callable[[int], str] | None) -> dict[str, str]:
  """All that shares depend on beside the config, for the name of a stage; {} where it has none.

  Args:
    prompts: of the stage; scored: of the probe's split; None in a plan without problems.
  """
  if "allocate" not in hp or prompts is None:
    return {}
  read = (*prompts, *(scored if probes(hp) else ()))
  return {"families": manifest.digest([VERSION, *((p.id, p.tokens, family_of(p.id))
                                                  for p in read)])}


def probed(prompts: Sequence[Prompt], family_of: Callable[[int], str], families: Sequence[str],
           hp: ConfigDict) -> dict[str, list[Prompt]]:
  """The problems that the learner is probed on, by family: the first ones; {} without probes."""
  if not probes(hp):
    return {}
  needed = counts(np.ones(len(families)) / len(families), hp.allocate.problems)
  return {name: [p for p in prompts if family_of(p.id) == name][:n]
          for name, n in zip(families, needed, strict=True)}


def counts(share_F: np.ndarray, size: int) -> list[int]:
  """Whole numbers near share · size whose sum is `size`, by the largest remainder."""
  exact_F = np.asarray(share_F, np.float64) * size
  count_F = np.floor(exact_F + 1e-9).astype(int)
  # Stable, so that of equal remainders the first one is raised.
  order = np.argsort(count_F - exact_F, kind="stable")
  count_F[order[: size - count_F.sum()]] += 1
  return count_F.tolist()


class Order:
  """The order in which a stage draws its prompts, where shares of families are decided.

  Attributes:
    families: names, sorted.
    decisions: rows of the stage's log, each with its "step" and "shares"; a caller sets it.
  """

  def __init__(self, prompts: Sequence[Prompt], family_of: Callable[[int], str], seed: int,
               stage: str, size: int) -> None:
    self.families = sorted({family_of(p.id) for p in prompts})
    self.decisions: list[Mapping[str, Any]] = []
    self._key = (seed, zlib.crc32(stage.encode()))
    self._size = size
    # A family is drawn in one seeded order, again and again: all of it before any problem repeats,
    # and no problem twice in a step.
    self._cycle: dict[str, list[Prompt]] = {}
    self._position: dict[int, tuple[str, int]] = {}
    for name in self.families:
      of_family = [p for p in prompts if family_of(p.id) == name]
      rng = np.random.default_rng((*self._key, zlib.crc32(name.encode())))
      self._cycle[name] = [of_family[i] for i in rng.permutation(len(of_family))]
      self._position |= {p.id: (name, i) for i, p in enumerate(self._cycle[name])}

  def __call__(self, step: int, round: int) -> list[Prompt]:
    """The prompts of a step, in a seeded order; a step has one round."""
    del round
    start, count = self._counted(step)
    prompts = []
    for name, first, n in zip(self.families, start, count, strict=True):
      cycle = self._cycle[name]
      prompts += [cycle[(first + i) % len(cycle)] for i in range(n)]
    order = np.random.default_rng((*self._key, step)).permutation(len(prompts))
    return [prompts[i] for i in order]

  def epoch(self, step: int, prompt: Prompt) -> int:
    """How often a prompt of a step was drawn before it."""
    name, position = self._position[prompt.id]
    first = self._counted(step)[0][self.families.index(name)]
    return max(0, -((position - first) // len(self._cycle[name])))

  def _counted(self, step: int) -> tuple[np.ndarray, list[int]]:
    """Of each family, the draws before a step, and those of the step."""
    before = [row for row in self.decisions if row["step"] <= step]
    # A sampler's cache is checked on prompts of step 0 before anything is decided.
    equal = dict.fromkeys(self.families, 1 / len(self.families))
    before = before or [{"step": step, "shares": equal}]
    drawn_F = np.zeros(len(self.families), int)
    for i, row in enumerate(before):
      count_F = counts([row["shares"][name] for name in self.families], self._size)
      end = before[i + 1]["step"] if i + 1 < len(before) else step
      drawn_F += np.array(count_F) * (end - row["step"])
    return drawn_F, count_F


def means(value_BT: np.ndarray, weight_BT: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """The mean over tokens with weight, for groups of consecutive rows of these sizes."""
  ends = np.cumsum(sizes)
  return np.array([value_BT[end - n : end][weight_BT[end - n : end] > 0].mean(dtype=np.float64)
                   for n, end in zip(sizes, ends, strict=True)])


def actions(families: int) -> np.ndarray:
  """The shares that a rule chooses from, [A, F]: one family, pairs at quarters, all the same."""
  one_FF = np.eye(families)
  pairs = [share * one_FF[i] + (1 - share) * one_FF[j] for i in range(families)
           for j in range(i + 1, families) for share in (0.25, 0.5, 0.75)]
  return np.array([*one_FF, *pairs, np.ones(families) / families])


def reward(requirement_F: np.ndarray, change_NF: np.ndarray, beta: float) -> np.ndarray:
  """The gain that the families' changes of score are worth, less beta times all that is lost."""
  return change_NF @ requirement_F - beta * np.maximum(-change_NF, 0) @ requirement_F


class Decision(NamedTuple):
  """Shares, with the reward that was predicted for them and its spread, where a model was asked."""
  share_F: np.ndarray
  mean: float | None = None
  spread: float | None = None


def decide(history: Sequence[Mapping[str, Any]], step: int, score_F: np.ndarray | None,
           teacher_F: np.ndarray | None, families: Sequence[str], hp: ConfigDict,
           seed: tuple[int, ...]) -> Decision:
  """The shares from `step` on.

  Args:
    history: rows of the decisions so far: "step", "shares" and "scores" by family.
    score_F, teacher_F: the learner's and the teacher's scores; None where the rule reads none.
    families: names, in the order of F.
    hp: the stage's config.
    seed: of the random decisions and of the models.
  """
  rule = hp.allocate.rule
  F = len(families)
  if rule == "uniform":
    return Decision(np.ones(F) / F)
  if rule == "fixed":
    return Decision(_vector(parse(hp.allocate.weights), families))
  requirement_F = np.ones(F) / F
  if hp.allocate.requirement:
    requirement_F = _vector(parse(hp.allocate.requirement), families)
  if rule == "largest_gap":
    return Decision(np.eye(F)[np.argmax(requirement_F * (teacher_F - score_F))])
  action_AF = actions(F)
  if len(history) < hp.allocate.explore:
    order = np.random.default_rng(seed).permutation(len(action_AF))
    return Decision(action_AF[order[len(history) % len(order)]])
  score_NF = np.array([*(_vector(row["scores"], families) for row in history), score_F])
  share_NF = np.array([_vector(row["shares"], families) for row in history])
  step_N = np.array([*(row["step"] for row in history), step])
  evidence = _Evidence(score_NF, teacher_F, share_NF, 1 - step_N / hp.steps, requirement_F,
                       hp.allocate.beta)
  rng = np.random.default_rng((*seed, len(history)))
  # The paper's five models, each of a bootstrap sample of the decisions.
  predicted_MA = [_MODELS[rule](evidence, rng.integers(len(history), size=len(history)), action_AF,
                                rng) for _ in range(5)]
  mean_A, spread_A = np.mean(predicted_MA, axis=0), np.std(predicted_MA, axis=0, ddof=1)
  kappa = hp.allocate.kappa * 0.7 ** _stalls(score_NF @ requirement_F, step_N, hp.steps)
  best = int(np.argmax(mean_A + kappa * spread_A))  # the first of equal ones
  return Decision(action_AF[best], float(mean_A[best]), float(spread_A[best]))


class _Evidence(NamedTuple):
  """All that a model learns from: N decisions, and the scores at each and now."""
  score_NF: np.ndarray      # N + 1 rows
  teacher_F: np.ndarray
  share_NF: np.ndarray
  remaining_N: np.ndarray   # of the stage, as a share, at each decision and now
  requirement_F: np.ndarray
  beta: float

  @property
  def change_NF(self) -> np.ndarray:
    """Changes of the scores after each decision."""
    return np.diff(self.score_NF, axis=0)


def _by_transfer(evidence: _Evidence, rows: np.ndarray, action_AF: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:
  """Rewards [A] by a linear model of the changes: a family moves every score by its share.

  The inputs are the shares, and the shares times each family's gap to the teacher, because near the
  teacher a family has less to teach. Least squares with a penalty, which draws the model to a world
  in which each family moves its score alone, all at one rate. This model is ours.
  """
  del rng
  F = action_AF.shape[1]
  gap_NF = evidence.teacher_F - evidence.score_NF
  moved_NF = (evidence.share_NF * gap_NF[:-1])[rows]
  inputs_NK = np.concatenate([evidence.share_NF[rows], moved_NF], axis=1)
  change_NF = evidence.change_NF[rows]
  rate = max(0.0, np.sum(moved_NF * change_NF) / (np.sum(moved_NF**2) + 1e-6))
  alone_KF = np.concatenate([np.zeros((F, F)), rate * np.eye(F)])
  squares_KK = inputs_NK.T @ inputs_NK + 0.1 * np.eye(2 * F)
  model_KF = alone_KF + np.linalg.solve(
      squares_KK, inputs_NK.T @ (change_NF - inputs_NK @ alone_KF))
  inputs_AK = np.concatenate([action_AF, action_AF * gap_NF[-1]], axis=1)
  return reward(evidence.requirement_F, inputs_AK @ model_KF, evidence.beta)


def _by_network(evidence: _Evidence, rows: np.ndarray, action_AF: np.ndarray,
                rng: np.random.Generator) -> np.ndarray:
  """Rewards [A] by the paper's regressor of scores, what remains of the stage, and shares."""
  situation_NK = np.concatenate([evidence.score_NF, evidence.remaining_N[:, None]], axis=1)
  inputs_NK = np.concatenate([situation_NK[:-1], evidence.share_NF], axis=1)
  now_AK = np.tile(situation_NK[-1], (len(action_AF), 1))
  reward_N = reward(evidence.requirement_F, evidence.change_NF, evidence.beta)
  return _network(inputs_NK[rows], reward_N[rows], np.concatenate([now_AK, action_AF], axis=1), rng)


_MODELS: dict[str, Callable[..., np.ndarray]] = {"ensemble": _by_network, "transfer": _by_transfer}


def _vector(of_family: Mapping[str, float], families: Sequence[str]) -> np.ndarray:
  return np.array([of_family.get(name, 0.0) for name in families])


def _stalls(utility_N: np.ndarray, step_N: np.ndarray, steps: int) -> int:
  """How many tenths of the stage did not begin with a higher score than the one before."""
  _, first = np.unique(step_N * 10 // steps, return_index=True)
  return int(np.sum(np.diff(utility_N[first]) <= 0))


def _network(inputs_NK: np.ndarray, target_N: np.ndarray, inputs_AK: np.ndarray,
             rng: np.random.Generator) -> np.ndarray:
  """Predictions [A] of the paper's regressor: two hidden layers of 64, Adam, 200 steps of 64 rows.
  """
  # Few decisions may agree in an input: at least this scale, or others would be far outside.
  centre_K, scale_K = inputs_NK.mean(axis=0), np.maximum(inputs_NK.std(axis=0), 0.1)
  centre, scale = target_N.mean(), max(target_N.std(), 1e-6)
  widths = (inputs_NK.shape[1], 64, 64, 1)
  params = [rng.normal(size=(m, n)) * np.sqrt(2 / m)
            for m, n in zip(widths[:-1], widths[1:], strict=True)]
  params += [np.zeros(n) for n in widths[1:]]
  first = [np.zeros_like(p) for p in params]   # Adam's moments
  second = [np.zeros_like(p) for p in params]

  def forward(inputs_NK: np.ndarray) -> list[np.ndarray]:
    layers = [(inputs_NK - centre_K) / scale_K]
    for i in range(3):
      layers.append(layers[-1] @ params[i] + params[3 + i])
      if i < 2:
        layers[-1] = np.maximum(layers[-1], 0)
    return layers

  for step in range(1, 201):
    rows = rng.integers(len(target_N), size=64)
    layers = forward(inputs_NK[rows])
    error_N1 = (layers[3][:, 0] - (target_N[rows] - centre) / scale)[:, None] * 2 / len(rows)
    grads: list[np.ndarray] = [np.empty(0)] * 6
    for i in (2, 1, 0):
      grads[i], grads[3 + i] = layers[i].T @ error_N1, error_N1.sum(axis=0)
      error_N1 = (error_N1 @ params[i].T) * (layers[i] > 0)
    for i, grad in enumerate(grads):
      first[i] = 0.9 * first[i] + 0.1 * grad
      second[i] = 0.999 * second[i] + 0.001 * grad**2
      params[i] -= 1e-3 * (first[i] / (1 - 0.9**step)) / (
          np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
  return forward(inputs_AK)[3][:, 0] * scale + centre
