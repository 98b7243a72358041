"""A folder of scores or of a probe: measured once, and named by all that determines it.

`walk` calls `evaluate` on finished weights and `probe` around stages; `evals` computes.
"""

import functools
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from s2d_jax import (
  compiling,
  evals,
  files,
  hosts,
  keys,
  manifest,
  prefixes,
  program_cache,
  rollouts,
  sampler,
  sharding,
  stage,
  stats,
  training,
)
from s2d_jax.identity import identity_of
from s2d_jax.losses.agreement import agreement
from s2d_jax.planning import Plan
from s2d_jax.roles import Role
from s2d_jax.rollouts import Prompt, Rollout

_ROWS = 64  # samples that a stopped evaluation loses at most, beside those being decoded


def evaluate(plan: Plan, role: str, name: str, workdir: epath.Path) -> str:
  """Scores a role's weights by config.evals[name], once; returns the folder's name."""
  config = plan.config.evals[name]
  prompts = plan.prompts[config.split]
  prompts = prompts[: config.problems] if config.problems else prompts
  # The function that finds answers decides maj@k, as the reward decides the rest.
  answer = plan.task.answer and identity_of(plan.task.answer)
  inputs = {"weights": plan.identity(role), "answer": answer,
            "evaluation": keys.hashed(config, evals.EVALUATION_KEYS),
            **_common_inputs(plan, prompts)}
  folder = workdir / manifest.name("eval", inputs)
  # A finished score is never taken again: arms that end in equal weights share it.
  if manifest.read(folder) is None:
    learner = stage.load(plan, role, workdir, sharding.current_mesh())
    with sampler.naming(_folder(plan, role)):
      result, samples = _scores(plan, config, learner, prompts, folder)
    _write(folder, inputs, {"result.json": result, "samples.json": samples},
           {"set": plan.sets.get(config.split)})
  return folder.name


def probe(plan: Plan, role: str, guide: str | None, workdir: epath.Path) -> str | None:
  """Measures a role's weights before or after a stage, once.

  On config.probe.problems of a split whose answers no arm buys: the pass rate, the share of mixed
  groups, the length; and with a `guide` (a role), the agreement of the two on the text of each
  (`losses.agreement`) and, where the config asks for it, the prefix probe. Probes are diagnostics:
  no ledger charges them.

  Returns:
    The folder's name, or None where config.probe.problems is 0.
  """
  config = plan.config.probe
  if config.problems == 0:
    return None
  prompts = plan.prompts[config.split][: config.problems]
  inputs = {"weights": plan.identity(role), "guide": guide and plan.identity(guide),
            "probe": keys.hashed(config, evals.PROBE_KEYS), **_common_inputs(plan, prompts)}
  if config.get("prefixes", 0):
    # Which responses have an answer is for this function to say.
    inputs["answer"] = plan.task.answer and identity_of(plan.task.answer)
  folder = workdir / manifest.name("probe", inputs)
  if manifest.read(folder) is None:
    mesh = sharding.current_mesh()
    roles = {"student": stage.load(plan, role, workdir, mesh)}
    if guide is not None:
      roles["teacher"] = stage.load(plan, guide, workdir, mesh)
    _write(folder, inputs, {"result.json": files.plain(
        _measured(plan, roles, {"student": role, "teacher": guide}, prompts, mesh))})
  return folder.name


def _common_inputs(plan: Plan, prompts: Sequence[Prompt]) -> dict[str, Any]:
  """The part of a folder's inputs that scores and probes share."""
  return {"dtype": plan.config.dtype, "cache": plan.config.sampler.cache, "seed": plan.config.seed,
          "tokenizer": plan.chat.fingerprint(), "task": plan.task_identity(),
          "problems": manifest.digest([(p.id, p.tokens, plan.problems[p.id]["answer"])
                                       for p in prompts])}


def _write(folder: epath.Path, inputs: dict[str, Any], contents: Mapping[str, Any],
           recorded: Mapping[str, Any] = MappingProxyType({})) -> None:
  """Writes the files of a folder, the manifest last: it marks the folder finished.

  Args:
    recorded: further entries of the manifest, which do not name the folder.
  """
  # One process writes; the others wait, because they read the folder next.
  if hosts.leader():
    for name, content in contents.items():
      files.write_json(folder / name, content)
  manifest.write(folder, {"inputs": inputs, **recorded,
                          **manifest.provenance(sharding.current_mesh())})


def _folder(plan: Plan, role: str) -> str:
  """The folder of a role's weights, to name them: a base model's, or the stage's."""
  return plan.base(role)["folder"] if role in plan.bases else role


def _measured(plan: Plan, roles: Mapping[str, Role], names: Mapping[str, str],
              prompts: Sequence[Prompt], mesh: Mesh) -> dict[str, dict[str, Any]]:
  """The measurements on the text of each role; with a teacher, the agreement on it as well.

  Returns:
    {"student": {name: value}}; "teacher" likewise where `roles` has one, and "prefixes" where the
    config asks for it as well.
  """
  config = plan.config.probe
  # Compiled once and run on the text of both: which text is compared changes no shape.
  compared = None
  if "teacher" in roles:
    pair = (roles["student"].model, roles["teacher"].model)
    compared = program_cache.shared(
        ("compare", *pair, FrozenConfigDict(config.to_dict()), mesh),
        lambda: training.compare(*pair, agreement, config))
  found = {}
  held = sharding.device_bytes([role.params for role in roles.values()])
  samplers = compiling.samplers(plan.config, plan.chat)._replace(held=held)
  completions = {}
  finish = None
  if "teacher" in roles and config.get("prefixes", 0):
    finish = _finisher(plan, samplers, roles["teacher"], prompts)
  for name, role in roles.items():
    compiled = {"sampled": samplers.compile(role, config.sampling, config.prompts)}
    with sampler.naming(_folder(plan, names[name])):
      one = evals.run(compiled, role.params, prompts, plan.reward,
                      (plan.config.seed, zlib.crc32(b"probe")), lambda samples: ())
    rollout = one.rollouts["sampled"]
    found[name] = dict(evals.text(one.samples["sampled"].correct_PG, rollout, config.group))
    if finish is not None and name == "student":
      with sampler.naming(_folder(plan, names["teacher"])):
        completions["prefixes"] = finish(rollout)
    if compared is None:
      continue
    # In batches of the rows that were sampled side by side, so that memory is bounded alike.
    size = config.prompts * config.sampling.samples_per_prompt
    batch = rollouts.batch(rollout)
    parts = []
    for b in range(0, len(rollout.prompt_id_B), size):
      part = jax.tree.map(operator.itemgetter(slice(b, b + size)), batch)
      parts.append(jax.device_get(compared(roles["student"].params, roles["teacher"].params,
                                           sharding.put_batch(part, mesh))))
    values = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    of_tokens = [values.pop(key) for key in ("teacher_rank", "delta_logp")]
    found[name] |= dict(evals.sampled_tokens(*of_tokens, batch, rollout, config.top_k))
    pair = " and ".join(_folder(plan, names[one]) for one in roles)
    with sampler.naming(pair):
      found[name] |= dict(evals.agreement(values, batch.weight_BT))
  return found | completions


def _finisher(plan: Plan, samplers: compiling.Samplers, guide: Role,
              prompts: Sequence[Prompt]) -> Callable[[Rollout], dict[str, Any]]:
  """The prefix probe of a guide, as a function of the learner's samples; it is compiled now."""
  config = plan.config.probe
  chosen = prefixes.settings(samplers, config)
  compiled = chosen.samplers.compile(guide, config.sampling, chosen.batch, **chosen.changes)
  return lambda begun: prefixes.measure(
      compiled, guide.params, prompts[: config.prefixes], begun, plan.reward, plan.answer,
      (plan.config.seed, zlib.crc32(b"prefixes")))


def _scores(plan: Plan, config: ConfigDict, learner: Role, prompts: Sequence[Prompt],
            folder: epath.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(result, samples): every statistic with the samples behind it, and some of them as text.

  Args:
    folder: of the score, which keeps every sample as soon as some have ended.
  """
  samplers = compiling.samplers(plan.config, plan.chat)._replace(
      held=sharding.device_bytes(learner.params))
  compiled = functools.partial(samplers.compile, learner)
  # A store's rows have the width of the prompts, which names no score.
  stores = {way: rollouts.Store(folder / f"{way}-{plan.config.prompt_tokens}")
            for way in evals.ways(config)}
  evaluate_params = evals.evaluator(config, compiled, prompts, plan.reward, plan.answer,
                                    plan.config.seed, {way: _stored(store)
                                                       for way, store in stores.items()})
  one = evaluate_params(learner.params)
  for way, store in stores.items():
    # Log-probabilities depend by rounding on the rows that were sampled side by side, so a score
    # that was stopped has others. No score reads them, and they are stored as zeros.
    rollout = one.rollouts[way]
    zeros_BT = np.zeros_like(rollout.sampler_logp_BT)
    store.gather("all", rollout._replace(sampler_logp_BT=zeros_BT, behaviour_logp_BT=zeros_BT))
  # Without a statistic of sampled responses only greedy ones exist.
  way = next(iter(one.samples))
  return evals.record(one), _texts(plan, config, one.samples[way], one.rollouts[way])


def _stored(store: rollouts.Store) -> evals.Stored:
  """The rows of a store, to which rows are added as they end, `_ROWS` at a time."""
  finished: list[int] = []

  def on_finish(row: int, rollout: Rollout) -> None:
    finished.append(row)
    if len(finished) == _ROWS:
      part = rollouts.take(rollout, finished)
      # A row is sampled once, so its name is that of no other part.
      store.add(f"{part.prompt_id_B[0]}-{part.sample_index_B[0]}", part)
      finished.clear()

  return evals.Stored(store.rows(), on_finish)


def _texts(plan: Plan, config: ConfigDict, samples: stats.Samples,
           rollout: Rollout) -> list[dict[str, Any]]:
  """The first sample of the first `log_samples` problems, as text."""
  return [{"prompt_id": int(rollout.prompt_id_B[b]), "text": plan.chat.decode(rollout.response(b)),
           "reward": float(samples.correct_PG[p, 0])}
          for p, b in enumerate(range(0, len(rollout.prompt_id_B), samples.correct_PG.shape[1]))
          if p < config.log_samples]
