"""The decoder-only transformer of Qwen3 and Llama 3.

The suffix of an array's name is its shape, here and in the whole package:

  P prompts · G samples per prompt · B = P·G sequences · T tokens · S cache slots · V vocabulary ·
  D width · N query heads · K key/value heads · R = N/K · H head width · F MLP width · L layers

Parameters are a plain nested dict; the layers are stacked on a leading L axis and scanned.
Norms, softmax and RoPE are float32 for every dtype of the activations.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from s2d_jax import sharding
from s2d_jax.errors import InputError
from s2d_jax.models import attention, caches, linear, one_token, paged
from s2d_jax.models.config import DTYPES, POLICIES, STORED, Config, RopeScaling
from s2d_jax.sharding import Params

# Of a device in a microbatch. CHANGELOG.md has the memory and the messages of 4,096 and of more.
_FEW_TOKENS = 4096


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / √(mean(x²) + eps) · scale over the last axis (https://arxiv.org/abs/1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def rope_frequencies(head_width: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
  """Radians per position of each of the H/2 pairs: theta^(−2i/H), changed by `scaling`.

  RoPE (https://arxiv.org/abs/2104.09864). Llama 3.1 (https://arxiv.org/abs/2407.21783) divides
  by `factor` the frequencies whose wave is longer than original/low. It keeps those whose wave is
  shorter than original/high, and interpolates between the two.
  """
  frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  if scaling is None:
    return frequency
  waves = scaling.original_max_positions * frequency / (2 * jnp.pi)  # in the original window
  low = scaling.low_freq_factor
  high = scaling.high_freq_factor
  unscaled = jnp.clip((waves - low) / (high - low), 0.0, 1.0)  # the share that is not divided
  return frequency * (unscaled + (1 - unscaled) / scaling.factor)


def rope(x_BTNH: jax.Array, angle_BTH2: jax.Array) -> jax.Array:
  """Rotates the pair (x_i, x_{i+H/2}) of each head by the angle of its position, in float32."""
  # XLA for CPUs has the gradient of the plain form as fast.
  return (_rope if sharding.platform() == "gpu" else _rotated)(x_BTNH, angle_BTH2)


def _rotated(x_BTNH: jax.Array, angle_BTH2: jax.Array) -> jax.Array:
  cos, sin = (_of_heads(f(angle_BTH2), x_BTNH.shape[:-1]) for f in (jnp.cos, jnp.sin))
  # Pairs are half a head apart, as in Hugging Face's weights; the paper pairs neighbours.
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def _of_heads(x_BTH2: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """A value of each token for every head: [B, T, H/2] -> [B, T, N, H/2]."""
  return jnp.broadcast_to(x_BTH2[:, :, None], shape + x_BTH2.shape[-1:])


@jax.custom_vjp
def _rope(x_BTNH: jax.Array, angle_BTH2: jax.Array) -> jax.Array:
  return _rotated(x_BTNH, angle_BTH2)


def _rope_fwd(x_BTNH: jax.Array, angle_BTH2: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _rotated(x_BTNH, angle_BTH2), angle_BTH2


def _rope_bwd(angle_BTH2: jax.Array, dy_BTNH: jax.Array) -> tuple[jax.Array, None]:
  """The rotation by the opposite angle: its gradient."""
  # The halves are an axis, and are swapped by reversing it. XLA for GPUs fuses that into every
  # reader of the gradient, where it writes the halves of the plain form to memory.
  *shape, H = dy_BTNH.shape
  dy_BTN2H2 = dy_BTNH.astype(jnp.float32).reshape(*shape, 2, H // 2)
  cos, sin = (_of_heads(f(angle_BTH2), tuple(shape))[..., None, :] for f in (jnp.cos, jnp.sin))
  dx_BTN2H2 = (dy_BTN2H2 * jnp.concatenate([cos, cos], axis=-2)
               + jnp.flip(dy_BTN2H2, axis=-2) * jnp.concatenate([sin, -sin], axis=-2))
  return dx_BTN2H2.reshape(dy_BTNH.shape).astype(dy_BTNH.dtype), None


_rope.defvjp(_rope_fwd, _rope_bwd)


class Attention(nn.Module):
  """Grouped-query self-attention, with its layer of the cache if there is one."""
  config: Config
  implementation: str  # of attention.IMPLEMENTATIONS

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, angle_BTH2: jax.Array, reads: attention.Reading,
      position_B: jax.Array | None, kv: caches.KV | caches.Pages | None
  ) -> tuple[jax.Array, caches.KV | caches.Pages | None]:
    """(output of the layer's attention, the cache with the tokens in it).

    Args:
      x_BTD: features after the norm.
      angle_BTH2: RoPE's angles of each token.
      reads: which token reads which.
      position_B: of each row's first token, which is its slot in the cache.
      kv: the layer of the cache, None without one.
    """
    c = self.config
    D, N, K, H = c.width, c.heads, c.kv_heads, c.head_width
    q = linear.make(self, "q", (D,), (N, H), D)
    k = linear.make(self, "k", (D,), (K, H), D)
    v = linear.make(self, "v", (D,), (K, H), D)
    # The residual is a sum of 2L terms, so each starts smaller by √(2L), as in GPT-2.
    o = linear.make(self, "o", (N, H), (D,), N * H * 2 * c.layers)
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(f(x_BTD), STORED) for f in (q, k, v))
    # Before RoPE, as in Qwen3: scales of single channels do not commute with a rotation.
    if c.qk_norm:
      q_BTNH = rms_norm(q_BTNH, self.param("q_norm", nn.initializers.ones, (H,)), c.norm_eps)
      k_BTKH = rms_norm(k_BTKH, self.param("k_norm", nn.initializers.ones, (H,)), c.norm_eps)
    q_BTNH = sharding.constrain(rope(q_BTNH, angle_BTH2), "batch", "time", "heads", "head")
    k_BTKH = sharding.constrain(rope(k_BTKH, angle_BTH2), "batch", "time", "kv_heads", "head")
    v_BTKH = sharding.constrain(v_BTKH, "batch", "time", "kv_heads", "head")

    if kv is None:
      out_BTNH = attention.attention(self.implementation, q_BTNH, k_BTKH, v_BTKH, reads)
    elif isinstance(kv, caches.Pages):
      out_BTNH, *kv = paged.paged(q_BTNH, k_BTKH, v_BTKH, *kv, reads.table_Bn, position_B)
      kv = caches.Pages(*kv)
    else:
      kv = caches.written(kv, k_BTKH, v_BTKH, position_B)
      out_BTNH = attention.cached(self.implementation, q_BTNH, *kv, caches.axes()[:2],
                                  reads.mask_BTS, position_B + x_BTD.shape[1])
    # Fixed before the heads are folded, or XLA could not see which device has which of them.
    out_BTNH = sharding.constrain(out_BTNH, "batch", "time", "heads", "head")
    out_BTM = out_BTNH.reshape(*out_BTNH.shape[:2], N * H)
    return o(out_BTM), kv


class MLP(nn.Module):
  """SwiGLU: down(silu(gate x) · up x) (https://arxiv.org/abs/2002.05202)."""
  config: Config

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    c = self.config
    D, F = c.width, c.mlp
    gate = linear.make(self, "gate", (D,), (F,), D)
    up = linear.make(self, "up", (D,), (F,), D)
    down = linear.make(self, "down", (F,), (D,), F * 2 * c.layers)
    gate_BTF, up_BTF = (checkpoint_name(f(x_BTD), STORED) for f in (gate, up))
    hidden_BTF = sharding.constrain(nn.silu(gate_BTF) * up_BTF, "batch", "time", "mlp")
    return down(hidden_BTF)


def _as_it_is(x_BTD: jax.Array) -> jax.Array:
  return x_BTD


def _all_times(x_BTD: jax.Array) -> jax.Array:
  """Features of all times on each device, gathered from those that have a part each."""
  # XLA for GPUs would move a norm's rounding behind the gather, which then sends float32.
  x_BTD = jax.lax.optimization_barrier(_own_times(x_BTD))
  return sharding.constrain(x_BTD, "batch", "time", "embed")


def _own_times(x_BTD: jax.Array) -> jax.Array:
  """Features of a part of the times on each of the devices that split the heads."""
  return sharding.constrain(x_BTD, "batch", "context", "embed")


# Sequence parallelism (https://arxiv.org/abs/2205.05198): a layer's first products read all times,
# and the sum of its last products' parts is a reduce-scatter. Gradients go the other way. Together
# they send what an all-reduce does, and each device stores and norms its own times alone.
_gathered = jax.custom_vjp(_all_times)
_gathered.defvjp(lambda x_BTD: (_all_times(x_BTD), None),
                 lambda _, dx_BTD: (_own_times(dx_BTD),))
_scattered = jax.custom_vjp(_own_times)
_scattered.defvjp(lambda x_BTD: (_own_times(x_BTD), None),
                  lambda _, dx_BTD: (_all_times(dx_BTD),))


class Block(nn.Module):
  """One layer: a residual around attention and a residual around the MLP."""
  config: Config
  implementation: str  # of attention.IMPLEMENTATIONS

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, angle_BTH2: jax.Array, reads: attention.Reading,
      position_B: jax.Array | None = None, kv: caches.KV | caches.Pages | None = None
  ) -> tuple[jax.Array, caches.KV | caches.Pages | None]:
    """(features after the layer, its part of the cache); arguments as `Attention`."""
    c = self.config
    # With a cache a row is short, or a prompt of which nothing is stored.
    is_split = kv is None and sharding.shards("context", x_BTD.shape[1]) > 1
    gathered, scattered = (_gathered, _scattered) if is_split else (_as_it_is, _as_it_is)
    time = "context" if is_split else "time"
    scale_D = self.param("attn_norm", nn.initializers.ones, (c.width,))
    if kv is None and sharding.platform() == "gpu":
      # All layers have these angles, so JAX takes their cosines out of the loop, one for each head,
      # and each layer reads arrays as large as its queries. Tied to a value of the layer they stay.
      angle_BTH2, scale_D = jax.lax.optimization_barrier((angle_BTH2, scale_D))
    y_BTD, kv = Attention(c, self.implementation, name="attn")(
        gathered(rms_norm(x_BTD, scale_D, c.norm_eps)), angle_BTH2, reads, position_B, kv)
    x_BTD = checkpoint_name(
        sharding.constrain(x_BTD + scattered(y_BTD), "batch", time, "embed"), STORED)
    scale_D = self.param("mlp_norm", nn.initializers.ones, (c.width,))
    y_BTD = MLP(c, name="mlp")(gathered(rms_norm(x_BTD, scale_D, c.norm_eps)))
    x_BTD = sharding.constrain(x_BTD + scattered(y_BTD), "batch", time, "embed")
    return x_BTD, kv


def embedded(config: Config, embed_VD: jax.Array, tokens_BT: jax.Array,
             is_split: bool = False) -> jax.Array:
  """The tokens' vectors in the activations' type, [B, T, D].

  Args:
    config: of the model.
    embed_VD: the table, which no device gathers if `is_split` and the sizes divide the mesh.
    tokens_BT: ids.
    is_split: whether the table is split over devices as weights in training are.
  """
  dtype = DTYPES[config.dtype]
  x_BTD = sharding.look_up(embed_VD, tokens_BT, dtype) if is_split else None
  if x_BTD is None:
    # Whole vectors before the look-up, or XLA would replicate its result to split it by rows.
    table_VD = sharding.constrain(embed_VD, "vocab", "embed")
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
  return sharding.constrain(x_BTD, "batch", "context" if is_split else "time", "embed")


def angles(config: Config, positions_BT: jax.Array) -> jax.Array:
  """RoPE's angles in radians, float32 [B, T, H/2]."""
  frequency = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
  # A product, not a dot: matrix units may round their operands.
  return positions_BT[..., None].astype(jnp.float32) * frequency[None, None]


def layer(config: Config, params: Params, x_BTD: jax.Array, positions_BT: jax.Array,
          kv: caches.Layer, table_Bn: jax.Array | None = None) -> tuple[jax.Array, caches.Layer]:
  """One layer with its part of a cache: (features, that part with the T tokens in it).

  Args:
    params: of the layer.
    positions_BT: consecutive in a row; [1, T] where they are those of every row.
    table_Bn: the pages of each row, if the cache is in pages.

  Raises:
    InputError: the tokens do not fit the cache.
  """
  if table_Bn is None:
    T = positions_BT.shape[1]
    S = caches.slots((kv,))
    if T > S:
      raise InputError(f"{T} tokens do not fit a cache of {S} slots: make it longer.")
    reads = attention.Reading(None, jnp.arange(S)[None, None] <= positions_BT[..., None])
  else:
    reads = attention.Reading(None, None, table_Bn)
  # Without a parent, because its parameters are passed in and not created here.
  implementation = attention.choose(config.attention, config.dtype, config.head_width)
  block = Block(config, implementation, parent=None)
  return block.apply({"params": params}, x_BTD, angles(config, positions_BT), reads,
                     positions_BT[:, 0], kv)


def _layer(layers: Params, index: int) -> Params:
  """The parameters of one layer, from stacked layers or from a tuple, of which none is copied."""
  if isinstance(layers, tuple):
    return layers[index]
  return jax.tree.map(lambda w: w[index], layers)


def _layers_at_once(rows: int, tokens: int) -> int:
  """The layers in one trip of the loop over them, for rows of `tokens` tokens."""
  # XLA for GPUs moves a message within a trip alone. With two layers in it, weights of the second
  # are gathered beside products of the first, and gradients of the first are added up beside
  # products of the second. A device then holds activations of two layers in the backward pass. Of
  # many tokens those are large, and their products hide the messages of one layer too.
  of_a_device = rows * tokens // sharding.shards("batch", rows)
  is_short = sharding.splits_weights() and of_a_device <= _FEW_TOKENS
  return 2 if is_short and sharding.platform() == "gpu" else 1


class Decoder(nn.Module):
  """Tokens to the features after the final norm; their product with `unembed` is the logits."""
  config: Config

  @nn.compact
  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array,
               cache: caches.Cache | None = None) -> tuple[jax.Array, caches.Cache | None]:
    """(features_BTD, cache); see `models.Model.apply`."""
    c = self.config
    embed_VD = self.param("embed", linear.normal(c.width), (c.vocab_size, c.width))
    if not c.tied:
      # Not read here, but `init` must create it for `Model.unembed`.
      self.param("unembed", linear.normal(c.width), (c.vocab_size, c.width))
    # Programs with a cache have weights that are whole over the devices that share the rows.
    x_BTD = embedded(c, embed_VD, tokens_BT, is_split=cache is None)
    angle_BTH2 = angles(c, positions_BT)
    if cache is None:
      implementation = attention.choose(c.attention, c.dtype, c.head_width)
      reads = attention.reading(implementation, positions_BT, segments_BT)
      # A kernel without a mask would let packed sequences read each other, so that shows at once.
      if implementation == "cudnn":
        x_BTD = jnp.where(attention.one_sequence(segments_BT)[:, None, None], x_BTD, jnp.nan)
      # In a scan XLA cannot merge the recomputation with the forward pass, so `prevent_cse` and
      # its barriers are off. The scan itself compiles one trip, however many layers there are.
      block = Block
      if c.remat != "none":
        policy = POLICIES["block" if c.remat == "auto" else c.remat]
        block = nn.remat(Block, prevent_cse=False, policy=policy)
      layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=c.layers, in_axes=(nn.broadcast, nn.broadcast),
                       unroll=_layers_at_once(*tokens_BT.shape))
      x_BTD, _ = layers(c, implementation, name="layers")(x_BTD, angle_BTH2, reads)
    elif one_token.applies(c, tokens_BT.shape[1], cache):
      return self._one_token(x_BTD[:, 0], positions_BT[:, 0], cache)
    else:
      x_BTD, cache = self._with_cache(x_BTD, positions_BT, cache)
    scale_D = self.param("norm", nn.initializers.ones, (c.width,))
    return sharding.constrain(rms_norm(x_BTD, scale_D, c.norm_eps), "batch", "time", "embed"), cache

  def _with_cache(
      self, x_BTD: jax.Array, positions_BT: jax.Array, cache: caches.Cache
  ) -> tuple[jax.Array, caches.Cache]:
    """The layers with a cache: (features_BTD, the cache with the tokens in it)."""
    table_Bn = cache.table_Bn if isinstance(cache, caches.Paged) else None
    written = []
    # One layer after the other: a scan over them would copy each one's weights and cache.
    for index, kv in enumerate(caches.layers(cache)):
      params = _layer(self.variables["params"]["layers"], index)
      x_BTD, kv = layer(self.config, params, x_BTD, positions_BT, kv, table_Bn)
      written.append(kv)
    return x_BTD, caches.with_layers(cache, written)

  def _one_token(
      self, x_BD: jax.Array, position_B: jax.Array, cache: tuple[caches.KV, ...]
  ) -> tuple[jax.Array, tuple[caches.KV, ...]]:
    """A token of every row by the kernels for it: (features after the final norm, the cache)."""
    c = self.config
    params = self.variables["params"]
    params = params | {"layers": [_layer(params["layers"], i) for i in range(c.layers)]}
    y_BD = rms_norm(x_BD, params["layers"][0]["attn_norm"], c.norm_eps)
    angle_BH2 = angles(c, position_B[:, None])[:, 0]
    y_BD, cache = one_token.features(c, params, x_BD, y_BD, angle_BH2, position_B, cache)
    return sharding.constrain(y_BD[:, None], "batch", "time", "embed"), cache
