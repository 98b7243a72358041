"""Scores of the embedded worlds' models: the conditions that the method assumes."""

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import rollouts
from s2d_jax.assets.worlds import World
from s2d_jax.chat import Chat
from s2d_jax.losses import kl
from s2d_jax.models import Model
from s2d_jax.rewards import arithmetic
from s2d_jax.rollouts import Prompt, Rollout
from s2d_jax.sampler import Sampler, Sampling
from s2d_jax.sharding import Params

# Samples of each problem behind "avg@8".
_SAMPLES = 8

_ModelAndParams = tuple[Model, Params]


def prompts(world: World, chat: Chat, split: str) -> tuple[list[Prompt], dict[int, dict]]:
  """The rendered problems of a split, and its rows by id."""
  rows = world.splits()[split]
  rendered = [Prompt(row["id"], tuple(chat.render([{"role": "user", "content": row["problem"]}])))
              for row in rows]
  return rendered, {row["id"]: row for row in rows}


def sampled(world: World, chat: Chat, model: Model, params: Params, split: str, samples: int,
            temperature: float, seed: tuple[int, ...]) -> tuple[np.ndarray, Rollout]:
  """Samples every problem of a split.

  Returns:
    (correct_PG of zeros and ones, the Rollout behind it).
  """
  split_prompts, rows = prompts(world, chat, split)
  sampling = Sampling(world.response_tokens, chat.eos_ids, samples_per_prompt=samples,
                      temperature=temperature)
  sampler = Sampler(model, sampling, len(split_prompts), world.prompt_tokens, params=params)
  rollout, _ = sampler(params, split_prompts, seed)
  correct_B = [arithmetic.reward(rows[int(i)], chat.decode(rollout.response(b)))
               for b, i in enumerate(rollout.prompt_id_B)]
  return np.array(correct_B).reshape(len(split_prompts), samples), rollout


def scores(world: World, chat: Chat, model: Model, params: Params, split: str,
           seed: tuple[int, ...]) -> tuple[dict[str, float], Rollout]:
  """Shares of right answers.

  Returns:
    ({"avg@8": at temperature 1, "greedy": at temperature 0}, the Rollout of the first).
  """
  correct_PG, rollout = sampled(world, chat, model, params, split, _SAMPLES, 1.0, seed)
  greedy_P1, _ = sampled(world, chat, model, params, split, 1, 0.0, seed)
  return {f"avg@{_SAMPLES}": correct_PG.mean(), "greedy": greedy_P1.mean()}, rollout


def overlap(teacher: _ModelAndParams, student: _ModelAndParams,
            rollout: Rollout) -> dict[str, float]:
  """The distance of two models on responses that the teacher sampled, as means over their tokens.

  Returns:
    "kl": KL(teacher ‖ student) in nats; "top1": the share of tokens at which both models find the
    same token most probable.
  """
  batch = rollouts.batch(rollout)
  teacher_BTV = _logits(*teacher, batch)
  student_BTV = _logits(*student, batch)
  # Zero on padding, so that the sums below are means over the responses' tokens.
  weight_BT = batch.weight_BT / batch.weight_BT.sum()
  same_BT = jnp.argmax(teacher_BTV, axis=-1) == jnp.argmax(student_BTV, axis=-1)
  kl_BT = kl.forward_kl(student_BTV, teacher_BTV)
  return {
    "kl": float(jnp.sum(kl_BT * weight_BT)),
    "top1": float(jnp.sum(same_BT.astype(jnp.float32) * weight_BT)),
  }


def _logits(model: Model, params: Params, batch: rollouts.Batch) -> jax.Array:
  """All logits at once: the vocabulary has 24 tokens."""
  @jax.jit
  def logits(params: Params, inputs_BT: jax.Array, positions_BT: jax.Array,
             segments_BT: jax.Array) -> jax.Array:
    features_BTD, _ = model.apply(params, inputs_BT, positions_BT, segments_BT)
    return jnp.einsum("BTD,VD->BTV", features_BTD, model.unembed(params))

  return logits(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)
