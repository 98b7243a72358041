"""The host's side of sampling: which prompts go in which call, and what comes back as rows."""

import functools

import jax
import numpy as np

from s2d_jax import rollout, sharding
from s2d_jax.sampler import decode


def check(prompts, sampling, width):
  """Refuses what cannot be sampled, by name, before any device is asked.

  Raises:
    ValueError: no prompts, a prompt without tokens or with more than `width`, or stop strings (not
      implemented).
  """
  if sampling.stop_strings:
    raise ValueError("stop_strings are not supported by this sampler: use stop_ids, and list the "
                     "end-of-text ids in generation_config.json.")
  if not prompts:
    raise ValueError("there are no prompts to sample from: check the split's name and its size.")
  for prompt in prompts:
    if not len(prompt.tokens):
      raise ValueError(f"prompt {prompt.id} has no tokens, so nothing to continue: give its "
                       "problem a text.")
    if len(prompt.tokens) > width:
      raise ValueError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and its window is "
                       f"{width}: raise config.prompt_tokens or drop the problem.")


@functools.cache
def _compiled(model, sampling, prompts, width, mesh, tree, leaves):
  """The sampler of `prompts` prompts of at most `width` tokens, compiled ahead of time."""
  def rows(*shape, dtype):
    where = None if mesh is None else sharding.batch_sharding(mesh, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  return decode.program(model, sampling, mesh).lower(
      jax.tree.unflatten(tree, leaves), rows(prompts, width, dtype=np.int32),
      rows(prompts, dtype=np.int32),
      rows(prompts * sampling.samples_per_prompt, 2, dtype=np.uint32)).compile()


def make(model, params, sampling, size, width):
  """Compiles a sampler of `size` prompts of at most `width` tokens a call; nothing compiles later.

  Args:
    model: a Model; params: its weights, or their abstract arrays, laid out as they will be.
    sampling: a Sampling.
    size: prompts in one compiled call; more are sampled in several calls, a short one is padded.
    width: tokens of the longest prompt.

  Returns:
    draw(params, prompts, seed, first_sample=0, weight_version=0) -> Rollout, its rows a prompt's
    samples side by side, in the order of `prompts`. `seed` is a tuple of ints; row (prompt id,
    sample index) draws from (seed…, prompt id, sample index) and from nothing else.
    `draw.compiled` is the executable.
  """
  mesh = sharding.current_mesh()
  leaves, tree = jax.tree.flatten(sharding.abstract(params))
  run = _compiled(model, sampling, size, width, mesh, tree, tuple(leaves))

  def draw(params, prompts, seed, first_sample=0, weight_version=0):
    check(prompts, sampling, width)
    parts = [_call(run, params, prompts[i: i + size], sampling, seed, first_sample, size, width,
                   weight_version, mesh) for i in range(0, len(prompts), size)]
    return rollout.concatenate(parts)

  draw.compiled = run
  return draw


def _call(run, params, prompts, sampling, seed, first_sample, size, width, weight_version, mesh):
  """One compiled call: pads to `size` prompts, samples, drops the padding."""
  G, n = sampling.samples_per_prompt, len(prompts)
  padded = list(prompts) + [prompts[-1]] * (size - n)
  prompt_PW = np.zeros((size, width), np.int32)
  for row_W, prompt in zip(prompt_PW, padded, strict=True):
    row_W[: len(prompt.tokens)] = prompt.tokens
  length_P = np.array([len(p.tokens) for p in padded], np.int32)
  prompt_id_B = np.repeat(np.array([p.id for p in padded], np.int64), G)
  sample_index_B = np.tile(np.arange(first_sample, first_sample + G, dtype=np.int32), size)
  key_B2 = np.stack([rollout.row_key(seed, i, g)
                     for i, g in zip(prompt_id_B, sample_index_B, strict=True)])
  arrays = (prompt_PW, length_P, key_B2)
  arrays = jax.device_put(arrays) if mesh is None else sharding.put_batch(arrays, mesh)
  tokens_BT, logp_BT, length_B, stopped_B = sharding.fetch(run(params, *arrays))
  whole = rollout.Rollout(
      prompt_id_B, sample_index_B, np.repeat(prompt_PW, G, axis=0), np.repeat(length_P, G),
      tokens_BT, length_B, logp_BT, stopped_B.astype(np.int32), weight_version)
  return rollout.take(whole, slice(0, n * G))


def sample(model, params, prompts, sampling, seed):
  """Samples every prompt in one call: `make` then draw, for when compiling once does not matter.

  Args:
    model: a Model; params: its weights; prompts: list of rollout.Prompt; sampling: a Sampling.
    seed: a tuple of ints.

  Returns:
    A Rollout of len(prompts) · samples_per_prompt rows.

  Raises:
    ValueError: no prompts, or stop strings.
  """
  width = max((len(p.tokens) for p in prompts), default=0)
  check(prompts, sampling, width)
  return make(model, params, sampling, len(prompts), width)(params, prompts, seed)
