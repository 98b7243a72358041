"""The effect of the unnormalised top k of the reverse KL, which s2d_jax refuses as a loss.

  python results/composition/unnormalised.py --workdir runs/methods

It trains the arms of the studies `forms` and `cold_forms` of results/composition/variants.py with
the loss Σ p log p/q over the student's top k, p student and q teacher. Its minimum on a support S
is p = q/e, so it moves probability off S even where p = q. See `kl.UNNORMALISED`.
"""

import argparse

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from results.composition import variants
from s2d_jax import objectives, recipe, sharding, sweep, tasks
from s2d_jax.losses.blockwise import Head
from s2d_jax.objectives import Objective, Sums
from s2d_jax.rollouts import Batch

# (variant of the form that is mended, tokens of the top)
STUDIES = [(f"generalised_{k}{suffix}", k) for suffix in ("", "_cold") for k in (2, 4)]


def unnormalised(student_head: Head, guide_head: Head, batch: Batch, hp: ConfigDict) -> Sums:
  """Σ p log p/q over the student's top hp.top_k tokens."""
  def form(student_BTV: jax.Array, guide_BTV: jax.Array) -> tuple[jax.Array, dict]:
    p_BTV = jax.nn.log_softmax(student_BTV)
    q_BTV = jax.nn.log_softmax(guide_BTV)
    p_BTK, top_BTK = jax.lax.top_k(p_BTV, hp.top_k)
    q_BTK = jnp.take_along_axis(q_BTV, top_BTK, axis=-1)
    loss_BT = jnp.sum(jnp.exp(p_BTK) * (p_BTK - q_BTK), axis=-1)
    return loss_BT, {"student_mass": jnp.exp(p_BTK).sum(-1), "teacher_mass": jnp.exp(q_BTK).sum(-1)}

  return objectives.sums_from_logits(form, student_head, guide_head, batch, hp)


def main() -> None:
  """Trains and scores the arms of every study, under the seeds of the other variants."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--seeds", type=int, default=3)
  args = parser.parse_args()
  objective = Objective(unnormalised, objectives.REVERSE_KL.keys)
  stages = tuple(row._replace(objective=objective) if row.name == "reverse_kl" else row
                 for row in recipe.STAGES)
  for name, _ in STUDIES:
    for config in sweep.expand(variants.get_config(f"variant={name}"))[: args.seeds]:
      with jax.set_mesh(sharding.make_mesh(config.mesh)):
        recipe.run(config, args.workdir, tasks.get(config), stages)


if __name__ == "__main__":
  main()
