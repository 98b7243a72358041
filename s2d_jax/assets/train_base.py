"""Trains the two base models of the embedded world and records what they can do.

  python -m s2d_jax.assets.train_base

Writes arithmetic/{teacher,student}/, Hugging Face folders, and arithmetic/record.json beside this
file. Plain next-token training with the package's own model, loss and update; about five minutes
on two CPU cores. The student reads less, shorter and noisier text than the teacher. What RL or
distillation make of it later is not looked at: the scores recorded here alone chose the numbers.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from s2d_jax import chat, models, objectives, optim, rollouts, sharding, training
from s2d_jax.assets import measure, tokenizer
from s2d_jax.data.arithmetic import problems
from s2d_jax.models import hf

FOLDER = Path(__file__).parent / "arithmetic"
ROW, ROWS = 64, 32  # tokens in a packed row, rows in a batch
MAX_POSITIONS = 64


class Base(NamedTuple):
  """One base model: its shape, what it reads, how fast it learns."""

  width: int
  layers: int
  mlp: int
  sums: int  # single steps, read first, all of them right
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
  "teacher": Base(
    128, 4, 192, sums=45_000, problems=70_000, longest=4, worked_share=0.6, slip_share=0.1, lr=3e-3
  ),
  "student": Base(
    96, 2, 192, sums=45_000, problems=36_000, longest=3, worked_share=0.5, slip_share=0.2, lr=4e-3
  ),
}


def config_json(base):
  """config.json of a Qwen3 of this shape."""
  return {
    "model_type": "qwen3", "vocab_size": len(tokenizer.VOCABULARY), "hidden_size": base.width,
    "num_hidden_layers": base.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": base.mlp, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": MAX_POSITIONS,
  }  # fmt: skip


def documents(base, talk, seed):
  """What the model reads, in order: (ids given, ids to predict) of sums, then of problems."""
  held_out = {row["problem"] for rows in problems.splits().values() for row in rows}
  vocabulary = talk.vocabulary
  head, tail = talk.render([{"role": "user", "content": ""}])  # around the problem's text

  def ids(text):
    return [vocabulary[character] for character in text]

  for given, total in problems.sums(seed, base.sums):
    yield ids(given), ids(total) + [talk.eos_ids[0]]
  for problem, response in problems.corpus(
    seed, base.problems, base.longest, base.worked_share, base.slip_share, held_out
  ):
    yield [head, *ids(problem), tail], ids(response) + [talk.eos_ids[0]]


def packed(pairs):
  """A Batch of full rows: the pairs as given, 1,000 at a time, packed several to a row."""
  parts = []
  for start in range(0, len(pairs), 1000):
    given, predicted = zip(*pairs[start : start + 1000], strict=True)
    given_BT, given_length_B = _padded(given)
    predicted_BT, length_B = _padded(predicted)
    B = len(given)
    wrote = rollouts.Rollout(
      np.arange(B), np.zeros(B, np.int32), given_BT, given_length_B, predicted_BT, length_B,
      *(np.zeros(predicted_BT.shape, np.float32) for _ in range(2)), np.ones(B, np.int32), 0,
    )  # fmt: skip
    rows = rollouts.pack(rollouts.batch(wrote), ROW)
    used = np.flatnonzero(rows.segments_BT[:, 0])
    order = np.random.default_rng(start).permutation(used)  # `pack` puts the longest first
    parts.append(rollouts.Batch(*(x[order] for x in rows)))
  return rollouts.Batch(*(np.concatenate(xs) for xs in zip(*parts, strict=True)))


def _padded(sequences):
  length_B = np.array([len(ids) for ids in sequences], np.int32)
  out = np.zeros((len(sequences), length_B.max()), np.int32)
  for row, ids in zip(out, sequences, strict=True):
    row[: len(ids)] = ids
  return out, length_B


def train(name, base, talk, seed):
  """(model, params) after one pass over the documents; prints the loss on the way."""
  rows = packed(list(documents(base, talk, seed)))
  base = base._replace(steps=len(rows.inputs_BT) // ROWS)
  model = models.get(config_json(base))
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    axes = models.axes(model.config)
    shapes = models.shapes(model.config)
    layout = sharding.weight_shardings(mesh, axes, shapes)
    params = jax.jit(model.init, out_shardings=layout)(jax.random.key(seed))
    optimizer = optim.make(base, axes)
    state = training.init(optimizer, mesh, params)
    step = training.make(
      model, None, objectives.negative_log_likelihood, optimizer, base, training.shardings(state)
    )
    for i in range(base.steps):
      batch = rollouts.Batch(*(x[i * ROWS : (i + 1) * ROWS] for x in rows))
      state, metrics = step(state, None, sharding.put_batch(batch, mesh))
      if (i + 1) % 100 == 0 or i + 1 == base.steps:
        loss = float(jax.device_get(metrics["loss"]))
        print(f"{name}: {i + 1} of {base.steps} updates, loss {loss:.3f}", flush=True)
  return model, jax.device_get(state.params)


def write(folder, model, params):
  """The Hugging Face folder of one base model."""
  hf.save(folder, model, params)
  tokenizer.write(folder, MAX_POSITIONS)
  generation = {"eos_token_id": 1, "pad_token_id": 0, "do_sample": True, "temperature": 1.0}
  (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def record(folder, seed):
  """What the two models of `folder` can do, measured from the files."""
  talk = chat.Chat(folder / "teacher")
  loaded = {name: hf.load(folder / name) for name in BASES}
  out, text = {}, None
  for name, (model, params) in loaded.items():
    out[name], wrote = measure.scores(talk, model, params, "validation", (seed,))
    out[name]["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    text = text or wrote  # the teacher's
  out["on the teacher's text"] = measure.overlap(loaded["teacher"], loaded["student"], text)
  return out


def main():
  """Trains, writes, measures."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=Path, default=FOLDER)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  start = time.monotonic()
  args.folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.write(folder, MAX_POSITIONS)
    talk = chat.Chat(folder)
  for name, base in BASES.items():
    write(args.folder / name, *train(name, base, talk, args.seed))
  out = {
    "command": f"python -m s2d_jax.assets.train_base --seed={args.seed}",
    "jax": jax.__version__,
    "split": "validation",
    "bases": {name: base._asdict() for name, base in BASES.items()},
    "scores": record(args.folder, args.seed),
    "seconds": round(time.monotonic() - start),
  }
  (args.folder / "record.json").write_text(json.dumps(out, indent=2) + "\n")
  print(json.dumps(out["scores"], indent=2))


if __name__ == "__main__":
  main()
