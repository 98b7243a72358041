"""Eight CPU devices, strict arrays and one cache of compiled programs for every test.

All of it is set before anything touches a device. Most programs of the suite are compiled by
several tests, so pytest's workers and the processes that tests start share the cache: they read its
place from the environment. It keeps a program however short its compilation was.
"""

import os
import pathlib

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402 - it reads the environment when it is imported

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
