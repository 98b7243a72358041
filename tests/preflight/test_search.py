"""The search of preflight on costs written by hand: order, what is left out, and the price."""

import pytest
from ml_collections import ConfigDict

from s2d_jax import command, preflight
from s2d_jax.errors import InputError
from s2d_jax.preflight import costs, hlo, runs, search
from s2d_jax.preflight.search import Candidate


@pytest.fixture
def config():
  stage = {"steps": 10, "prompts": 8, "minibatches": 1, "microbatches": 4,
           "sampling": {"samples_per_prompt": 4}}
  return ConfigDict({"mesh": (1, 4, 1), "remat": "block", "stages": {
      "reverse_kl": stage, "sft": {**stage, "steps": 0, "prompts": 1}}}).lock()


def test_every_mesh_splits_heads_and_rows_evenly():
  # Eight devices, two key heads, eight rows: tensor is 1 or 2.
  found = list(search.meshes(8, 2, 8))
  assert found == [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2)]
  assert list(search.meshes(8, 2, 4)) == [(1, 4, 2), (2, 2, 2), (4, 1, 2)]


def test_candidates_start_with_the_configs_microbatches_and_leave_out_stages_without_steps(config):
  # 32 rows in 4 microbatches of 8: one microbatch of 32, up to 8 of one row on each of 4 shards.
  found = list(search.candidates(config, 4, key_heads=1))
  factors = [candidate.factor for candidate in found]
  assert list(dict.fromkeys(factors)) == [1, 0.5, 0.25, 2]
  assert found[0] == Candidate((1, 4, 1), 1, "block")
  for factor, microbatches in ((0.25, 1), (2, 8)):
    (changed, *_) = [candidate.apply(config) for candidate in found if candidate.factor == factor]
    assert changed.stages.reverse_kl.microbatches == microbatches and changed.mesh == (1, 4, 1)
  assert config.stages.reverse_kl.microbatches == 4


def test_a_candidate_is_printed_as_flags(config):
  assert Candidate((1, 4, 1), 2, "dots").flags(config) == (
      '--config.mesh="(1, 4, 1)" --config.remat=dots --config.stages.reverse_kl.microbatches=8')


def test_one_device_tries_one_row_a_microbatch(config):
  found = list(search.candidates(config, 1, key_heads=1))
  last = found[-1].apply(config).stages.reverse_kl
  assert found[-1].factor == 8 and last.microbatches == 32


def test_microbatches_of_every_stage_split_its_rows_evenly():
  # 24 rows of a stage in 4 microbatches, 64 of another in 16, on four shards.
  stage = {"steps": 10, "minibatches": 1, "sampling": {"samples_per_prompt": 8}}
  config = ConfigDict({"mesh": (1, 4, 1), "remat": "block", "stages": {
      "sft": {**stage, "prompts": 3, "microbatches": 4},
      "reverse_kl": {**stage, "prompts": 8, "microbatches": 16}}}).lock()
  found = list(search.candidates(config, 4, key_heads=1))
  assert {candidate.mesh for candidate in found} == {(1, 4, 1), (2, 2, 1), (4, 1, 1)}
  numbers = {}
  for candidate in found:
    stages = candidate.apply(config).stages
    numbers[candidate.factor] = (stages.sft.microbatches, stages.reverse_kl.microbatches)
  # Six rows a shard do not split into 4 microbatches, but into 3 of 2.
  assert numbers == {1: (3, 16), 0.5: (2, 8), 0.25: (1, 4), 2: (6, 16)}


def program(seconds, size, stage="reverse_kl"):
  return costs.Cost(stage, "update", costs.Account(size, 0, 0, 0), 0, 2.0, hlo.total(()),
                    costs.Least(seconds, 0.0, 0.0, 0.0))


def seconds(found):
  """Hours of a run of ten steps; see `runs.total` for those of a plan."""
  return sum(10 * cost.runs * cost.least.seconds for cost in found) / 3600


def test_the_fastest_that_fits_is_the_cheapest(config):
  # (data, fsdp, tensor) -> (seconds of an update, bytes): the fastest does not fit.
  table = {(1, 4, 1): (5.0, 60), (2, 2, 1): (3.0, 90), (4, 1, 1): (1.0, 200)}
  compiled = []
  def costs_of(changed):
    compiled.append((changed.mesh, changed.stages.reverse_kl.microbatches))
    return [program(*table[changed.mesh])]
  lines = []
  tried = [Candidate(mesh, factor, "block") for factor in (1, 0.5) for mesh in table]
  best = search.cheapest(config, tried, 100, costs_of, lambda changed: 50, seconds, lines.append)
  assert best == (Candidate((2, 2, 1), 1, "block"), [program(3.0, 90)])
  # The mesh that did not fit is not compiled with microbatches of twice the size.
  assert compiled.count(((4, 1, 1), 4)) == 1 and ((4, 1, 1), 2) not in compiled
  assert len(lines) == 5 and sum("does not fit" in line for line in lines) == 1


@pytest.mark.parametrize("most, expected", [
    (8, [4, 2, 1]),      # every size fits: smaller microbatches would only be slower
    (4, [4, 2]),
    (1, [4, 8, 16, 32]),  # the config's own do not fit: one row at a time does
])
@pytest.mark.parametrize("name", ["update", "gradients"])  # in one program, and in two
def test_smaller_microbatches_are_tried_only_where_larger_ones_do_not_fit(
    config, most, expected, name):
  compiled = []
  def costs_of(changed):
    count = changed.stages.reverse_kl.microbatches
    compiled.append(count)
    return [program(count, 32 / count * 10)._replace(program=name)]
  tried = [candidate for candidate in search.candidates(config, 1, key_heads=1)
           if candidate.remat == "block"]
  limit = {8: 320, 4: 100, 1: 10}[most]
  best = search.cheapest(config, tried, limit, costs_of, lambda changed: 1, seconds,
                         lambda line: None)
  assert compiled == expected
  fitting = [count for count in expected if 320 / count <= limit]
  assert best[0].apply(config).stages.reverse_kl.microbatches == min(fitting)


def test_smaller_microbatches_are_not_tried_where_sampling_does_not_fit(config):
  compiled = []
  def costs_of(changed):
    compiled.append(changed.stages.reverse_kl.microbatches)
    return [program(1.0, 90), program(1.0, 110)._replace(program="sample")]
  tried = [Candidate((1, 4, 1), factor, "block") for factor in (1, 0.5, 2)]
  assert search.cheapest(config, tried, 100, costs_of, lambda changed: 50, seconds,
                         print) is None
  assert compiled == [4]


def test_nothing_is_compiled_where_the_weights_alone_do_not_fit(config):
  def costs_of(changed):
    raise AssertionError("compiled")
  lines = []
  tried = [Candidate((1, 4, 1), factor, "block") for factor in (1, 0.5, 2)]
  assert search.cheapest(config, tried, 10**9, costs_of, lambda changed: 2 * 10**9,
                         seconds, lines.append) is None
  (line,) = lines
  assert "weights, optimizer and gradients alone need 2.00 GB of 1.00 GB" in line


def test_of_equally_fast_meshes_rows_are_split_before_heads(config):
  tried = list(search.candidates(config, 4, key_heads=4))
  assert (1, 1, 4) in {candidate.mesh for candidate in tried}
  found, _ = search.cheapest(config, tried, 100, lambda _: [program(1.0, 1)], lambda _: 0, seconds,
                             lambda _: None)
  assert found.mesh == (1, 4, 1)


def test_a_candidate_without_memory_for_a_cache_does_not_fit(config):
  def costs_of(changed):
    if changed.mesh == (1, 4, 1):
      raise InputError("config.sampler.cache_gib is 0 and a device has 1 GiB left: use more.")
    return [program(3.0, 90)]
  lines = []
  tried = [Candidate(mesh, factor, "block") for factor in (1, 0.5, 2)
           for mesh in ((1, 4, 1), (2, 2, 1))]
  best = search.cheapest(config, tried, 100, costs_of, lambda changed: 50, seconds, lines.append)
  assert best[0].mesh == (2, 2, 1)
  # Larger microbatches leave no more of the memory, so that mesh is tried once.
  assert [line for line in lines if "(1, 4, 1)" in line] == [
      "mesh (1, 4, 1), microbatches x 1, remat block: does not fit: config.sampler.cache_gib is 0 "
      "and a device has 1 GiB left: use more."]


# ml_collections loads config files by importlib's old name.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_search_without_a_topology_is_refused(capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, ["--config=configs/arithmetic.py:tiny", "--search"])
  assert error.value.code == 2
  found = capsys.readouterr()
  assert "--search needs --topology: name the chips that it is for." in found.err
  assert "compiled" not in found.err and not found.out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("flags, sentence", [
    (["--config=configs/sweep_seeds.py"], "--search takes one run: name a config without a sweep."),
    (["--config=configs/arithmetic.py:tiny", "--config.stages.sft.prompts=0"],
     "config.stages.sft.prompts is 0"),
])
def test_a_search_checks_the_config_before_its_candidates(flags, sentence, capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, [*flags, "--search", "--topology=h100"])
  assert error.value.code == 2
  found = capsys.readouterr()
  assert sentence in found.err
  assert not found.out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_price_needs_chips_to_pay_for(capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, ["--config=configs/arithmetic.py:tiny", "--price=2.5"])
  assert error.value.code == 2
  assert "--price needs --topology: name the chips that it is for." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "cheap", "0", "-1", "nan", "inf"])
def test_a_price_that_is_no_number_is_refused(text):
  with pytest.raises(ValueError, match="--price is .*: give what one chip costs an hour"):
    search.check_price(text)


def test_the_price_is_chips_times_hours_times_price():
  assert search.check_price("2.5") == 2.5 and search.check_price(None) is None
  found = runs.Total(100.0, {"stage": 10, "probe": 2}, ("test (not compiled)",))
  counted = "10 stages, 2 probes, every response of max_tokens; not counted: test (not compiled)"
  assert search.price_sentence(8, found, 2.5) == (
      f"8 chips x 100.0 hours at least x 2.5 = 2,000: {counted}")
  assert search.price_sentence(8, found, None) == f"8 chips x 100.0 hours at least: {counted}"
  # A small run costs little, and not nothing.
  small = runs.Total(0.00123, {"stage": 1}, ())
  sentence = search.price_sentence(1, small, 2.5)
  assert sentence.startswith("1 chip x 0.0012 hours at least x 2.5 = 0.0031:")


def test_placements_are_tried_after_everything_else_and_with_the_configs_own_parts(config):
  assert list(search.placements(config)) == [("",), ("optimizer", "guide"), ("optimizer,guide",)]
  for offload, expected in (("guide", [("guide",), ("optimizer,guide",)]),
                            ("guide,optimizer", [("optimizer,guide",)])):
    with config.unlocked():
      config.offload = offload
    assert list(search.placements(config)) == expected
  candidate = next(iter(search.candidates(config, 4, 1, "guide")))
  assert str(candidate) == "mesh (1, 4, 1), microbatches x 1, remat block, offload guide"
  assert candidate.flags(config) == ('--config.mesh="(1, 4, 1)" --config.remat=block '
                                     "--config.offload=guide "
                                     "--config.stages.reverse_kl.microbatches=4")
  assert candidate.apply(config).offload == "guide"


def test_a_placement_that_fails_excludes_no_other(config):
  size = {"optimizer": 110, "guide": 90}
  tried = [Candidate((1, 4, 1), 1, "block", offload) for offload in size]
  best = search.cheapest(config, tried, 100, lambda changed: [program(1.0, size[changed.offload])],
                         lambda changed: 50, seconds, lambda line: None)
  assert best[0] == tried[1]
