"""Compiled programs are used again: in one run from memory, in later ones from the user's disk."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from s2d_jax import (
  compiling,
  keys,
  metrics,
  models,
  objectives,
  program_cache,
  rollouts,
  sampler,
  sharding,
  stage,
)
from s2d_jax.compiling import Samplers
from s2d_jax.models import hf
from s2d_jax.roles import Role, StageModels
from s2d_jax.sampler import programs
from tests import test_loop

pytestmark = pytest.mark.usefixtures("quick_compiles")
CONFIG = test_loop.CONFIG
NAMES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
         "jax_persistent_cache_min_compile_time_secs")


class Program:
  """Stands for a compiled program; unlike an object(), it can be referred to weakly."""


def settings():
  return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def fresh(monkeypatch):
  """JAX as in a process whose user has set nothing; afterwards as before."""
  before = settings()
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  program_cache.compilation_cache.reset_cache()


def test_a_program_is_built_once_in_a_run_and_dropped_with_it():
  built = []

  def build():
    built.append(Program())
    return built[-1]

  assert program_cache.shared("a", build) is not program_cache.shared("a", build)
  with program_cache.opened("auto"):
    first = program_cache.shared("a", build)
    with program_cache.opened("auto"):  # a run within a sweep
      assert program_cache.shared("a", build) is first
    assert program_cache.shared("a", build) is first
    assert program_cache.shared("b", build) is not first
    gone = weakref.ref(first)
    built.clear()
    del first
    gc.collect()
    assert gone() is not None
  gc.collect()
  assert gone() is None
  assert len(built) == 0 and program_cache.shared("a", build) in built


def hyperparameters(**changes):
  hp = ConfigDict(common.stage(steps=4, prompts=4, save_every=2, optim=common.adamw(lr=1e-2),
                               sampling=common.sampling(samples_per_prompt=4, max_tokens=6))
                  | common.grpo())
  hp.update(changes)
  return hp


def compiled(shape=(1, 1, 1), model_config=CONFIG, objective=objectives.GRPO, **changes):
  """The programs of a stage whose parts are all made anew."""
  hp = hyperparameters(**changes)
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    model = models.get(dict(model_config))
    learner = Role(model, models.laid_out(model.config, mesh))
    return compiling.compile_programs(
        StageModels(learner, None, learner, on_policy=True, guide=None), hp, objective,
        objectives.logp, stage.optimizer(hp, model.config),
        Samplers(sampler.SamplerConfig(), prompt_tokens=3, stop_ids=(1,), decode=str))


@pytest.mark.medium
def test_equal_stages_share_programs_and_unequal_ones_do_not():
  alone = compiled(minibatches=2)
  with program_cache.opened("auto"):
    one = compiled(minibatches=2)
    two = compiled(minibatches=2)
    assert one.update is two.update and one.token_logps is two.token_logps
    assert one.sampler.programs is two.sampler.programs
    assert one.update is not alone.update
    others = [compiled(minibatches=2, clip_low=0.1), compiled(minibatches=2, prompts=8),
              compiled(minibatches=2, steps=5, optim=common.adamw(lr=1e-2, decay="linear")),
              compiled(minibatches=2, optim=common.adamw(lr=2e-2)),
              compiled((1, 2, 1), minibatches=2),
              compiled(minibatches=2, model_config=CONFIG | {"rope_theta": 1e5}),
              compiled(minibatches=2, objective=objectives.NEGATIVE_LOG_LIKELIHOOD)]
    assert len({id(found.update) for found in (one, *others)}) == 1 + len(others)
    assert programs.build.cache_info().currsize > 0
  assert programs.build.cache_info().currsize == 0  # the sampler's, dropped with the run


@pytest.mark.medium
def test_samplers_share_the_programs_that_they_have_in_common():
  model = models.get(CONFIG)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), np.float32),
                        models.shapes(model.config))
  prompts = [rollouts.Prompt(i, (2, 3 + i)) for i in range(8)]

  def make(**changes):
    return sampler.Sampler(model, sampler.Sampling(max_tokens=6, **changes), 8, 3)

  with program_cache.opened("auto"):
    two, one, greedy = make(samples_per_prompt=2), make(), make(temperature=0.0)
    rows, _ = one(params, prompts, seed=(0,))
  assert two.programs.shapes.batches == (16, 8) and one.programs.shapes.batches == (8,)
  size = 8, one.programs.shapes.lengths[0]
  assert one.programs.decode[size] is two.programs.decode[size]
  assert greedy.programs.decode[size] is not one.programs.decode[size]
  for name in ("layer_weights", "other_weights", "prefill"):
    assert getattr(one.programs, name) is getattr(greedy.programs, name)
    assert getattr(one.programs, name) is getattr(two.programs, name)
  # A program that was compiled for another sampler gives the numbers of the sampler's own.
  alone = make()
  assert alone.programs.prefill is not one.programs.prefill
  jax.tree.map(np.testing.assert_array_equal, rows, alone(params, prompts, seed=(0,))[0])


@pytest.mark.medium
def test_the_second_of_two_equal_stages_compiles_nothing(tmp_path):
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh), program_cache.opened("auto"):
    first = test_loop.make(tmp_path / "one", mesh, epochs=2)
    second = test_loop.make(tmp_path / "two", mesh, epochs=2)
    one, _ = test_loop.run(first)
    two, _ = test_loop.run(second._replace(optimizer=first.optimizer))
  test_loop.equal(one, two)
  counts = [metrics.read(tmp_path / name, "timing")[0]["programs_compiled"]
            for name in ("one", "two")]
  assert counts[0] > 5 and counts[1] == 0


@pytest.mark.medium
def test_a_second_export_compiles_nothing(tmp_path):
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    # A Config of its own, which equals the first.
    for name, count in (("first", None), ("second", 0)):
      model = models.get(dict(CONFIG, rope_theta=2e4))
      params = test_loop.params_of(model, 0, mesh)
      with metrics.compilations() as compiled:
        hf.save(tmp_path / name, model, params)
        assert count is None or compiled().count == count


def test_a_folder_serves_one_kind_of_cpu_and_the_settings_come_back(fresh, tmp_path, monkeypatch):
  before = settings()
  with program_cache.opened(str(tmp_path / "mine")):
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == tmp_path / "mine" and folder.is_dir() and not list(folder.iterdir())
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  assert settings() == before
  monkeypatch.setattr(program_cache, "_cpu", lambda: "other")
  with program_cache.opened(str(tmp_path / "mine")):
    other = Path(jax.config.jax_compilation_cache_dir)
  assert other.parent == folder.parent and other.name == "cpu-other" != folder.name


def test_the_default_is_the_users_cache_folder_or_the_one_that_jax_has(fresh, tmp_path,
                                                                       monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with program_cache.opened("auto"):
    assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / ".cache/s2d_jax/xla"
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
  with program_cache.opened("auto"):
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
  with program_cache.opened("auto"):
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


def test_an_empty_path_switches_the_cache_off(fresh, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
  with program_cache.opened(""):
    jax.jit(lambda x: x * 3)(np.float32(1))
    assert not jax.config.jax_enable_compilation_cache
  assert jax.config.jax_enable_compilation_cache and not (tmp_path / "jax").exists()


def test_a_folder_that_cannot_be_written_is_refused(fresh, tmp_path, monkeypatch):
  (tmp_path / "file").touch(0o777)
  for path in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), None, 3):
    with pytest.raises(ValueError, match=r"^config.compilation_cache is .*: name a folder that"):
      keys.check_value("config.compilation_cache", path, program_cache.KEY)
  for path in ("", "auto", "gs://bucket/xla", str(tmp_path / "new" / "folder")):
    keys.check_value("config.compilation_cache", path, program_cache.KEY)
  assert not (tmp_path / "new").exists()  # looking writes nothing
  # Where only the attempt shows it.
  with pytest.raises(ValueError, match=r"^config.compilation_cache is '.*file/x': name a folder"):
    with program_cache.opened(str(tmp_path / "file" / "x")):
      pass
  # A home that cannot be written was not chosen: the run goes on without a cache.
  monkeypatch.setenv("HOME", str(tmp_path / "file"))
  with program_cache.opened("auto"):
    assert jax.config.jax_compilation_cache_dir is None


# Trains a stage and prints its programs, the seconds that the cache saved, and its numbers' hash.
JOB = """
import hashlib, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
from etils import epath
from s2d_jax import metrics, program_cache, sharding
from tests import test_loop
folder = epath.Path(sys.argv[1])
mesh = sharding.make_mesh((1, 1, 1))
with jax.set_mesh(mesh), program_cache.opened(sys.argv[2]):
  stage = test_loop.make(folder, mesh, epochs=2, minibatches=2)
  params, _ = test_loop.run(stage)
weights = b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(params)))
logs = [path.read_bytes() for name in ("metrics", "ledger", "samples")
        for path in sorted((folder / name).iterdir())]
start = metrics.read(folder, "timing")[0]
print(json.dumps([hashlib.sha256(b"".join([weights, *logs])).hexdigest(),
                  start["programs_compiled"], start["compile_seconds_saved"]]))
"""


@pytest.mark.slow
def test_programs_from_the_disk_give_the_numbers_of_new_ones_bit_for_bit(tmp_path):
  found = []
  # Without what shortens compilation elsewhere: as a user's run.
  environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"],
                 "PYTHONPATH": str(Path(__file__).parents[1])}
  for index, cache in enumerate(("", tmp_path / "xla", tmp_path / "xla")):
    done = subprocess.run([sys.executable, "-c", JOB, str(tmp_path / str(index)), str(cache)],
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # XLA warns where a program was compiled for another CPU.
    assert "not supported on the host machine" not in done.stderr
    found.append(json.loads(done.stdout.splitlines()[-1]))
  (off, count, saved_off), (cold, _, saved_cold), (warm, _, saved_warm) = found
  assert off == cold == warm
  assert count > 5 and saved_off == 0 and saved_warm > saved_cold and saved_warm > 0.5
