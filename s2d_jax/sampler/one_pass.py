"""The choice of a token on a GPU, in one pass over the logits: `sampling`'s in two kernels.

XLA reads the logits three times and writes probabilities of all words, in a dozen kernels. Here a
kernel adds up probabilities in groups of words, each relative to the group's own largest logit, and
a second one finds the group and the word in it. V words are G groups of GROUP.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from s2d_jax import sharding
from s2d_jax.models import kernels

GROUP = 128  # words that are added up together
_GROUPS = 16  # of one program of the first kernel


def applies(vocabulary: int) -> bool:
  """Whether `pick` takes logits of this many words on this backend."""
  return (kernels.available() and sharding.platform() == "gpu" and vocabulary % GROUP == 0
          and not sharding.splits_heads())


def pick(logits_BV: jax.Array, uniform_B: jax.Array,
         interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """The token of each row, int32 [B], and its log-probability, float32 [B], as `sampling._pick`.

  Args:
    logits_BV: float32.
    uniform_B: float32 in [0, 1).
    interpret: for tests, on a device that is not a GPU.
  """
  def local(uniform_B: jax.Array, logits_BV: jax.Array) -> tuple[jax.Array, ...]:
    B, V = logits_BV.shape
    G = V // GROUP
    logits_BGn = logits_BV.reshape(B, G, GROUP)
    size = min(_GROUPS, 1 << (G.bit_length() - 1))  # a power of two
    group_BG = jax.ShapeDtypeStruct((B, G), jnp.float32)
    top_BG, mass_BG = kernels.call(
        functools.partial(_sums, size), (B, -(-G // size)), (logits_BGn,), (group_BG, group_BG),
        "decode_sums", interpret=interpret)
    token_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    return kernels.call(_choice, (B,), (logits_BGn, top_BG, mass_BG, uniform_B),
                        (token_B, uniform_B), "decode_choice", interpret=interpret)

  return sharding.per_shard(local, (uniform_B, logits_BV), (("batch",), ("batch", "vocab")), (0, 0))


def _sums(size: int, logits_BGn, top_BG, mass_BG) -> None:
  """The kernel of `size` groups of a row: each one's largest logit, and its mass relative to it."""
  b = pl.program_id(0)
  G = logits_BGn.shape[1]
  # The last program ends with the last group, and takes some that another one takes too.
  groups = pl.ds(jnp.minimum(pl.program_id(1) * size, G - size), size)
  logits_gn = logits_BGn[b, groups, :]
  top_g = jnp.max(logits_gn, axis=1)
  top_BG[b, groups] = top_g
  mass_BG[b, groups] = jnp.sum(jnp.exp(logits_gn - _finite(top_g)[:, None]), axis=1)


def _choice(logits_BGn, top_BG, mass_BG, uniform_B, token_B, logp_B) -> None:
  """The kernel of a row's token, from the groups' largest logits and masses."""
  b = pl.program_id(0)
  G = top_BG.shape[1]
  index_g = jnp.arange(1 << (G - 1).bit_length(), dtype=jnp.int32)  # a power of two
  group_g = jnp.minimum(index_g, G - 1)
  top_g = jnp.where(index_g < G, top_BG[b, group_g], -jnp.inf)
  top = jnp.max(top_g)
  mass_g = jnp.where(index_g < G, mass_BG[b, group_g] * jnp.exp(top_g - top), 0.0)
  upto_g = jnp.cumsum(mass_g)
  total = _at(upto_g, index_g, len(index_g) - 1)
  aim = uniform_B[b] * total
  group = _first_beyond(upto_g, mass_g, index_g, aim)
  logits_n = logits_BGn[b, group, :]
  mass_n = jnp.exp(logits_n - top)
  index_n = jnp.arange(GROUP, dtype=jnp.int32)
  remaining = aim - (_at(upto_g, index_g, group) - _at(mass_g, index_g, group))
  word = _first_beyond(jnp.cumsum(mass_n), mass_n, index_n, remaining)
  token_B[b] = group * GROUP + word
  logp_B[b] = _at(logits_n, index_n, word) - top - jnp.log(total)


def _finite(top_g: jax.Array) -> jax.Array:
  """The largest logits of groups; 0 for a group without an allowed word, whose masses are 0."""
  return jnp.where(top_g == -jnp.inf, 0.0, top_g)


def _first_beyond(upto_n: jax.Array, mass_n: jax.Array, index_n: jax.Array,
                  aim: jax.Array) -> jax.Array:
  """`sampling`'s: the first index with a mass whose running sum is above the aim, or the last."""
  n = len(index_n)
  first = jnp.min(jnp.where((upto_n > aim) & (mass_n > 0), index_n, n))
  return jnp.where(first < n, first, jnp.max(jnp.where(mass_n > 0, index_n, 0)))


def _at(x_n: jax.Array, index_n: jax.Array, index: jax.Array | int) -> jax.Array:
  """x_n[index], which a kernel has no other way to read."""
  return jnp.sum(jnp.where(index_n == index, x_n, 0.0))
