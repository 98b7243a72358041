"""Which policy `remat=auto` takes: the first that fits, by programs of given sizes."""

import types

import jax
import jax.numpy as jnp
import pytest

from configs import arithmetic
from s2d_jax import hosts, metrics, models, recipe, remat, sharding, tasks
from s2d_jax.errors import InputError
from tests.test_compiling import CONFIG

# Bytes of an update: arguments 100, of which the output takes 90, and temporaries.
TEMPORARIES = {"named": 800, "attention": 500, "block": 300}


def program(model):
  """Stands for the compiled update of a model, and says its policy."""
  account = types.SimpleNamespace(
      argument_size_in_bytes=100, temp_size_in_bytes=TEMPORARIES[model.config.remat],
      output_size_in_bytes=95, alias_size_in_bytes=90)
  return types.SimpleNamespace(policy=model.config.remat, memory_analysis=lambda: account)


def taken(memory, others=0, policy="auto"):
  return remat.fitting(models.get(dict(CONFIG), remat=policy), program, memory, others).policy


# 905 bytes are 95 % of 953, 605 of 637, 405 of 427.
@pytest.mark.parametrize("memory, expected", [
    (953, "named"), (952, "attention"), (637, "attention"), (636, "block"), (427, "block"),
    (10, "block")])  # the last is taken even where it does not fit
def test_the_fastest_that_fits_is_taken(memory, expected):
  assert taken(memory) == expected


def test_other_models_of_the_stage_are_counted():
  assert taken(953, others=1) == "attention"


def test_a_named_policy_is_taken_without_a_look_at_the_memory():
  assert taken(None, policy="block") == "block"


def test_an_unknown_memory_is_refused_with_the_choices():
  sentence = ("config.remat is auto, and a cpu does not tell how much memory it has: set it to one "
              "of named, attention, block, of which the last needs least.")
  with pytest.raises(InputError) as error:
    taken(None)
  assert str(error.value) == sentence


class Refused(jax.stages.Lowered):
  """A program that does not fit, found when it is compiled to be measured."""

  def __init__(self):
    pass

  def compile(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


# Preflight lowers a program and a run compiles it.
@pytest.mark.parametrize("refused", [Refused, lambda: Refused().compile()],
                         ids=["lowered", "compiled"])
def test_a_policy_that_the_compiler_refuses_is_passed_over(refused, capsys):
  def compiled_for(model):
    return refused() if model.config.remat == "named" else program(model)
  model = models.get(dict(CONFIG), remat="auto")
  assert remat.fitting(model, compiled_for, 10**6, 0).policy == "attention"
  assert capsys.readouterr().err == "config.remat is auto: attention\n"


@pytest.mark.parametrize("message, policies", [
    ("RESOURCE_EXHAUSTED: out of memory", ("named", "attention", "block")),  # nothing is left
    ("INTERNAL: a bug", ("named",))])  # not about memory
def test_other_errors_of_the_compiler_are_raised(message, policies):
  tried = []

  def compiled_for(model):
    tried.append(model.config.remat)
    raise jax.errors.JaxRuntimeError(message)

  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    remat.fitting(models.get(dict(CONFIG), remat="auto"), compiled_for, 10**6, 0)
  assert tuple(tried) == policies


def test_the_last_policy_is_returned_unmeasured():
  # Preflight compiles it and says what it lacks.
  def compiled_for(model):
    return Refused()
  model = models.get(dict(CONFIG), remat="auto")
  assert isinstance(remat.fitting(model, compiled_for, 10**6, 0), Refused)


@pytest.mark.medium
def test_a_lowered_program_is_compiled_to_be_measured():
  def lowered(model):
    size = {"named": 1000, "attention": 100, "block": 10}[model.config.remat]
    return jax.jit(lambda x: x + 1).lower(jnp.zeros((size, 1000)))
  model = models.get(dict(CONFIG), remat="auto")
  # Arguments and output of 1,000 x 1,000 and of 100 x 1,000 numbers.
  for memory, rows in ((9e6, 1000), (7e6, 100), (1e5, 10)):
    found = remat.fitting(model, lowered, int(memory), 0)
    assert found.in_avals[0][0].shape == (rows, 1000)


def run(policy, workdir):
  """Two steps of the tiny reverse KL; the stage's folder."""
  config = arithmetic.get_config("tiny")
  with config.unlocked():
    config.update({"arms": "raw_bridge", "remat": policy})
    config.probe.problems = 0
    config.sampler.cache_gib = 0.01  # the samplers are equal, whatever the memory
    config.stages.forward_kl.steps = 0
    config.stages.reverse_kl.steps = 2
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    (name,) = recipe.run(config, workdir, tasks.get(config)).nodes
  return workdir / name


@pytest.mark.medium
@pytest.mark.parametrize("memory, policy", [(10**9, "named"), (10**6, "block")])
def test_a_run_with_auto_is_one_with_the_policy_that_fits(tmp_path, monkeypatch, capsys, memory,
                                                          policy):
  expected = run(policy, tmp_path / "named")
  monkeypatch.setattr(hosts, "local_memory", lambda: memory)
  capsys.readouterr()
  found = run("auto", tmp_path / "auto")
  assert f"config.remat is auto: {policy}\n" in capsys.readouterr().err
  assert found.name == expected.name  # no policy renames a stage
  assert metrics.read(found, "metrics") == metrics.read(expected, "metrics")
  assert ((found / "hf" / "model.safetensors").read_bytes()
          == (expected / "hf" / "model.safetensors").read_bytes())


def test_a_run_with_auto_where_the_memory_is_unknown_is_refused(tmp_path):
  with pytest.raises(InputError, match="config.remat is auto, and a cpu does not tell"):
    run("auto", tmp_path / "run")
  assert not (tmp_path / "run").exists()
