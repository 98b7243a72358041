"""Trains the two base models of an embedded world and records what they can do.

  python -m s2d_jax.assets.train_base --world composition

Writes WORLD/{teacher,student}/, Hugging Face folders, and WORLD/record.json beside this file. Plain
next-token training with the package's own model, loss and update; about five minutes on two CPU
cores. The student reads less, shorter and noisier text than the teacher. The numbers were chosen by
the scores of record.json alone, before any arm was trained.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from s2d_jax import models, objectives, optim, rollouts, sharding, training
from s2d_jax.assets import measure, tokenizer
from s2d_jax.assets.worlds import WORLDS, World
from s2d_jax.chat import Chat
from s2d_jax.models import hf
from s2d_jax.rollouts import Batch
from s2d_jax.sharding import Params

FOLDER = Path(__file__).parent
_ROW_TOKENS = 64  # of a packed row
_BATCH_ROWS = 32
_PAIRS_AT_ONCE = 1000  # packed together
_MAX_POSITIONS = 64


class Base(NamedTuple):
  """One base model: its shape, the text it reads, and the keys of its training."""

  width: int
  layers: int
  mlp: int
  single_steps: int  # read first, all of them right
  problems: int  # questions with a response, read afterwards
  longest: int  # operands of those problems
  worked_share: float  # the other responses are bare guesses
  slip_share: float  # of the steps of worked responses
  lr: float
  warmup: int = 50
  decay: str = "cosine"
  clip: float = 1.0
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  steps: int = 0  # set by the amount of text
  block: int = 4096
  microbatches: int = 1


BASES = {
  "arithmetic": {
    "teacher": Base(128, 4, 192, single_steps=45_000, problems=70_000, longest=4,
                     worked_share=0.6, slip_share=0.1, lr=3e-3),
    "student": Base(96, 2, 192, single_steps=45_000, problems=36_000, longest=3,
                     worked_share=0.5, slip_share=0.2, lr=4e-3),
  },
  "composition": {
    "teacher": Base(128, 4, 192, single_steps=40_000, problems=80_000, longest=4,
                     worked_share=0.9, slip_share=0.03, lr=3e-3),
    "student": Base(96, 2, 192, single_steps=40_000, problems=40_000, longest=3,
                     worked_share=0.5, slip_share=0.2, lr=4e-3),
  },
}


def _config_json(base: Base) -> dict[str, Any]:
  """config.json of a Qwen3 of this shape."""
  return {
    "model_type": "qwen3", "vocab_size": len(tokenizer.VOCABULARY), "hidden_size": base.width,
    "num_hidden_layers": base.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": base.mlp, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": _MAX_POSITIONS,
  }  # fmt: skip


def documents(world: World, base: Base, chat: Chat,
              seed: int) -> Iterator[tuple[list[int], list[int]]]:
  """The model's text in reading order: (ids of context, ids to predict)."""
  # Of validation and test too, not only of the labelled split.
  held_out = {row["problem"] for rows in world.splits().values() for row in rows}
  vocabulary = chat.vocabulary
  # The template puts one token before the problem's text and one behind it.
  head, tail = chat.render([{"role": "user", "content": ""}])

  def ids(text: str) -> list[int]:
    return [vocabulary[character] for character in text]

  for context, result in world.steps(seed, base.single_steps):
    yield ids(context), ids(result) + [chat.eos_ids[0]]
  for problem, response in world.corpus(
    seed, base.problems, base.longest, base.worked_share, base.slip_share, held_out
  ):
    yield [head, *ids(problem), tail], ids(response) + [chat.eos_ids[0]]


def _packed(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
  """A Batch of full rows: the pairs in order, some at a time, several packed into a row."""
  parts = []
  for start in range(0, len(pairs), _PAIRS_AT_ONCE):
    chosen = pairs[start : start + _PAIRS_AT_ONCE]
    prompts = [rollouts.Prompt(i, tuple(context)) for i, (context, _) in enumerate(chosen)]
    predicted = [ids for _, ids in chosen]
    rollout = rollouts.given_solutions(
      prompts, predicted, max(len(prompt.tokens) for prompt in prompts), max(map(len, predicted))
    )
    rows = rollouts.pack(rollouts.batch(rollout), _ROW_TOKENS)
    # `pack` leaves empty rows at the end, and puts the longest sequences first.
    used = np.flatnonzero(rows.segments_BT[:, 0])
    order = np.random.default_rng(start).permutation(used)
    parts.append(_take(rows, order))
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _take(batch: Batch, rows: np.ndarray | slice) -> Batch:
  """Some rows of a batch."""
  return jax.tree.map(lambda array: array[rows], batch)


def _train(world: World, name: str, base: Base, chat: Chat,
           seed: int) -> tuple[models.Model, Params]:
  """(model, params) after one pass over the documents; prints the loss on the way."""
  rows = _packed(list(documents(world, base, chat, seed)))
  # One pass: the schedule needs the number of updates, and the last rows are dropped.
  base = base._replace(steps=len(rows.inputs_BT) // _BATCH_ROWS)
  model = models.get(_config_json(base))
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    axes = models.axes(model.config)
    shapes = models.shapes(model.config)
    layout = sharding.weight_shardings(mesh, axes, shapes)
    params = jax.jit(model.init, out_shardings=layout)(jax.random.key(seed))
    optimizer = optim.make(base, base.steps, axes)
    state = training.init(optimizer, mesh, params)
    step = training.jit_update(
      model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, base, training.shardings(state)
    )
    for i in range(base.steps):
      batch = _take(rows, slice(i * _BATCH_ROWS, (i + 1) * _BATCH_ROWS))
      state, metrics = step(state, None, sharding.put_batch(batch, mesh))
      if (i + 1) % 100 == 0 or i + 1 == base.steps:
        loss = float(jax.device_get(metrics["loss"]))
        print(f"{name}: {i + 1} of {base.steps} updates, loss {loss:.3f}", flush=True)
  return model, jax.device_get(state.params)


def _write(folder: Path, model: models.Model, params: Params) -> None:
  """Writes the Hugging Face folder of one base model."""
  hf.save(folder, model, params)
  tokenizer.write(folder, _MAX_POSITIONS)
  generation = {"eos_token_id": 1, "pad_token_id": 0, "do_sample": True, "temperature": 1.0}
  (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _record(world: World, folder: Path, seed: int) -> dict[str, dict[str, float]]:
  """Scores of the two models of `folder`, measured from the files."""
  chat = Chat(folder / "teacher")
  loaded = {name: hf.load(folder / name) for name in ("teacher", "student")}
  found = {}
  rollout_of = {}
  for name, (model, params) in loaded.items():
    found[name], rollout_of[name] = measure.scores(world, chat, model, params,
                                                   "validation", (seed,))
    found[name]["parameters"] = sum(x.size for x in jax.tree.leaves(params))
  found["on the teacher's text"] = measure.overlap(loaded["teacher"], loaded["student"],
                                                   rollout_of["teacher"])
  return found


def main() -> None:
  """Trains, writes, measures."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--world", choices=WORLDS, default="arithmetic")
  parser.add_argument("--folder", type=Path, help="by default the world's, beside this file")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  start = time.monotonic()
  world, bases = WORLDS[args.world], BASES[args.world]
  target = args.folder or FOLDER / args.world
  target.mkdir(parents=True, exist_ok=True)
  # The text is tokenized before the models' folders exist.
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.write(folder, _MAX_POSITIONS)
    chat = Chat(folder)
  for name, base in bases.items():
    _write(target / name, *_train(world, name, base, chat, args.seed))
  results = {
    "command": f"python -m s2d_jax.assets.train_base --world={args.world} --seed={args.seed}",
    "jax": jax.__version__,
    "split": "validation",
    "bases": {name: base._asdict() for name, base in bases.items()},
    "scores": _record(world, target, args.seed),
    "seconds": round(time.monotonic() - start),
  }
  (target / "record.json").write_text(json.dumps(results, indent=2) + "\n")
  print(json.dumps(results["scores"], indent=2))


if __name__ == "__main__":
  main()
