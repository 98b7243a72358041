"""The preflight against bytes counted by hand from the weight files: which programs, how large."""

import json
import pathlib
import re
import shutil
import struct

import jax
import numpy as np
import pytest

from configs import arithmetic
from s2d_jax import command, preflight, program_cache, sharding
from s2d_jax.preflight import pool, programs, topologies, verdicts
from tests.preflight import options

SLACK = 100_000  # bytes of a batch, a key and counters; the smaller model has 749,000


@pytest.fixture
def config(tmp_path):
  """The tiny config on folders that have no weights, and no data anywhere."""
  config = arithmetic.get_config("tiny")
  for role in ("teacher", "student"):
    config[role] = str(shutil.copytree(config[role], tmp_path / role,
                                     ignore=shutil.ignore_patterns("*.safetensors")))
  config.data.dir = str(tmp_path / "data")
  return config


def parameters(role, part=""):
  """Numbers in the tensors of a role's weight file whose names have `part`, from its header."""
  path = f"{arithmetic.get_config()[role]}/model.safetensors"
  with open(path, "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
  return sum(int(np.prod(tensor["shape"])) for name, tensor in header.items()
             if name != "__metadata__" and part in name)


def costs(config):
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    return {(cost.stage, cost.program): cost for cost in preflight.costs_of(config)}


def check(config, expected):
  """Holds the costs against {row: (actor or None, learner, guide or None)}: float32 throughout."""
  found = costs(config)
  size = {role: 4 * parameters(role) for role in ("teacher", "student")} | {None: 0}
  floor = {}
  def cache(role, tokens):
    """The float32 keys and values of some tokens."""
    shape = json.loads(pathlib.Path(config[role], "config.json").read_text())
    numbers = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return 4 * numbers * tokens
  def slots(role, rows, sampling):
    """The cache of every row at its longest."""
    return cache(role, rows * (config.prompt_tokens + sampling.max_tokens))
  def read(role, prompts):
    """One layer that reads prompts: its weights, its cache of them, and their features."""
    shape = json.loads(pathlib.Path(config[role], "config.json").read_text())
    tokens = prompts * config.prompt_tokens
    return (4 * parameters(role, ".layers.0.") + cache(role, tokens) / shape["num_hidden_layers"]
            + 4 * tokens * shape["hidden_size"])
  def sampled(role, rows, sampling):
    """A decode: the weights and the cache."""
    return size[role] + slots(role, rows, sampling)
  def moved(name, role, hp, samples):
    """Arguments of the programs that copy weights and prompts, and that take half of the slots.

    They take one layer; the first takes it from the stack of all.
    """
    layers = json.loads(pathlib.Path(config[role], "config.json").read_text())["num_hidden_layers"]
    longest = slots(role, hp.prompts * samples, hp.sampling) / layers
    prompts = cache(role, hp.prompts * config.prompt_tokens) / layers
    return {f"{name} weights": 4 * parameters(role, ".layers."), f"{name} shrink": longest,
            f"{name} admit": longest + prompts}
  for row, (actor, learner, guide) in expected.items():
    if actor is not None:  # who learns from its own samples once scores them as it does
      floor[row, "token_logps"] = size[actor]
    floor[row, "update"] = 3 * size[learner] + size[guide]  # weights and Adam's two slots
    hp = config.stages[row]
    if row == "weighted_fkl":
      floor[row, "pass rates"] = sampled(learner, hp.prompts * hp.pass_samples, hp.sampling)
      floor[row, "pass rates prefill"] = read(learner, hp.prompts)
      for name, bytes_ in moved("pass rates", learner, hp, hp.pass_samples).items():
        floor[row, name] = bytes_
    if row != "teacher_sft":
      floor[row, "sample prefill"] = read(actor or learner, hp.prompts)
      floor[row, "sample"] = sampled(
          actor or learner, hp.prompts * hp.sampling.samples_per_prompt, hp.sampling)
      samples = hp.sampling.samples_per_prompt
      for name, bytes_ in moved("sample", actor or learner, hp, samples).items():
        floor[row, name] = bytes_
  # Two models are sampled for a score, with temperature and without, and for a probe, which lays
  # them side by side.
  for role in size.keys() - {None}:
    for block, name, hp, samples in (
        ("test", role, config.evals.test, config.evals.test.sampling.samples_per_prompt),
        ("test", f"{role} greedy", config.evals.test, 1),
        ("probe", role, config.probe, config.probe.sampling.samples_per_prompt)):
      floor[block, name] = sampled(role, hp.prompts * samples, hp.sampling)
      floor[block, f"{name} prefill"] = read(role, hp.prompts)
      for program, bytes_ in moved(name, role, hp, samples).items():
        # The probe's few rows have a cache of one size.
        if (block, program) != ("probe", f"{name} shrink"):
          floor[block, program] = bytes_
  floor["probe", "both"] = size["teacher"] + size["student"]
  assert set(found) == set(floor)
  for key, cost in found.items():
    account = cost.account
    assert min(account.arguments, account.output) > 0, key
    # A copy needs nothing but its arguments and its result.
    if not key[1].endswith((" weights", " admit", " shrink")):
      assert account.temporaries > 0, key
    assert floor[key] <= account.arguments < floor[key] + SLACK, key
    if key[1] == "update":  # the new state takes the old one's place: what comes out are metrics
      assert account.output < SLACK, key


@pytest.mark.medium
def test_a_config_of_one_stage_compiles_only_its_programs(quick_compiles, config, tmp_path):
  with config.unlocked():
    config.stages = {"teacher_sft": config.stages.teacher_sft}
  check(config, {"teacher_sft": (None, "teacher", None)})
  assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_memory_of_every_stage_by_hand(quick_compiles, config):
  config.stages.teacher_grpo.update({"kl": "k3", "kl_coef": 0.1})  # a penalty, so a reference
  check(config, {
      "teacher_grpo": (None, "teacher", "teacher"), "teacher_sft": (None, "teacher", None),
      "forward_kl": ("teacher", "student", "teacher"), "sft": ("teacher", "student", None),
      "weighted_fkl": ("teacher", "student", "teacher"),
      "reverse_kl": (None, "student", "teacher"), "student_grpo": (None, "student", None)})


@pytest.mark.medium
def test_in_bfloat16_frozen_weights_take_half_and_trained_ones_do_not(quick_compiles, config):
  with config.unlocked():
    config.stages = {"forward_kl": config.stages.forward_kl}
  config.dtype = "bfloat16"
  found = costs(config)
  teacher, student = (parameters(role) for role in ("teacher", "student"))
  for key, floor in {("forward_kl", "update"): 3 * 4 * student + 2 * teacher,
                     ("forward_kl", "token_logps"): 2 * teacher,
                     ("forward_kl", "sample weights"): 2 * parameters("teacher", ".layers."),
                     ("test", "student prefill"): 2 * parameters("student", ".layers.0.")}.items():
    assert floor <= found[key].account.arguments < floor + SLACK, key


@pytest.mark.medium
def test_a_change_of_size_holds_a_layer_twice_and_the_weights(quick_compiles, config):
  with config.unlocked():
    config.stages = {"forward_kl": config.stages.forward_kl}
  found = costs(config)
  shrink = found["forward_kl", "sample shrink"]
  # Learner, its two slots and the guide; the copy of the actor's weights; the prompts' cache.
  student, teacher = (4 * parameters(role) for role in ("student", "teacher"))
  # Of each prompt's tokens a key and a value. Of the slots' one layer is an argument.
  shape = json.loads(pathlib.Path(config.teacher, "config.json").read_text())
  layers = shape["num_hidden_layers"]
  read = 4 * 2 * layers * shape["num_key_value_heads"] * shape["head_dim"] * (
      config.stages.forward_kl.prompts * config.prompt_tokens)
  held = 3 * student + teacher + teacher + read + (layers - 1) * shrink.account.arguments
  assert held <= shrink.resident < held + SLACK
  assert abs(shrink.account.output / shrink.account.arguments - 0.5) < 0.01


class Uncompiled:
  """Stands for `pool.Progress`, and gives the requests themselves."""

  def costs(self, requests, chip):
    return requests


@pytest.mark.medium
def test_an_evaluation_between_steps_has_the_stages_models_in_memory(config):
  with config.unlocked():
    config.stages = {name: config.stages[name] for name in ("forward_kl", "teacher_sft", "sft")}
    config.evals.during = config.evals.test.copy_and_resolve_references()
  config.evals.during.update({"when": "every 2", "stages": "forward_kl,teacher_sft"})
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    found = {(request.stage, request.program): request.resident
             for request in preflight.costs_of(config, progress=Uncompiled())
             if "during" in request.stage and not request.program.endswith((
                 "prefill", "weights", "admit", "shrink", "grow"))}
  student, teacher = (4 * parameters(role) for role in ("student", "teacher"))
  def prompts(role):
    """Of each prompt's tokens a key and a value, in every layer."""
    shape = json.loads(pathlib.Path(config[role], "config.json").read_text())
    return (4 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
            * config.evals.during.prompts * config.prompt_tokens)
  # The learner and its two slots, and the guide, which is the actor too. The copy of the learner's
  # weights is an argument.
  expected = {("forward_kl during", "student"): 3 * student + teacher + prompts("student"),
              ("teacher_sft during", "teacher"): 3 * teacher + prompts("teacher")}
  expected |= {(stage, f"{role} greedy"): held for (stage, role), held in expected.items()}
  assert found.keys() == expected.keys()
  for key, held in expected.items():
    assert held <= found[key] < held + SLACK, key


@pytest.mark.medium
def test_searches_and_probes_by_family_have_their_programs():
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    found = {(request.stage, request.program): request for request in preflight.costs_of(
        options.config(signal="kl"), programs.Target(fast=True), Uncompiled())}
  assert found.keys() == options.programs("kl")
  student, teacher = (4 * parameters(role) for role in ("student", "teacher"))
  # The learner, its two slots and the teacher; in reverse_kl the anchors and a candidate too. What
  # a program reads is an argument.
  held = {("forward_kl", "probe token_logps"): 2 * student + teacher,
          ("reverse_kl", "search jump"): 4 * student + teacher,
          ("reverse_kl", "search compare"): 5 * student}
  for key, expected in held.items():
    assert abs(found[key].resident - expected) < SLACK, key
  # Four steps: searches after 1, 2 and 4, each of three scores and four copies of the weights.
  assert found["reverse_kl", "search compare"].runs == 3 * 3 / 4
  assert found["reverse_kl", "search jump"].runs == 3 * 4 / 4
  # Decisions before the steps 0 and 2, and the teacher's responses once.
  assert found["forward_kl", "probe token_logps"].runs == 2 / 4
  assert found["forward_kl", "probe"].runs * 4 == int(found["forward_kl", "probe"].runs * 4) > 0


@pytest.mark.medium
def test_arrays_on_the_host_are_moved_and_not_resident():
  def requests(offload, target=programs.LOCAL):
    config = options.config(signal="kl")
    config.offload = offload
    with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
      return {(request.stage, request.program): request for request in preflight.costs_of(
          config, target._replace(fast=True), Uncompiled())}

  whole, found = requests(""), requests("optimizer,guide")
  slots, teacher = 2 * 4 * parameters("student"), 4 * parameters("teacher")
  parts = ("moves", "gradients", "apply")
  assert found.keys() - whole.keys() == {
      (stage, part) for stage in ("forward_kl", "reverse_kl") for part in parts}
  for key in found.keys() & whole.keys():
    # The teacher of forward_kl samples, so it stays. A comparison takes the guide.
    away = slots if key[0] == "forward_kl" or key[1] == "search compare" else slots + teacher
    assert abs(whole[key].resident - found[key].resident - away) < SLACK, key
  # reverse_kl searches: its anchor is beside the gradients, and in the state that is applied. The
  # teacher of forward_kl is beside the latter.
  anchor = 4 * parameters("student")
  assert abs(found["reverse_kl", "gradients"].resident - anchor) < SLACK
  assert found["forward_kl", "gradients"].resident == found["reverse_kl", "apply"].resident == 0
  assert abs(found["forward_kl", "apply"].resident - teacher) < SLACK
  moved = found["reverse_kl", "moves"]
  assert abs(moved.lowered.bytes - (2 * slots + teacher)) < SLACK and moved.runs == 1
  # In the table it is sent, at the rate of PCIe of the fifth generation, and takes no memory.
  (cost,) = pool.Progress().costs([moved], topologies.chip("h100"))
  assert cost.bytes == moved.resident and cost.least.bound == "network"
  assert cost.least.seconds == moved.lowered.bytes / 64e9
  assert f"{moved.lowered.bytes / 1e9:,.3f}" in verdicts.line(cost)
  (cost,) = pool.Progress().costs([moved], topologies.chip("v5e:1x1"))
  assert cost.least is None and verdicts.line(cost)


@pytest.mark.medium
def test_fast_has_the_programs_with_all_the_work_of_the_stages(quick_compiles, config):
  with config.unlocked():
    config.stages = {"forward_kl": config.stages.forward_kl}
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    found = [(cost.stage, cost.program)
             for cost in preflight.costs_of(config, programs.Target(fast=True))]
  assert found == [("forward_kl", "sample"), ("forward_kl", "sample prefill"),
                   ("forward_kl", "token_logps"), ("forward_kl", "update")]


@pytest.mark.parametrize(("memory", "offload", "rank", "expected"), [
    (2**40, "", 0, {"update"}), (2**40, "optimizer", 1, {"gradients", "apply"}),
    (2**20, "", 0, {"sample"})])  # without memory for the sampler's cache
def test_programs_of_updates_alone_are_compiled(config, memory, offload, rank, expected):
  with config.unlocked():
    config.stages = {"student_grpo": config.stages.student_grpo}
  config.offload = offload
  config.stages.student_grpo.lora.rank = rank
  target = programs.Target(topologies.chip("h100")._replace(memory=memory), scores=False,
                           programs=programs.UPDATES)
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    found = {request.program for request in preflight.costs_of(config, target, Uncompiled())}
  assert found == expected


@pytest.mark.medium
def test_adapters_have_a_smaller_update_and_equal_pass_rate_programs(quick_compiles, config):
  # A row that asks its start for pass rates: that model has no adapters, the learner has.
  with config.unlocked():
    config.stages = {"weighted_fkl": config.stages.weighted_fkl}
  def arguments():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
      return {cost.program: cost.account.arguments for cost in preflight.costs_of(config)
              if cost.stage == "weighted_fkl"}
  whole = arguments()
  config.stages.weighted_fkl.lora.rank = 1
  low = arguments()
  assert low.keys() == whole.keys() == {
      *(f"{name}{kind}" for name in ("pass rates", "sample")
        for kind in ("", " prefill", " weights", " admit", " shrink")), "token_logps", "update"}
  assert low["pass rates"] == whole["pass rates"]
  assert low["update"] < whole["update"]  # no slots for the weights themselves


def test_the_cache_has_the_memory_of_the_chip_and_not_of_this_machine(config):
  with config.unlocked():
    config.stages = {"student_grpo": config.stages.student_grpo}
  chip = topologies.chip("h100")._replace(memory=2**20)
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    costs = list(programs.costs_of(config, programs.Target(chip, fast=True)))
  ((stage, program, account, problem),) = [
      (cost.stage, cost.program, cost.account, cost.problem) for cost in costs]
  assert (stage, program, account) == ("student_grpo", "sample", None)
  # The student, its two moments and its start in float32: 0.2 M parameters take more than 2**20.
  gib = r"[\d.e-]+ GiB"
  assert re.match(rf"config\.sampler\.cache_gib is 0 and a device has 0 GiB left beside {gib} of "
                  rf"models, {gib} of weights copied for decoding and the 10% of its memory that "
                  "stay free, and one row", problem)


@pytest.mark.medium
def test_a_stage_without_memory_for_its_cache_does_not_hide_the_others(quick_compiles, config):
  with config.unlocked():
    config.stages = {name: config.stages[name] for name in ("student_grpo", "teacher_sft")}
  chip = topologies.chip("h100")._replace(memory=2**20)
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))):
    costs = list(programs.costs_of(config, programs.Target(chip)))
  refused = {(cost.stage, cost.program) for cost in costs if cost.account is None}
  compiled = {(cost.stage, cost.program) for cost in costs if cost.account is not None}
  assert ("student_grpo", "sample") in refused and ("teacher_sft", "update") in compiled
  # The scores too: each model of the evaluation at the end, and of the probe.
  assert {("test", "teacher"), ("test", "student"), ("probe", "student")} <= refused
  found = verdicts.summary([costs], chip.usable)
  assert "student_grpo: does not fit: student_grpo sample: config.sampler.cache_gib" in found
  assert "\nthe whole: does not fit" in found


@pytest.mark.medium
def test_programs_that_runs_of_a_sweep_share_are_printed_once(quick_compiles, config, capsys):
  with config.unlocked():
    config.stages = {"teacher_sft": config.stages.teacher_sft}
    config.arms = "untrained"
    config.sweep = ({"seed": 1}, {"seed": 2}, {"stages.teacher_sft.prompts": 8})
  preflight.show(config)
  rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
  assert rows.count(["teacher_sft", "update"]) == 2 and rows.count(["probe", "both"]) == 1


# ml_collections loads config files by importlib's old name.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("flag, sentence", [
    ("profile=10:13", "config.profile is '10:13' and the stage student_grpo makes 4 steps"),
    ("arms=nowhere", "there is no arm 'nowhere'"),
    ("arms=raw_bridge,fkl_only stages.reverse_kl.prompts=8",
     "raw_bridge and fkl_only are compared and have unequal dense budgets"),
    ("probe.top_k=25", "config.probe.top_k is 25 and the vocabulary has 24 tokens"),
    ("stages.sft.sampling.max_tokens=60", "config.prompt_tokens + config.stages.sft.sampling"),
    ("stages.sft.sampling.stop_strings=('<|end|>',)", "config.stages.sft.sampling: "),
    ("mesh=(1,1,4) sampler.page=16", "config.sampler.page is 16, and config.mesh's tensor of 4"),
    ("compilation_cache=/nowhere", "config.compilation_cache is '/nowhere': name a folder")])
def test_mistakes_that_a_run_refuses_are_refused_before_anything_compiles(
    flag, sentence, search, capsys, monkeypatch):
  # A folder whose permissions allow it may refuse a file all the same, as a full disk does.
  monkeypatch.setattr(program_cache, "_create", lambda folder: OSError(folder))
  monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[:1])
  flags = ["--config=configs/arithmetic.py:tiny", *(f"--config.{one}" for one in flag.split())]
  if search:
    flags += ["--search", "--topology=h100"]
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, flags)
  assert error.value.code == 2
  found = capsys.readouterr()
  assert f"s2d_jax: {sentence}" in found.err and "compiled" not in found.err and not found.out


# ml_collections loads config files by importlib's old name.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_wrong_config_exits_with_one_sentence(capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, ["--config=configs/arithmetic.py:tiny",
                                  "--config.stages.sft.steps=-1"])
  assert error.value.code == 2
  assert "s2d_jax: config.stages.sft.steps is -1: set it to 1 or " in capsys.readouterr().err
