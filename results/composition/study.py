"""Trains the variants of variants.py, each under its seeds; started again, it skips finished ones.

  python -m results.composition.study --workdir runs/methods [NAME ...]
  python -m results.composition.compare runs/methods runs/methods-unnormalised

A name is that of a study or of a variant; by default all are trained. Beside the work folder, one
whose name ends in "-unnormalised" has the loss that s2d_jax refuses: Σ p log p/q over the student's
top k, p student and q teacher. Its minimum on a support S is p = q/e, so it moves probability off S
even where p = q (`kl.UNNORMALISED`).
"""

import argparse
import pathlib
import shutil

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from results.composition import variants
from s2d_jax import objectives, recipe, sharding, sweep, tasks
from s2d_jax.losses.blockwise import Head
from s2d_jax.objectives import Objective, Sums
from s2d_jax.planning import Stage
from s2d_jax.rollouts import Batch


def unnormalised(student_head: Head, guide_head: Head, batch: Batch, hp: ConfigDict) -> Sums:
  """Σ p log p/q over the student's top hp.top_k tokens."""
  def form(student_BTV: jax.Array, guide_BTV: jax.Array) -> tuple[jax.Array, dict]:
    p_BTK, top_BTK = jax.lax.top_k(jax.nn.log_softmax(student_BTV), hp.top_k)
    q_BTK = jnp.take_along_axis(jax.nn.log_softmax(guide_BTV), top_BTK, axis=-1)
    loss_BT = jnp.sum(jnp.exp(p_BTK) * (p_BTK - q_BTK), axis=-1)
    return loss_BT, {"student_mass": jnp.exp(p_BTK).sum(-1), "teacher_mass": jnp.exp(q_BTK).sum(-1)}

  return objectives.sums_from_logits(form, student_head, guide_head, batch, hp)


def train(name: str, workdir: str, stages: tuple[Stage, ...] = recipe.STAGES) -> None:
  """Trains and scores one variant under all of its seeds."""
  for config in sweep.expand(variants.get_config(f"variant={name}")):
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      recipe.run(config, workdir, tasks.get(config), stages)


def share_parents(workdir: str, other: str) -> None:
  """Copies the finished teachers and warmups of a work folder to another that lacks them.

  On another number of cores they would differ by rounding, and two losses would not start alike.
  """
  for row in ("teacher_grpo", "forward_kl"):
    for manifest in pathlib.Path(workdir).glob(f"{row}-*/manifest.json"):
      target = pathlib.Path(other, manifest.parent.name)
      if not target.exists():
        shutil.copytree(manifest.parent, target)


def main() -> None:
  """Trains the variants of the studies that the command names."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("names", nargs="*", metavar="NAME", help="a study or variant of variants.py")
  args = parser.parse_args()
  objective = Objective(unnormalised, objectives.REVERSE_KL.keys)
  refused = tuple(row._replace(objective=objective) if row.name == "reverse_kl" else row
                  for row in recipe.STAGES)
  for name, variant in variants.VARIANTS.items():
    if args.names and not {name, variant.study} & set(args.names):
      continue
    train(name, args.workdir)
    if name.startswith("generalised"):
      share_parents(args.workdir, f"{args.workdir}-unnormalised")
      train(name, f"{args.workdir}-unnormalised", refused)


if __name__ == "__main__":
  main()
