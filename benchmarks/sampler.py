"""Seconds and memory of one rollout: prefill, fork and decode, every row to its last token.

  python -m benchmarks.sampler [--prompts=8] [--samples=8] [--prompt_tokens=128] [--max_tokens=256]
"""

import jax
import numpy as np

from benchmarks import measure
from s2d_jax import ledger, models, sampler, sharding
from s2d_jax.rollout import Prompt

FULL = {"shape": "qwen3-29m", "prompts": 8, "samples": 8, "prompt_tokens": 128, "max_tokens": 256,
        "dtype": "float32", "repeats": 5, "peak": 4096}
SMOKE = FULL | {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "prompt_tokens": 4,
                "max_tokens": 4, "repeats": 1, "peak": 16}
parse = measure.parser(__doc__, FULL, SMOKE)


def run(sizes):
  """{what the rollout needs and takes}."""
  mesh = sharding.current_mesh()
  model, params = measure.model(sizes.shape, sizes.dtype)
  params = jax.device_put(params, sharding.weight_shardings(
      mesh, models.axes(model.config), models.shapes(model.config)))
  how = sampler.Sampling(samples_per_prompt=sizes.samples, temperature=1.0, top_p=1.0, top_k=0,
                         min_p=0.0, max_tokens=sizes.max_tokens, min_tokens=0, stop_ids=())
  ids = np.random.default_rng(0).integers(
      0, model.config.vocab_size, (sizes.prompts, sizes.prompt_tokens))
  prompts = [Prompt(i, tuple(row.tolist())) for i, row in enumerate(ids)]
  draw, seconds = measure.stopwatch(
      lambda: sampler.make(model, params, how, sizes.prompts, sizes.prompt_tokens))
  took = measure.timed(lambda: draw(params, prompts, (0,)).response_BT, sizes.repeats)
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  work = flops(model.config, sizes)
  new = sizes.prompts * sizes.samples * sizes.max_tokens
  return {**took, "compile_seconds": seconds, **measure.memory(draw.compiled),
          "tokens_per_second": new / took["seconds"],
          "seconds_per_decode_step": took["seconds"] / sizes.max_tokens, "flops": work,
          "share_of_peak": work / took["seconds"] / peak["flops_per_second"], "matmul_peak": peak}


def flops(config, sizes):
  """FLOPs of the rollout: each prompt read once, with one unembedding; then every new token."""
  W, T = sizes.prompt_tokens, sizes.max_tokens
  read, whole = (ledger.forward_flops(config, [n]) for n in (W, W + T))
  unembedded = 2 * config.vocab_size * config.width
  return sizes.prompts * (read - (W - 1) * unembedded + sizes.samples * (whole - read))


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  with jax.set_mesh(sharding.make_mesh()):
    return measure.write("sampler", asked, run(asked.sizes))


if __name__ == "__main__":
  main()
