"""Eight CPU devices, strict arrays and one cache of compiled programs for every test.

All of it is set before anything touches a device. Most programs of the suite are compiled by
several tests, so pytest's workers and the processes that tests start share the cache: they read its
place from the environment. It keeps a program however short its compilation was.
"""

import collections
import contextlib
import importlib.util
import os
import pathlib
import signal
import time

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402 - it reads the environment when it is imported
import pytest  # noqa: E402
from etils import epath  # noqa: E402

if os.environ.get("S2D_QUICK_COMPILES") == "1":  # as the Makefile has it for the longer tests
  # Also in the environment, for the processes that tests start.
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  jax.config.update("jax_disable_most_optimizations", True)
  # XLA's older code for fused kernels compiles in less time. Newer JAX has lost that option.
  older, flags = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")
  if jax.__version_info__ < (0, 11) and older not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {older}"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A shell lets what it starts in the background ignore Ctrl-C, and nohup SIGHUP. The processes that
# tests start would ignore them too.
for number in (signal.SIGINT, signal.SIGHUP):
  if signal.getsignal(number) == signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # only the main thread may
      signal.signal(number, signal.default_int_handler)

# From this time of the epoch on, in seconds, no test begins. `.ci/run` sets it, because a run that
# takes too long is stopped and lost as a whole.
TESTS_END = float(os.environ.get("S2D_TESTS_END", "inf"))

# A compiler of each kind of program for accelerators is in an environment of its own.
COMPILERS = {"gpu": "jax_cuda12_plugin", "tpu": "libtpu"}

SECONDS = {"slow": 60, "medium": 8}  # of a test with this mark, roughly; 0.3 of one without


@pytest.hookimpl(trylast=True)  # after tests are left out by their marks
def pytest_collection_modifyitems(items):
  """Puts the files that take longest first, so that all workers end at about one time."""
  seconds = collections.Counter()
  for item in items:
    seconds[item.path] += max((SECONDS.get(mark.name, 0.3) for mark in item.iter_markers()),
                              default=0.3)
  items.sort(key=lambda item: -seconds[item.path])


@pytest.hookimpl(tryfirst=True)  # before the test's fixtures are made
def pytest_runtest_setup(item):
  """Leaves out a test that comes after S2D_TESTS_END, or whose compiler is absent."""
  if time.time() > TESTS_END:
    pytest.skip("NOT RUN: the time of S2D_TESTS_END has passed")
  for kind, module in COMPILERS.items():
    if item.get_closest_marker(kind) and importlib.util.find_spec(module) is None:
      pytest.skip(f"make test-{kind} has {module}")


@pytest.fixture
def failing_disk(monkeypatch):
  """A function that lets the next calls of a method of local paths fail; the seconds waited.

    waits = failing_disk("read_bytes", 3, errno.EIO)

  A `name` restricts it to files of that name. Nothing sleeps while a test has it.
  """
  waits = []
  remaining = {}
  monkeypatch.setattr(time, "sleep", waits.append)

  def fail(method, times, code, name=None):
    local = type(epath.Path("/"))
    if method not in remaining:
      call = getattr(local, method)

      def broken(self, *args):
        count, code, name = remaining[method]
        if count and name in (None, self.name):
          remaining[method] = count - 1, code, name
          raise OSError(code, os.strerror(code))
        return call(self, *args)

      monkeypatch.setattr(local, method, broken)
    remaining[method] = times, code, name
    waits.clear()
    return waits

  return fail


@contextlib.contextmanager
def _few_optimizations(chosen):
  """Whether XLA skips most optimizations meanwhile."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", chosen)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compiles():
  """XLA skips most optimizations: for files of tests that spend nearly all of their time compiling.

  Only for tests of what surrounds the arithmetic: which programs run, when, on which devices.
  """
  with _few_optimizations(True):
    yield


@pytest.fixture
def full_compiles():
  """XLA optimizes as in a user's run, whatever S2D_QUICK_COMPILES says.

  For tests that compare the numbers of unequal programs bit for bit, which are equal where XLA
  fuses the arithmetic of both in one way; and for those that compute longer than they compile.
  """
  with _few_optimizations(False):
    yield
