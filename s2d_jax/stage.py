"""One node of the walk on disk: a stage's folder from its roles to its manifest, or a score's.

It turns a node of `planning.Plan` into what `loop.run` takes, and leaves the folder finished:
final weights, a Hugging Face folder, the ledger, and last the manifest.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
import zlib

import jax
import numpy as np

from s2d_jax import (
  checkpoint,
  evals,
  files,
  hosts,
  keys,
  loop,
  manifest,
  metrics,
  models,
  objectives,
  optim,
  rollouts,
  sampler,
  sharding,
  training,
)
from s2d_jax.losses.agreement import agreement
from s2d_jax.models import hf


def train_node(made, node, workdir, stop):
  """Runs one stage to its end and leaves its folder finished: the manifest is written last."""
  mesh, folder = sharding.current_mesh(), workdir / node.name
  with files.only_writer(folder) as (beat, left):
    work = _work(made, node, workdir, mesh)
    params, totals = loop.run(work, beat, left, stop)
    model, params = _whole(work.learner.model, params, work.frozen)
    checkpoint.save_final(folder, params)
    lineage = {"stage": node.name, "parents": made.ancestors(node.name)[:-1],
               "bases": {r: b["identity"] for r, b in made.bases.items()},
               "revision": manifest.revision()}
    _export(folder / "hf", model, params, made.base(node.name)["folder"], lineage)
    if hosts.leader():
      files.write_json(folder / "ledger.json", totals)
      files.write_json(folder / "manifest.json", metrics.plain({
          "inputs": node.inputs, "config": made.config.to_dict(), "bases": made.bases,
          **manifest.provenance(mesh)}))
    hosts.barrier(node.name)
    checkpoint.drop_steps(folder)


def _validation(made, model, params):
  """validate(params), its sampler compiled; for a stage that asks for it."""
  config = made.config.validation
  draw = sampler.make(model, params,
                      loop.sampling(config.sampling, made.chat.eos_ids), config.problems,
                      made.config.prompt_tokens, _room(made.config), made.chat.decode)
  return evals.validation(draw, made.prompts[config.split][: config.problems], made.reward,
                          (made.config.seed, zlib.crc32(b"validation")))


def _export(folder, *saved):
  """`hf.save`; to an object store by way of a local folder, since a store knows no rename."""
  if "://" not in os.fspath(folder):
    hf.save(folder, *saved)
    return
  with tempfile.TemporaryDirectory() as scratch:
    written = hf.save(pathlib.Path(scratch) / "hf", *saved)  # by the first process
    for path in written.iterdir() if hosts.leader() else ():
      files.write(folder / path.name, path.read_bytes())


def _whole(model, params, frozen):
  """A trained model without adapters, and its weights."""
  if frozen is None:
    return model, params
  merged = jax.jit(functools.partial(models.merge, model.config),
                   out_shardings=training.shardings(frozen))(training.join(params, frozen))
  return models.build(dataclasses.replace(model.config, lora=None)), merged


def _learner(made, node, workdir, mesh):
  """(what is trained, the leaves beside it that are not): adapters alone where the row has some.

  What adapters stand beside is float32 too: merged, it is what the stage leaves behind.
  """
  learner = _load(made, node.learner, workdir, mesh, models.shapes)
  lora = models.lora(node.hp.lora)
  if lora is None:
    return learner, None
  model = models.build(dataclasses.replace(learner.model.config, lora=lora))
  seed = zlib.crc32(f"{made.config.seed} {node.stage.name} adapters".encode())
  return loop.Role(model, models.adapters(model, seed)), learner.params


def _work(made, node, workdir, mesh):
  """Everything `loop.run` needs to know of a node."""
  config, row = made.config, node.stage
  hp, seed = node.hp, config.seed
  learner, rest = _learner(made, node, workdir, mesh)
  frozen = {role: _load(made, role, workdir, mesh) for role in {node.actor, node.guide} - {None}}
  return loop.Work(
      name=row.name, folder=workdir / node.name, hp=hp, seed=seed, prompts=made.prompts[node.split],
      width=config.prompt_tokens, stop_ids=made.chat.eos_ids, learner=learner,
      actor=frozen.get(node.actor), guide=frozen.get(node.guide), frozen=rest,
      given=_given(made, hp) if row.actor == "given" else None,
      reward=made.reward if row.reward or row.prompt_weights else None,
      advantages=objectives.ADVANTAGES[hp.advantages] if row.reward else None,
      judge=_load(made, node.learner, workdir, mesh) if row.prompt_weights else None,
      weigh=row.prompt_weights,
      punish=objectives.length_penalty(hp) if row.reward else None,
      objective=row.objective, logp=objectives.logp,
      optimizer=optim.make(hp.optim, loop.update_count(hp), models.trained(learner.model.config)),
      store=lambda: rollouts.Store(workdir / _rollouts(made, node.actor, node.hp),
                                  files.write),
      passes=lambda: rollouts.Store(workdir / _rollouts(made, node.learner, node.hp, "passes"),
                                   files.write),
      validate=_validation(made, learner.model, training.join(learner.params, rest))
      if hp.eval_every else None,
      text=made.chat.decode, room=loop.room(config.sampler))


def _room(config):
  """The sampler.Room of what scores: a narrower cache is for stages, which check it first."""
  return loop.room(config.sampler).exact()


def _load(made, role, workdir, mesh, shapes=models.frozen_shapes):
  """A role's model and weights, in a copy of its own: the learner's buffers are donated.

  They are stored as shapes(config) says: as a frozen model's, if not otherwise.
  """
  folder = made.base(role)["folder"]
  run = {key: made.config[key] for key in models.RUN}
  if role in made.bases:
    return loop.Role(*hf.load(folder, mesh, run=run, shapes=shapes))
  model = models.get(hf.read_json(folder), **run)
  shapes = shapes(model.config)
  abstract = sharding.laid_out(shapes, sharding.weight_shardings(
      mesh, models.axes(model.config), shapes))
  return loop.Role(model, checkpoint.load_final(workdir / role, abstract))


def _rollouts(made, actor, hp, kind="rollouts"):
  """The folder of a frozen actor's rollouts; samples_per_prompt does not name a row, so is out."""
  record = {name: key for name, key in sampler.Sampling.KEYS.items()
            if name != "samples_per_prompt"}
  return manifest.name(kind, {
      "actor": made.identity(actor), "sampling": keys.hashed(hp.sampling, record),
      "seed": made.config.seed,
      "prompts": manifest.digest(made.prompts["all"]), "width": made.config.prompt_tokens,
      "tokenizer": made.chat.fingerprint(), "dtype": made.config.dtype,
      "cache": made.config.sampler.cache, "drawn by": "one uniform number a token"})


def _given(made, hp):
  """draw(prompts) -> Rollout of the problems' own solutions, one a problem, end token included."""
  def draw(picked):
    T = hp.sampling.max_tokens
    rows = [made.chat.encode_response(made.problems[p.id]["solution"]) for p in picked]
    return rollouts.given(picked, rows, made.config.prompt_tokens, T)
  return draw


def evaluate(made, role, workdir):
  """Scores a role's weights on the evaluation split, once; returns the folder's name."""
  config, mesh = made.config.evaluation, sharding.current_mesh()
  prompts = made.prompts[config.split]
  inputs = {"weights": made.identity(role),
            "evaluation": keys.hashed(config, evals.EVALUATION_KEYS),
            "dtype": made.config.dtype, "cache": made.config.sampler.cache,
            "seed": made.config.seed,
            "tokenizer": made.chat.fingerprint(), "task": made.task_identity(),
            "problems": manifest.digest([(p.id, p.tokens, made.problems[p.id]["answer"])
                                         for p in prompts])}
  folder = workdir / manifest.name("eval", inputs)
  if manifest.read(folder) is None:
    learner = _load(made, role, workdir, mesh)
    result, samples = _scores(made, learner, prompts)
    if hosts.leader():
      files.write_json(folder / "result.json", result)
      files.write_json(folder / "samples.json", samples)
      files.write_json(folder / "manifest.json",
                            {"inputs": inputs, **manifest.provenance(mesh)})
    hosts.barrier(folder.name)
  return folder.name


def probe(made, role, guide, workdir):
  """Measures a role's weights before or after a stage, once; returns the folder's name, or None.

  On config.probe.problems of a split whose answers no arm buys: how often the model is right, how
  many groups are mixed, how long it writes; and with a `guide` (a role), how near the two are on
  the text of each (`losses.agreement`). Probes are diagnostics: no ledger charges them.
  """
  config, mesh = made.config.probe, sharding.current_mesh()
  if config.problems == 0:
    return None
  prompts = made.prompts[config.split][: config.problems]
  inputs = {"weights": made.identity(role), "guide": guide and made.identity(guide),
            "probe": keys.hashed(config, evals.PROBE_KEYS), "dtype": made.config.dtype,
            "cache": made.config.sampler.cache, "seed": made.config.seed,
            "tokenizer": made.chat.fingerprint(), "task": made.task_identity(),
            "problems": manifest.digest([(p.id, p.tokens, made.problems[p.id]["answer"])
                                         for p in prompts])}
  folder = workdir / manifest.name("probe", inputs)
  if manifest.read(folder) is None:
    result = _measured(made, role, guide, prompts, workdir, mesh)
    if hosts.leader():
      files.write_json(folder / "result.json", metrics.plain(result))
      files.write_json(folder / "manifest.json",
                            {"inputs": inputs, **manifest.provenance(mesh)})
    hosts.barrier(folder.name)
  return folder.name


def _measured(made, role, guide, prompts, workdir, mesh):
  """{"student": {...}, and with a guide "teacher": {...}}: each one's text, and both upon it."""
  config = made.config.probe
  models_ = {"student": _load(made, role, workdir, mesh)}
  if guide is not None:
    models_["teacher"] = _load(made, guide, workdir, mesh)
    compared = training.compare(models_["student"].model, models_["teacher"].model,
                              agreement, config)
  found = {}
  for name, (model, params) in models_.items():
    draw = sampler.make(model, params, loop.sampling(config.sampling, made.chat.eos_ids),
                        config.prompts, made.config.prompt_tokens, _room(made.config),
                        made.chat.decode)
    correct_PG, rows = evals.solve(draw, params, prompts, made.reward,
                                   (made.config.seed, zlib.crc32(b"probe")))
    found[name] = dict(evals.text(correct_PG, rows, config.group))
    if guide is not None:
      size, parts = config.prompts * config.sampling.samples_per_prompt, []
      batch = rollouts.batch(rows)
      for b in range(0, len(rows.prompt_id_B), size):
        part = rollouts.Batch(*(x[b: b + size] for x in batch))
        parts.append(sharding.fetch(compared(models_["student"].params, models_["teacher"].params,
                                             sharding.put_batch(part, mesh))))
      values = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
      found[name] |= dict(evals.agreement(values, batch.weight_BT))
  return found


def _scores(made, learner, prompts):
  """(result, samples) of one model: greedy, avg@k and pass@k, with the matrix behind them."""
  config, seed = made.config.evaluation, (made.config.seed, zlib.crc32(b"evaluation"))
  sampled = loop.sampling(config.sampling, made.chat.eos_ids)
  greedy = sampled._replace(samples_per_prompt=1, temperature=0.0)
  matrices, found = {}, {}
  for name, how in (("sampled", sampled), ("greedy", greedy)):
    draw = sampler.make(learner.model, learner.params, how, config.prompts,
                        made.config.prompt_tokens, _room(made.config), made.chat.decode)
    matrices[name], rows = evals.solve(draw, learner.params, prompts, made.reward, seed)
    if name == "sampled":
      found["response_length"] = float(rows.response_length_B.mean())
      samples = [{"prompt_id": int(rows.prompt_id_B[b]), "text": made.chat.decode(rows.response(b)),
                  "reward": float(matrices[name].reshape(-1)[b])}
                 for b in range(0, len(rows.prompt_id_B), sampled.samples_per_prompt)]
  bootstrap = (made.config.seed, config.draws, config.level)
  greedy_scores = dict(evals.scores(matrices["greedy"], (), *bootstrap))
  found["scores"] = {"greedy": greedy_scores["avg@1"],
                     **dict(evals.scores(matrices["sampled"], config.ks, *bootstrap))}
  found["correct"] = matrices["sampled"].astype(int).tolist()
  found["greedy"] = matrices["greedy"].astype(int)[:, 0].tolist()
  return found, samples[: config.log_samples]
