"""Runs one update of at least 2 GB and prints the compiler's account and the process's growth.

  python -m tests.preflight.growth

Compiling takes memory too, which the process keeps: it is given back to the system first, and the
growth is measured from there. The weights are created by a program, so no host has a copy of them.
"""

import ctypes
import gc
import json
import pathlib
import types

import jax
import jax.numpy as jnp

from configs import common
from s2d_jax import compiling, models, objectives, optim, sharding, training
from s2d_jax.preflight import costs

CONFIG = {"model_type": "qwen3", "vocab_size": 16_000, "hidden_size": 1024, "head_dim": 64,
          "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16,
          "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "tie_word_embeddings": True, "max_position_embeddings": 512}
ROWS = 2
TOKENS = 256


def memory(name):
  """Bytes of the process: VmRSS now, VmHWM at most since it was last reset."""
  lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
  (line,) = [line for line in lines if line.startswith(f"{name}:")]
  return 1024 * int(line.split()[1])


def main():
  model = models.get(CONFIG)
  mesh = sharding.make_mesh((1, 1, 1))
  hp = types.SimpleNamespace(**common.adamw(lr=1e-6), microbatches=1, block=1024, mean="token")
  with jax.set_mesh(mesh):
    optimizer = optim.make(hp, 10, models.trained(model.config))
    state = training.abstract(optimizer, mesh, models.laid_out(model.config, mesh))
    batch = compiling.abstract_batch(ROWS, TOKENS, mesh, sampled=False)
    update = training.jit_update(model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, optimizer, hp,
                                 training.shardings(state)).lower(state, None, batch).compile()
    ones = jax.jit(lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), (state, batch)),
                   out_shardings=training.shardings((state, batch))).lower().compile()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    before = memory("VmRSS")
    account = costs.account(update)
    new_state, new_batch = ones()
    jax.block_until_ready(update(new_state, None, new_batch))
  print(json.dumps({"account": account._asdict(), "total": account.total,
                    "growth": memory("VmHWM") - before}))


if __name__ == "__main__":
  main()
