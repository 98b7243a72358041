"""What the embedded world's models can do before anyone trains them: the method's preconditions."""

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import rollouts, sampler
from s2d_jax.data.arithmetic import problems
from s2d_jax.losses import kl
from s2d_jax.rewards import arithmetic

PROMPT_TOKENS, RESPONSE_TOKENS = 13, 21  # of four operands: the longest there are
SAMPLES = 8


def prompts(talk, split):
  """rollout.Prompt of every row of a split, and {id: row}."""
  rows = problems.splits()[split]
  turns = [talk.render([{"role": "user", "content": row["problem"]}]) for row in rows]
  asked = [rollouts.Prompt(row["id"], tuple(ids)) for row, ids in zip(rows, turns, strict=True)]
  return asked, {row["id"]: row for row in rows}


def sampled(talk, model, params, split, samples, temperature, seed):
  """(correct_PG of zeros and ones, the Rollout behind it) of a split's every problem."""
  asked, rows = prompts(talk, split)
  how = sampler.Sampling(
    samples, temperature, 1.0, 0, 0.0, RESPONSE_TOKENS, 0, stop_ids=talk.eos_ids
  )
  draw = sampler.make(model, params, how, len(asked), PROMPT_TOKENS)
  wrote = draw(params, asked, seed)
  correct_B = [
    arithmetic.reward(rows[int(i)], talk.decode(wrote.response(b)))
    for b, i in enumerate(wrote.prompt_id_B)
  ]
  return np.array(correct_B).reshape(len(asked), samples), wrote


def scores(talk, model, params, split, seed):
  """Share of right answers: {"avg@8" at temperature 1, "greedy"}, and the Rollout of the first."""
  correct_PG, wrote = sampled(talk, model, params, split, SAMPLES, 1.0, seed)
  greedy_P1, _ = sampled(talk, model, params, split, 1, 0.0, seed)
  return {f"avg@{SAMPLES}": correct_PG.mean(), "greedy": greedy_P1.mean()}, wrote


def overlap(teacher, student, wrote):
  """How far the two models are apart on responses the teacher wrote, as means over their tokens.

  teacher, student: pairs (model, params). "kl" is KL(teacher ‖ student) in nats, "top1" the share
  of tokens at which both find the same one most probable.
  """
  batch = rollouts.batch(wrote)
  teacher_BTV, student_BTV = (_logits(model, params, batch) for model, params in (teacher, student))
  weight_BT = batch.weight_BT / batch.weight_BT.sum()
  same_BT = jnp.argmax(teacher_BTV, axis=-1) == jnp.argmax(student_BTV, axis=-1)
  kl_BT = kl.forward_kl(student_BTV, teacher_BTV)
  return {
    "kl": float(jnp.sum(kl_BT * weight_BT)),
    "top1": float(jnp.sum(same_BT.astype(jnp.float32) * weight_BT)),
  }


def _logits(model, params, batch):
  @jax.jit
  def logits(params, inputs_BT, positions_BT, segments_BT):
    features_BTD, _ = model.apply(params, inputs_BT, positions_BT, segments_BT)
    return jnp.einsum("BTD,VD->BTV", features_BTD, model.unembed(params))

  return logits(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)
