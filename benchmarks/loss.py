"""Seconds and temporaries of a loss and its gradients, block by block against all logits at once.

  python -m benchmarks.loss [--rows=4] [--tokens=512] [--width=256] [--vocab=32000] [--block=256]
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import sharding
from s2d_jax.losses import blockwise, kl, tokens

FULL = {"rows": 4, "tokens": 512, "width": 256, "vocab": 32_000, "block": 256, "repeats": 5,
        "peak": 4096}
SMOKE = {"rows": 2, "tokens": 8, "width": 8, "vocab": 32, "block": 4, "repeats": 1, "peak": 16}
parse = measure.parser(__doc__, FULL, SMOKE)


def logits(head):
  """All of them: [B, T, V] float32."""
  return jnp.einsum("BTD,VD->BTV", head.features_BTD, head.weight_VD,
                    preferred_element_type=jnp.float32)


def losses(block):
  """{loss: {way: f(student_head, guide_head, targets_BT) -> scalar}}: sums over all tokens."""
  def blockwise_kl(f):
    def total(student, guide, targets_BT):
      weight_BT = jnp.ones(targets_BT.shape, jnp.float32)
      return blockwise.divergence(f, student, guide, weight_BT, block)[0]
    return total
  return {
      "negative_log_likelihood": {
          "blockwise": lambda s, g, targets_BT: -blockwise.logp(s, targets_BT, block)[0].sum(),
          "direct": lambda s, g, targets_BT:
              tokens.negative_log_likelihood(logits(s), targets_BT).sum()},
      **{f.__name__: {
          "blockwise": blockwise_kl(f),
          "direct": lambda s, g, targets_BT, f=f: f(logits(s), logits(g)).sum()}
         for f in (kl.forward_kl, kl.reverse_kl)}}


def run(sizes):
  """{loss: {way: what it takes}, with how far the two ways' gradients are apart}."""
  keys = jax.random.split(jax.random.key(0), 5)
  def head(a, b):
    return blockwise.Head(
        jax.random.normal(a, (sizes.rows, sizes.tokens, sizes.width)),
        jax.random.normal(b, (sizes.vocab, sizes.width)) * jnp.float32(sizes.width**-0.5))
  student, guide = head(*keys[:2]), head(*keys[2:4])
  targets_BT = jax.random.randint(keys[4], (sizes.rows, sizes.tokens), 0, sizes.vocab)
  found = {"logits_bytes": 4 * sizes.rows * sizes.tokens * sizes.vocab}
  for name, ways in losses(sizes.block).items():
    found[name], gradients = {}, {}
    for way, f in ways.items():
      program, seconds = measure.stopwatch(
          lambda f=f: jax.jit(jax.value_and_grad(f)).lower(student, guide, targets_BT).compile())
      took = measure.timed(lambda p=program: p(student, guide, targets_BT), sizes.repeats)
      found[name][way] = {**took, "compile_seconds": seconds, **measure.memory(program)}
      gradients[way] = jax.device_get(program(student, guide, targets_BT)[1])
    found[name]["gradients_apart"] = apart(*gradients.values())
  return {**found, "matmul_peak": measure.matmul_peak(sizes.peak, sizes.repeats)}


def apart(a, b):
  """The largest difference of two trees of arrays, as a share of the largest value in them."""
  leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  return float(max(np.max(np.abs(x - y)) for x, y in leaves)
               / max(np.max(np.abs(x)) for x, _ in leaves))


def main(argv=None):
  """Measures, writes the JSON and returns its path."""
  asked = parse(argv)
  with jax.set_mesh(sharding.make_mesh()):
    return measure.write("loss", asked, run(asked.sizes))


if __name__ == "__main__":
  main()
