"""Seconds and memory of one optimizer update: forward, loss, backward and AdamW on random tokens.

  python -m benchmarks.step [--objective=reverse_kl] [--rows=8] [--tokens=512] [--microbatches=1]
"""

from types import SimpleNamespace

import jax
import numpy as np

from benchmarks import measure
from s2d_jax import ledger, models, objectives, optim, rollout, sharding, update

OBJECTIVES = {f.__name__: f for f in objectives.READS}
FULL = {"shape": "qwen3-29m", "objective": "clipped_surrogate", "rows": 8, "tokens": 512,
        "microbatches": 1, "block": 4096, "dtype": "float32", "remat": "none", "repeats": 10,
        "peak": 4096}
SMOKE = FULL | {"shape": "qwen3-smoke", "rows": 2, "tokens": 8, "block": 8, "repeats": 1,
                "peak": 16}
parse = measure.parser(__doc__, FULL, SMOKE)


def random_batch(vocab_size, rows, tokens):
  """A Batch of full rows, every token of weight 1: what a step costs without padding."""
  rng = np.random.default_rng(0)
  def ids():
    return rng.integers(0, vocab_size, (rows, tokens), dtype=np.int32)
  def normal(mean=0.0):
    return rng.normal(mean, 1.0, (rows, tokens)).astype(np.float32)
  ones = np.ones((rows, tokens), np.int32)
  return rollout.Batch(
      inputs_BT=ids(), targets_BT=ids(), segments_BT=ones, weight_BT=ones.astype(np.float32),
      positions_BT=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)), advantage_BT=normal(),
      old_logp_BT=normal(-10.0), sampler_logp_BT=normal(-10.0),
      sequence_BT=np.tile(np.arange(rows, dtype=np.int32)[:, None], (1, tokens)))


def run(sizes):
  """{what the update needs and takes}."""
  if sizes.objective not in OBJECTIVES:
    raise ValueError(f"there is no objective {sizes.objective!r}: choose {', '.join(OBJECTIVES)}.")
  objective, mesh = OBJECTIVES[sizes.objective], sharding.current_mesh()
  model, params = measure.model(sizes.shape, sizes.dtype, sizes.remat)
  guide, guide_params = None, None
  if objective in (objectives.forward_kl, objectives.reverse_kl):
    guide, guide_params = measure.model(sizes.shape, sizes.dtype, sizes.remat, seed=1)
  optimizer = optim.make(SimpleNamespace(
      lr=1e-6, warmup=0, steps=1000, decay="constant", clip=1.0, weight_decay=0.1, b1=0.9,
      b2=0.999, eps=1e-8), models.axes(model.config))
  hp = SimpleNamespace(microbatches=sizes.microbatches, block=sizes.block, clip_low=0.2,
                       clip_high=0.2, kl="none", kl_coef=0.0)
  place = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
  state = update.init(optimizer, mesh, jax.device_put(params, place))
  if guide is not None:
    guide_params = jax.device_put(guide_params, place)
  batch = sharding.put_batch(random_batch(model.config.vocab_size, sizes.rows, sizes.tokens), mesh)
  step = update.make(model, guide, objective, optimizer, hp, update.shardings(state))
  program, seconds = measure.stopwatch(lambda: step.lower(state, guide_params, batch).compile())

  def once():
    nonlocal state
    state, metrics = program(state, guide_params, batch)
    return state, metrics

  took = measure.timed(once, sizes.repeats)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  forward = ledger.forward_flops(model.config, np.full(sizes.rows, sizes.tokens))
  flops = forward * (3 + (guide is not None))  # a backward pass is two forward ones
  return {**took, "compile_seconds": seconds, **measure.memory(program),
          "tokens_per_second": sizes.rows * sizes.tokens / took["seconds"], "flops": flops,
          "share_of_peak": flops / took["seconds"] / peak["flops_per_second"], "matmul_peak": peak}


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  with jax.set_mesh(sharding.make_mesh()):
    return measure.write("step", asked, run(asked.sizes))


if __name__ == "__main__":
  main()
