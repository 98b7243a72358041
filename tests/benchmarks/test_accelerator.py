"""`benchmarks/accelerator.sh`: every part runs in tiny sizes, and one that fails harms no other."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import measure
from benchmarks.accelerator import __main__ as driver
from benchmarks.accelerator import (
  decoder,
  install,
  leasts,
  parts,
  plan,
  rivals,
  store,
  table,
  traces,
  worker,
)
from s2d_jax import chips

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.sh"
H200 = json.loads((ROOT / "benchmarks/results/accelerator-nvidia-h200.json").read_text())["parts"]


def run(folder, *flags):
  """(the stored results, the printed lines) of the script at its smoke size."""
  done = subprocess.run(
      [str(SCRIPT), "--smoke", f"--results={folder}", *flags], capture_output=True, text=True,
      check=False, timeout=900, env=os.environ | {"PYTHON": sys.executable})
  assert done.returncode == 0, done.stderr
  (path,) = folder.glob("*.json")
  assert path.name == "accelerator-cpu.json" and done.stdout.splitlines()[-1] == str(path)
  return json.loads(path.read_text()), done.stdout.splitlines()


@pytest.mark.slow
def test_every_part_has_a_section_and_a_line(tmp_path):
  names = [part.name for part in plan.PARTS]
  # Programs that tests before have compiled are in this folder.
  found, printed = run(tmp_path, "--seconds=900", f"--parts={','.join(names)}",
                       f"--cache={os.environ['JAX_COMPILATION_CACHE_DIR']}")
  assert list(found["parts"]) == names
  for name, part in found["parts"].items():
    if name.startswith("rival") and "needs torch" in " ".join(part.get("output", ())):
      continue
    assert part["status"] == "finished", (name, part)
    assert part["seconds"] > 0 and part["results"]
    # Least times stand in the lines of the programs.
    assert name == "least times" or any(line.startswith(f"| {name} | ") for line in printed)
  results = {name: part["results"] for name, part in found["parts"].items()}
  update = results["update 0.6B"]
  # 2 rows of 8 tokens, as `test_smoke.test_step` counts them by hand.
  forward = 2 * 8 * 2 * (2 * 256 + 2 * 128 + 3 * 256 + 1024) + 2 * 36 * 4 * 2 * 8
  assert update["2 x 8"]["flops"] == 3 * forward and update["2 x 8"]["finite"] == 1
  assert 0 < update["2 x 8"]["least_seconds"] and update["trace"]["kernels"] > 0
  # Weights that stand still have no gradients.
  assert results["update 8B adapters"]["1 x 8"]["flops"] == 2 * forward / 2
  rows = results["decode 1.7B"]["4 rows"]
  # 2,560 weights of 4 bytes, and keys and values of 8 numbers at places 4 to 11 of each row: the
  # last of three dispatches of 4 tokens has no successor.
  assert rows["bytes_per_step"] == 4 * (2560 + 2 * 8 * 4 * (4 + 11) / 2)
  assert rows["slots"] == 4 and len(rows["steps"]) == 2
  for name in ("grpo 1.7B", "opd 1.7B from 8B"):
    assert results[name]["step"]["tokens"] == 2 * 2 * 8
  assert 0 < results["grpo 1.7B cached"]["start"]["compile_seconds"]
  # Another part has run in its process before, so the start is not its own.
  assert "seconds" in results["grpo 1.7B"]["start"]
  assert "seconds" not in results["opd 1.7B from 8B"]["start"]
  # The loss in blocks and of all logits, three updates, one of adapters, and twice two decoders.
  assert results["least times"]["programs"]["count"] == 2 + 3 + 1 + 2 * 2
  assert abs(results["loss"]["direct"]["loss"] / results["loss"]["blockwise"]["loss"] - 1) < 1e-5
  if importlib.util.find_spec("torch"):
    sides = results["rivals"]["train"]
    for loss in ("first_loss", "last_loss"):
      assert sides["pytorch_eager"][loss] == pytest.approx(sides["ours"][loss], rel=1e-5)
    for side in ("ours", "transformers"):
      assert results["rivals"]["decode_4"][side]["tokens"] == [4 * 12]


@pytest.mark.slow
def test_a_part_that_is_stopped_leaves_the_others(tmp_path, monkeypatch):
  named = {part.name: part for part in plan.PARTS}
  parts = [named["rates"], named["account"]._replace(limit=0.25), named["loss"],
           plan.PARTS[-1]._replace(least=10_000, named=False)]
  monkeypatch.setattr(plan, "PARTS", tuple(parts))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  path = driver.main(["--smoke", f"--results={tmp_path}"])
  found = json.loads(path.read_text())["parts"]
  assert found["rates"]["status"] == found["loss"]["status"] == "finished"
  assert found["account"]["status"] == "not finished: stopped after 1 s"
  assert found[parts[-1].name]["status"].startswith("not started: ")
  printed = table.of(store.read(path)).splitlines()
  assert "| account | **not finished: stopped after 1 s** | | | |" in printed
  assert any(line.startswith("| loss | blockwise | ") for line in printed)


@pytest.mark.medium
def test_a_part_that_fails_leaves_the_end_of_its_traceback(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "abacus")
  run = driver.Run(tmp_path, driver._options(["--smoke"]), deadline=1e12)
  run.measure(plan.PARTS[0])
  found = store.read(run.path)["parts"]["rates"]
  assert found["status"] == "failed with exit status 1" and found["results"] == {}
  assert "abacus" in found["output"][-1] and len(found["output"]) <= worker.TAIL
  # The next part begins in a new process.
  assert run.worker is None


def test_parts_of_an_earlier_run_stay(tmp_path):
  machine = {"device": "NVIDIA H100", "jax": "0.11"}
  store.write(tmp_path / "accelerator-nvidia-h100.json", {
      "date": "then", "revision": "0123456789", "machine": machine, "parts": {
          "loss": {"results": {"run": {"seconds": 2}}}, "rates": {"results": {}},
          "account": {"results": {"run": {"seconds": 3}}}, "no longer a part": {"results": {}}}})
  run = driver.Run(tmp_path / "scratch", driver._options([f"--results={tmp_path}"]), deadline=0)
  store.write(run.path, {"date": "now", "revision": "abc", "machine": machine | {"jax": "0.12"},
                         "parts": {"rates": {"status": "finished", "results": {"rates": {}}},
                                   "account": {"status": "not started", "results": {}}}})
  run.keep(["--smoke"])
  found = json.loads(run.path.read_text())
  assert run.path.name == "accelerator-nvidia-h100.json" and found["date"] == "now"
  assert found["command"] == "benchmarks/accelerator.sh --smoke"
  then = {"date": "then", "revision": "0123456789", "jax": "0.11"}
  assert found["parts"] == {"loss": then | {"results": {"run": {"seconds": 2}}},
                            "account": then | {"results": {"run": {"seconds": 3}}},
                            "rates": {"status": "finished", "results": {"rates": {}}}}
  del found["parts"]["rates"]
  assert "| loss (0123456, jax 0.11) | whole run | 2.0 s |  |  |" in table.of(found).splitlines()
  # Nor does a part that cannot start lose what was measured.
  (loss,) = [part for part in plan.PARTS if part.name == "loss"]
  run.measure(loss)
  assert json.loads(run.path.read_text())["parts"]["loss"] == found["parts"]["loss"]


class Simulated:
  """A worker that lets a clock run instead of measuring; its parts take `seconds(name, limit)`."""

  def __init__(self, clock, seconds, environment):
    self.clock = clock
    self.seconds = seconds
    self.environment = environment

  def measure(self, name, path, limit):
    taken = min(self.seconds(name), limit)
    self.clock[0] += taken
    return "finished" if taken < limit else f"not finished: stopped after {limit:.0f} s"

  def tail(self):
    return []

  def stop(self):
    pass


@pytest.fixture
def simulate(monkeypatch, tmp_path):
  """Runs the command on a clock of its own; returns (seconds, sections, processes)."""
  def run(seconds, installation, *flags):
    clock, processes = [1000.0], []
    def started(_, environment):
      processes.append(environment)
      return Simulated(clock, seconds, environment)
    def packages(limit):
      clock[0] += min(installation, limit)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(driver, "Worker", started)
    monkeypatch.setattr(driver.install, "packages", packages)
    path = driver.main([f"--results={tmp_path}", *flags])
    return clock[0] - 1000, store.read(path)["parts"], processes
  return run


def test_the_expected_seconds_leave_time_for_an_installation(simulate):
  expected = {part.name: part.expected for part in plan.PARTS}
  default = [part for part in plan.PARTS if not part.named]
  assert plan.SECONDS == 480
  assert sum(part.expected for part in default) + plan.INSTALLATION + plan.END <= plan.SECONDS
  seconds, found, _ = simulate(expected.get, installation=plan.INSTALLATION)
  assert seconds <= plan.SECONDS
  assert {name: part["status"] for name, part in found.items()} == {
      part.name: "finished" for part in default}


def test_parts_that_never_end_are_stopped_before_the_end_of_the_seconds(simulate):
  seconds, found, _ = simulate(lambda _: float("inf"), installation=float("inf"))
  assert seconds == plan.SECONDS - plan.END
  # No part is left out of the table.
  assert list(found) == [part.name for part in plan.PARTS if not part.named]
  assert {part["status"].partition(":")[0] for part in found.values()} == {"not finished",
                                                                          "not started"}


def test_parts_share_a_process_where_memory_and_programs_are_the_same(simulate):
  _, _, processes = simulate(lambda _: 1.0, installation=0.0)
  folders = [Path(environment["JAX_COMPILATION_CACHE_DIR"]).name for environment in processes]
  growing = ["XLA_PYTHON_CLIENT_PREALLOCATE" in environment for environment in processes]
  # Updates, decoding and losses; a stage's start; its second start, and distillation; all others.
  assert folders == ["shared", "stage", "stage", "shared"]
  assert growing == [False, False, False, True]


def test_a_cold_part_finds_no_programs_of_an_earlier_run(simulate, tmp_path):
  cache = tmp_path / "cache"
  for folder in ("stage", "shared"):
    (cache / folder).mkdir(parents=True)
    (cache / folder / "program").touch()
  simulate(lambda _: 1.0, 0.0, f"--cache={cache}")
  assert [path.name for path in cache.glob("*/program")] == ["program"]
  assert (cache / "shared" / "program").exists()


def test_a_part_starts_only_if_enough_time_is_left_for_its_first_result():
  for part in plan.PARTS:
    assert part.least <= part.expected < part.limit, part.name


def measured(part):
  """The seconds on an H200 of a part's compilation and repeats, which its plan cannot undercut."""
  results = H200[part.name]["results"]
  timed = [values for values in results.values() if isinstance(values, dict)]
  compilation = max(values.get("compile_seconds", 0.0) for values in timed)
  repeats = part.full.get("repeats", 0)
  # The first run, and in a program's repeats one more to warm up.
  runs = sum(values["seconds"] * (repeats + 1 + (part.function != "step"))
             for values in timed if "repeats" in values and isinstance(values["repeats"], list))
  runs += sum(values["calls"][0] * (repeats + 1) for values in timed if "calls" in values)
  return compilation + runs


@pytest.mark.parametrize("name", ["update 0.6B", "decode 1.7B", "update 1.7B", "loss", "decode 8B",
                                  "update 8B adapters", "grpo 1.7B", "grpo 1.7B cached",
                                  "opd 1.7B from 8B", "account"])
def test_expected_seconds_lie_between_their_parts_and_the_whole_as_measured(name):
  (part,) = [part for part in plan.PARTS if part.name == name]
  assert measured(part) < part.expected
  # Updates have another length each, and three programs of 8B's in place of one.
  longest = 1.4 if part.function == "update" else 1.1
  assert part.expected < longest * H200[name]["seconds"]


def test_every_size_of_the_plan_is_there():
  full = {part.name: part.full for part in plan.PARTS}
  for name in ("update 0.6B", "update 1.7B", "update 8B adapters"):
    assert [tokens for _, tokens in full[name]["batches"]] == [2048, 8192, 16_384]
  for name in ("decode 1.7B", "decode 8B"):
    assert set(full[name]["rows"]) == {1, 16, 64, 256}
  # A rival's side is the program that an earlier part has compiled.
  rivals = full["rivals"]
  assert all(rivals[key] == full["decode 1.7B"][key]
             for key in ("prompt_tokens", "max_tokens", "dispatch"))
  assert rivals["decode_shape"] == full["decode 1.7B"]["shape"]
  assert rivals["decode_rows"] in full["decode 1.7B"]["rows"]
  assert rivals["update_shape"] == full["update 0.6B"]["shape"]
  assert (rivals["update_rows"], rivals["update_tokens"]) in full["update 0.6B"]["batches"]
  assert rivals["block"] == full["update 0.6B"]["block"]


@pytest.mark.parametrize("environment, found", [
    ({}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(chips.GPU_SHARE)}),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    # JAX refuses both names together.
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {})])
def test_a_process_reserves_the_share_of_a_gpu_that_commands_reserve(environment, found):
  assert plan.reserved(environment) == found
  assert plan.PARTS[0].environment == plan.reserved(os.environ)


def test_a_result_is_on_disk_as_soon_as_it_exists(tmp_path):
  path = tmp_path / "results" / "found.json"
  store.update(path, "decode", status="started")
  store.add(path, "decode", "1 rows", {"seconds": 1.0})
  assert json.loads(path.read_text())["parts"] == {
      "decode": {"results": {"1 rows": {"seconds": 1.0}}, "status": "started"}}
  assert [x.name for x in path.parent.iterdir()] == ["found.json"]


def test_missing_packages_are_named_in_one_sentence(monkeypatch):
  calls = []
  monkeypatch.setattr(install, "NEEDS", {"json": "json", "no_such_module": "no-such-package"})
  monkeypatch.setattr(install, "OPTIONAL", {})
  monkeypatch.setattr(install.subprocess, "run", lambda words, **_: calls.append(words))
  with pytest.raises(SystemExit, match="install no-such-package with .* or name a folder .* "
                                       "PYTHONPATH"):
    install.packages(60)
  assert [words[1:4] + words[-1:] for words in calls] == [["-m", "pip", "install",
                                                           "no-such-package"]]
  # A package that one part alone needs stops no other part.
  monkeypatch.setattr(install, "NEEDS", {"json": "json"})
  monkeypatch.setattr(install, "OPTIONAL", {"no_such_module": "no-such-package"})
  install.packages(60)
  assert len(calls) == 2


def test_pip_has_the_constraints_and_leaves_installed_versions(monkeypatch):
  versions = {"jax": "0.11.2", "numpy": "2.3.0"}
  def version(name):
    if name not in versions:
      raise importlib.metadata.PackageNotFoundError(name)
    return versions[name]
  monkeypatch.setattr(install.importlib.metadata, "version", version)
  text = """# A comment.
flax==0.12.8; python_version < "3.12"
flax==0.12.12; python_version >= "3.12"
jax==0.10.2; python_version < "3.12"
jax==0.12.0.1; python_version >= "3.12"
numpy==2.4.6; python_version < "3.12"
"""
  assert install.constraints(text).splitlines() == [
      'flax==0.12.8; python_version < "3.12"', 'flax==0.12.12; python_version >= "3.12"',
      "jax==0.11.2", "numpy==2.3.0"]
  monkeypatch.setattr(install, "NEEDS", {"json": "json", "no_such_module": "no-such-package"})
  found = []
  def pip(words, **_):
    (option,) = [word for word in words if word.startswith("--constraint=")]
    found.append(Path(option.partition("=")[2]).read_text())
  monkeypatch.setattr(install.subprocess, "run", pip)
  with pytest.raises(SystemExit):
    install.packages(60)
  stored = (ROOT / "constraints.txt").read_text()
  assert found == [install.constraints(stored)]
  assert "jax==0.11.2" in found[0] and "optax==0.2.8" in found[0]


def test_every_package_that_pip_fetches_has_a_version():
  pinned = {re.split(r"[=;]", line)[0].replace("_", "-").lower()
            for line in (ROOT / "constraints.txt").read_text().splitlines()}
  for package in (install.NEEDS | install.OPTIONAL).values():
    assert package.partition("[")[0].replace("_", "-").lower() in pinned


def test_an_unknown_part_is_refused(capsys):
  with pytest.raises(SystemExit):
    driver._options(["--parts=rates,rats"])
  assert "there is no part 'rats': choose from rates, update 0.6B" in capsys.readouterr().err


# Names as CUDA, cuDNN, XLA and Triton write them.
@pytest.mark.parametrize("kernel, found", [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "product"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "product"),
    ("gemm_fusion_dot_12_0", "product"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("loop_multiply_fusion_3", "fusion"), ("input_reduce_fusion_1", "reduction"),
    ("MemcpyD2D", "copy"), ("wrapped_transpose", "copy"), ("input_scatter_fusion_2", "scatter"),
    ("DeviceRadixSortOnesweepKernel", "sort"), ("ncclDevKernel_AllReduce_Sum", "collective"),
    ("some_new_thing", "other")])
def test_the_class_of_a_kernel(kernel, found):
  assert traces.class_of(kernel) == found


def test_the_operation_names_the_class_where_the_kernel_does_not():
  assert traces.class_of("kernel_0x12", "custom-call.cudnn$fmha") == "attention"


def test_the_sums_of_a_trace_by_hand():
  found = traces.sums([("gemm_a", "", 0.0, 4e9), ("gemm_a", "", 5e9, 2e9), ("copy", "", 9e9, 1e9)])
  assert found["seconds"] == {"product": 6.0, "copy": 1.0}
  assert (found["kernels"], found["busy_seconds"], found["span_seconds"]) == (3, 7.0, 10.0)
  assert found["largest"][0] == {"kernel": "gemm_a", "class": "product", "count": 2, "seconds": 6.0}


# Of jax 0.12: raised as an error it would end the process, because a C++ type is being made.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
@pytest.mark.medium
def test_a_profile_has_the_operations_that_ran():
  found = traces.of(lambda: jnp.sort(jnp.ones((64, 64)) @ jnp.ones((64, 64)), axis=0))
  assert found["kernels"] >= 2 and 0 < found["seconds"]["sort"] <= found["busy_seconds"]


@pytest.mark.parametrize("accelerator, order", [
    (False, "a0 b0 a1 b1 a2 b2"), (True, "a0 a1 a2 a3 b0 b1 b2 b3")])
def test_repeats_alternate_on_a_cpu_and_run_back_to_back_on_an_accelerator(
    accelerator, order, monkeypatch):
  monkeypatch.setattr(measure, "on_accelerator", lambda: accelerator)
  called, saved = [], []
  def side(name):
    def answer(number):
      called.append(f"{name}{number}")
      return {"seconds": 1.0, "number": number}
    return answer
  found = measure.alternate({"a": side("a"), "b": side("b")}, 2,
                            save=lambda answers: saved.append(list(answers)))
  assert " ".join(called) == order
  # The first and two repeats; the run that warms an accelerator up is left out.
  numbers = [0, 2, 3] if accelerator else [0, 1, 2]
  assert all([answer["number"] for answer in found[name]] == numbers for name in "ab")
  assert saved == ([["a"], ["a", "b"]] if accelerator else [["a", "b"]])


def test_a_side_stops_at_its_seconds_and_one_that_is_too_late_is_left_out(capsys):
  def late(_):
    raise TimeoutError("not finished after 9 s")
  found = measure.alternate({"slow": lambda _: {"seconds": 5.0}, "late": late,
                           "fast": lambda _: {"seconds": 1.0}}, 4, seconds=8.0)
  assert {name: len(answers) for name, answers in found.items()} == {"slow": 3, "fast": 5}
  assert capsys.readouterr().err == "late: not finished after 9 s\n"


def test_a_rival_that_takes_too_long_is_killed():
  program = "import json, time; print('{}', flush=True); input(); time.sleep(60)"
  peer = measure.Peer([sys.executable, "-c", program], seconds=1.0)
  assert peer.versions == {}
  with pytest.raises(TimeoutError, match="not finished after 1 s"):
    peer.ask("go")
  peer.close()


def test_a_rival_without_an_answer_is_named_without_a_folder_of_the_host():
  peer = measure.Peer([sys.executable, "-c", "print('{}', flush=True)"])
  peer.process.wait()
  with pytest.raises(RuntimeError, match="^python -c print.* has ended: its error is above"):
    peer.ask("go")
  peer.close()


class Update(rivals.Update):
  """An update without a model: one second a run, and one loss."""

  def __init__(self, sizes, scratch):
    del scratch
    self.sizes = sizes
    self.runs = {}
    self.flops = 1.0
    self.learner = self.batch = self.program = None

  def commands(self, sizes):
    return {name: [name] for name in sizes.updates}

  def ask(self, _):
    return {"seconds": 1.0, "loss": 2.0}


class Decode(Update):
  """The other task."""

  def commands(self):
    return {rivals.DECODING: [rivals.DECODING]}

  def time(self, name, ask, save):
    super().time(name, ask, lambda _, values: save("decode_4", values))


class Peer:
  """A rival whose name says how it fails."""

  def __init__(self, command, seconds):
    (self.name,) = command
    if self.name == "dead":
      raise RuntimeError("dead at its start")
    if self.name == "unready":
      raise TimeoutError(f"not finished after {seconds:g} s")

  def ask(self, _):
    if self.name == "ending":
      raise RuntimeError("ended by its first request")
    if self.name == rivals.DECODING:
      raise TimeoutError("not finished after 9 s")
    return {"seconds": 0.5, "loss": 2.0}

  def close(self):
    pass


def test_a_rival_that_is_missing_is_named_with_its_reason_and_the_others_are_measured(monkeypatch):
  monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(rivals, "Update", Update)
  monkeypatch.setattr(rivals, "Decode", Decode)
  monkeypatch.setattr(measure, "Peer", Peer)
  sizes = SimpleNamespace(updates=("dead", "unready", "ending", "good"), seconds=9.0, repeats=1,
                          update_rows=2, update_tokens=8, rates={"flops_per_second": 1.0})
  results = {}
  rivals.measure_all(sizes, lambda name, values: results.update({name: dict(values)}))
  assert results["left out"] == {
      "dead": "dead at its start", "unready": "not finished after 9 s",
      "ending": "ended by its first request", "transformers": "not finished after 9 s"}
  assert list(results["train"]) == ["ours", "good"] and list(results["decode_4"]) == ["ours"]
  printed = table.of({"parts": {"rivals": {"status": "finished", "results": results}}})
  for name, reason in results["left out"].items():
    assert f"| rivals | {name} | **left out: {reason}** |  |  |" in printed
  assert "| rivals | train, good | 32 tokens/s, 0.500 s |" in printed


def test_without_torch_the_rivals_are_left_out_with_the_reason(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  saved = {}
  rivals.measure_all(None, lambda name, values: saved.update({name: values}))
  assert saved == {"left out": {"all rivals": "torch is not installed"}}


def test_the_output_of_a_part_that_left_a_rival_out_is_kept(tmp_path):
  class Worker(Simulated):
    def measure(self, name, path, limit):
      store.add(path, name, "left out", {"transformers": "why"})
      return "finished"
    def tail(self):
      return ["ImportError"]
  run = driver.Run(tmp_path, driver._options(["--smoke"]), deadline=1e12)
  run.worker = Worker(None, None, None)
  part = run.last = plan.PARTS[1]
  run.measure(part)
  found = store.read(run.path)["parts"][part.name]
  assert (found["status"], found["output"]) == ("finished", ["ImportError"])
  # The process measures the next part too.
  assert run.worker is not None


def test_an_accelerator_is_warmed_up_once_more_and_seconds_bound_the_repeats(monkeypatch):
  monkeypatch.setattr(measure, "on_accelerator", lambda: True)
  clock = iter([0.0, 100.0, 0.0, 50.0, 0.0, 3.0, 0.0, 4.0])
  monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
  assert measure.timed(lambda: (), 9, seconds=7.0) == {"seconds": 3.5, "repeats": [3.0, 4.0],
                                                       "first": 100.0}


def test_the_readme_names_every_part():
  readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
  assert "benchmarks/accelerator.sh" in readme
  for part in plan.PARTS:
    assert re.search(rf"\| {re.escape(part.name)} \|", readme), part.name
    row = rf"\| {re.escape(part.name)} \| .* \| {part.expected} s \| {part.limit} s \|\n"
    assert re.search(row, readme), part.name


def test_the_readme_has_the_table_of_the_stored_results():
  readme = (ROOT / "benchmarks" / "README.md").read_text()
  for path in (ROOT / "benchmarks" / "results").glob("accelerator-*.json"):
    assert table.of(store.read(path)) in readme


def test_all_parts_fit_the_default_seconds_at_their_least():
  assert sum(part.least for part in plan.PARTS) <= 480


def test_programs_that_decoders_share_are_compiled_once():
  compiled = []
  class Lowered:
    def compile(self):
      compiled.append(self)
      return "program"
  lowered = Lowered()
  class Refused:
    def compile(self):
      raise ValueError("no memory")
  with futures.ThreadPoolExecutor(8) as pool, futures.ThreadPoolExecutor(2) as compiling:
    once = decoder.Once(compiling)
    assert set(pool.map(once, [lowered] * 32)) == {"program"}
    assert compiled == [lowered]
    with pytest.raises(ValueError, match="no memory"):
      once(Refused())


def test_a_part_that_is_stopped_while_it_keeps_a_program_leaves_no_half_file(tmp_path, monkeypatch):
  monkeypatch.setenv("TEXTS", str(tmp_path / "texts"))
  write = Path.write_text
  def killed(path, text, **options):
    write(path, text[:len(text) // 2], **options)
    raise KeyboardInterrupt
  monkeypatch.setattr(Path, "write_text", killed)
  program = SimpleNamespace(as_text=lambda: "HloModule")
  with pytest.raises(KeyboardInterrupt):
    leasts.keep(program, "loss", "direct", 1)
  assert not list((tmp_path / "texts").glob("*.json"))
  monkeypatch.undo()
  monkeypatch.setenv("TEXTS", str(tmp_path / "texts"))
  leasts.keep(program, "loss", "direct", 1)
  (path,) = (tmp_path / "texts").glob("*.json")
  assert json.loads(path.read_text())["text"] == "HloModule"


@pytest.mark.medium
def test_the_least_time_of_a_program_that_was_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("TEXTS", str(tmp_path / "texts"))
  x = jnp.ones((8, 4))
  leasts.keep(jax.jit(lambda x: x @ x.T).lower(x).compile(), "update 8B adapters", "1 x 8", 1, 2)
  (path,) = (tmp_path / "texts").iterdir()
  chip = chips.CHIPS["v5e"]._replace(flops=1e3, bandwidth=1e30)
  ((part, result, values),) = leasts.read_all([path], chip, processes=0)
  # 2 x 8 x 8 x 4 FLOPs of two steps, at 1,000 a second.
  assert (part, result) == ("update 8B adapters", "1 x 8")
  assert values["least_seconds"] == pytest.approx(2 * 8 * 8 * 4 / 2 / 1e3)
  # And read by other processes.
  assert list(leasts.read_all([path, path], chip, processes=1)) == [(part, result, values)] * 2


def test_one_row_is_one_row():
  step = {"tokens_per_second": 1.0, "seconds_per_step": 1.0, "share_of_bandwidth": 0.5}
  printed = table.of({"parts": {"decode 1.7B": {"status": "finished", "results": {
      "1 rows": step, "16 rows": step}}}})
  assert "| decode 1.7B | 1 row | " in printed and "| decode 1.7B | 16 rows | " in printed


def test_shares_by_another_cards_rates_are_marked(tmp_path, monkeypatch):
  path = tmp_path / "found.json"
  store.write(path, {"parts": {}})
  monkeypatch.setitem(parts.FUNCTIONS, "loss", lambda sizes, save: save("one", {"seconds": 1.0}))
  (loss,) = [part for part in plan.PARTS if part.name == "loss"]
  parts.run(loss, path, smoke=True)
  found = store.read(path)["parts"]["loss"]["results"]
  assert found["assumed rates"] == {"flops_per_second": 684e12, "bytes_per_second": 4.5e12}
  # A card that measured its own has no such row.
  store.add(path, "rates", "rates", {"flops_per_second": 1.0, "bytes_per_second": 1.0})
  store.write(path, {"parts": {"rates": store.read(path)["parts"]["rates"]}})
  parts.run(loss, path, smoke=True)
  assert store.read(path)["parts"]["loss"]["results"] == {"one": {"seconds": 1.0}}
  assert "an H200's rates" in table.of({"parts": {"loss": {"results": found}}})
