"""How often the programs of a config run: in the stages of its arms, in evaluations and in probes.

The stages are those of `planning.without_problems`. One that several arms or runs of a sweep share
counts once, as it is trained once. So does a score of equal weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from s2d_jax import evals, keys, manifest, walk
from s2d_jax.data import sources
from s2d_jax.planning import Node, Plan
from s2d_jax.preflight.costs import Cost


class Part(NamedTuple):
  """One stage, evaluation or probe of a run."""
  name: str   # equal where a run does the part once
  kind: str   # "stage", "evaluation" or "probe"
  block: str  # the `stage` of its costs
  # steps or calls, by model; key "" applies to all programs
  times: Mapping[str, float]


class Total(NamedTuple):
  """The hours of all runs of a config, and what they are of."""
  hours: float             # every response being of max_tokens
  counts: dict[str, int]   # parts by kind
  left_out: tuple[str, ...]  # blocks that are not counted, each with the reason

  def __str__(self) -> str:
    counted = ", ".join(f"{count} {kind if count == 1 else f'{kind}s'}"
                        for kind, count in self.counts.items())
    without = f"; not counted: {', '.join(self.left_out)}" if self.left_out else ""
    return f"{counted or 'nothing'}, every response of max_tokens{without}"


def total(plans: Sequence[Plan], found: Sequence[Sequence[Cost]]) -> Total:
  """The Total of the runs of a config.

  Args:
    found: of each plan, the costs of its programs. A program without a least time counts nothing.
  """
  parts: set[str] = set()
  counts: dict[str, int] = {}
  left_out: dict[str, None] = {}
  seconds = 0.0
  for plan, costs in zip(plans, found, strict=True):
    for part in _parts(plan):
      if part.name in parts:
        continue
      parts.add(part.name)
      programs = [cost for cost in costs if cost.stage == part.block]
      if not programs or not part.times:
        reason = "its problems are not here" if programs else "not compiled"
        left_out[f"{part.block} ({reason})"] = None
        continue
      if any(cost.account is None for cost in programs):
        left_out[f"{part.block} (does not fit)"] = None
        continue
      counts[part.kind] = counts.get(part.kind, 0) + 1
      for cost in programs:
        times = part.times.get("", part.times.get(cost.program.split()[0], 0.0))
        if cost.least is not None:
          seconds += times * cost.runs * cost.least.seconds
  return Total(seconds / 3600, counts, tuple(left_out))


def _parts(plan: Plan) -> Iterator[Part]:
  """The parts of one run, some of them several times."""
  config = plan.config
  for name, node in plan.nodes.items():
    yield Part(name, "stage", node.stage.name, {"": float(node.hp.steps)})
    yield from _between_steps(plan, node)
    yield from _probes(plan, node)
  for scored in plan.scored.values():
    for role in scored.values():
      for block, hp in config.evals.items():
        if not evals.every(hp):
          yield _evaluation(plan, block, role, _model(plan, role), 1)


def _model(plan: Plan, role: str) -> str:
  """The base model, "teacher" or "student", whose shapes a role's weights have."""
  return role if role in plan.bases else plan.nodes[role].stage.learner


def _evaluation(plan: Plan, block: str, role: str, model: str, repeats: int) -> Part:
  """An evaluation of a role's weights, or of `repeats` states of them."""
  hp = plan.config.evals[block]
  problems = hp.problems or _problem_count(plan.config, hp.split)
  times = {} if problems is None else {model: repeats * problems / evals.batch(hp)}
  inputs = {"weights": plan.identity(role), "evaluation": keys.hashed(hp, evals.EVALUATION_KEYS),
            **_common(plan)}
  return Part(manifest.name("eval", inputs), "evaluation", block, times)


def _problem_count(config: ConfigDict, split: str) -> int | None:
  """Problems of a split that config.data names; None where it is not at hand."""
  path = config.data.get(split)
  return path and sources.count(path, split, config.data.get("dir", ""))


def _between_steps(plan: Plan, node: Node) -> Iterator[Part]:
  """The evaluations between the steps of a node."""
  for block, hp in evals.between_steps(plan.config.evals, node.stage.name).items():
    # The first is before step 0.
    repeats = -(-node.hp.steps // evals.every(hp))
    part = _evaluation(plan, block, node.name, node.stage.learner, repeats)
    yield part._replace(name=f"{node.name} {block}", block=f"{node.stage.name} {block}")


def _probes(plan: Plan, node: Node) -> Iterator[Part]:
  """The probes around a node, as `walk` makes them."""
  hp = plan.config.probe
  if not hp.problems or not node.stage.source.probed:
    return
  guide = walk.probe_guide(node)
  yield _probe(plan, node.learner, guide)
  # The walk compares a trained teacher with the untrained one.
  if guide in plan.nodes:
    yield _probe(plan, "teacher", None)
  if not node.stage.reward:
    yield _probe(plan, node.name, guide)


def _probe(plan: Plan, role: str, guide: str | None) -> Part:
  """A probe of a role's weights, beside a guide's where there is one."""
  hp = plan.config.probe
  calls = hp.problems / hp.prompts
  times = {_model(plan, role): calls}
  if guide is not None:
    model = _model(plan, guide)
    times[model] = times.get(model, 0.0) + calls
    # Both models score the text of either.
    times["both"] = 2 * calls
    # The guide answers from the prompt and after a prefix.
    if hp.get("prefixes", 0):
      times["prefixes"] = 2 * hp.prefixes / min(hp.prompts, hp.prefixes)
  inputs = {"weights": plan.identity(role), "guide": guide and plan.identity(guide),
            "probe": keys.hashed(hp, evals.PROBE_KEYS), **_common(plan)}
  return Part(manifest.name("probe", inputs), "probe", "probe", times)


def _common(plan: Plan) -> dict[str, Any]:
  """The inputs that scores and probes share."""
  config = plan.config
  return {"dtype": config.dtype, "cache": config.sampler.cache, "seed": config.seed,
          "tokenizer": plan.chat.fingerprint(), "task": config.task, "data": config.data.to_dict()}
