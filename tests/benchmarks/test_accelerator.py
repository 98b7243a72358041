"""`benchmarks/accelerator.sh`: every part runs in tiny sizes, and one that fails harms no other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import measure
from benchmarks.accelerator import __main__ as driver
from benchmarks.accelerator import plan, store, table, traces

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.sh"


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
  found, printed = run(tmp_path, "--seconds=900")
  assert list(found["parts"]) == [part.name for part in plan.PARTS]
  for name, part in found["parts"].items():
    if name.startswith("rival") and "needs torch" in " ".join(part.get("output", ())):
      continue
    assert part["status"] == "finished", (name, part)
    assert part["seconds"] > 0 and part["results"]
    assert any(line.startswith(f"| {name} | ") for line in printed)
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
  assert abs(results["loss"]["direct"]["loss"] / results["loss"]["blockwise"]["loss"] - 1) < 1e-5


@pytest.mark.slow
def test_a_part_that_is_stopped_leaves_the_others(tmp_path, monkeypatch):
  parts = [part._replace(limit=0.25) if part.name == "account" else part for part in plan.PARTS
           if part.name in ("rates", "account", "loss")]
  parts.append(plan.PARTS[-1]._replace(least=10_000))
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
  path = tmp_path / "found.json"
  monkeypatch.setenv("JAX_PLATFORMS", "abacus")
  driver._measure(plan.PARTS[0], path, tmp_path, deadline=1e12, smoke=True)
  found = store.read(path)["parts"]["rates"]
  assert found["status"] == "failed with exit status 1" and found["results"] == {}
  assert "abacus" in found["output"][-1] and len(found["output"]) <= driver.TAIL


def test_parts_of_an_earlier_run_stay(tmp_path):
  options = driver._options([f"--results={tmp_path}"])
  store.write(tmp_path / "accelerator-nvidia-h100.json", {
      "date": "then", "parts": {"loss": {"results": {"a": {}}}, "rates": {"results": {}}}})
  new = tmp_path / "scratch" / "new.json"
  store.write(new, {"date": "now", "machine": {"device": "NVIDIA H100"}, "parts": {
      "rates": {"status": "finished", "results": {"rates": {}}}}})
  path = driver._named(new, options, ["--smoke"])
  found = json.loads(path.read_text())
  assert path.name == "accelerator-nvidia-h100.json" and found["date"] == "now"
  assert found["command"] == "benchmarks/accelerator.sh --smoke"
  assert found["parts"] == {"loss": {"results": {"a": {}}},
                            "rates": {"status": "finished", "results": {"rates": {}}}}


def test_a_result_is_on_disk_as_soon_as_it_exists(tmp_path):
  path = tmp_path / "results" / "found.json"
  store.update(path, "decode", status="started")
  store.add(path, "decode", "1 rows", {"seconds": 1.0})
  assert json.loads(path.read_text())["parts"] == {
      "decode": {"results": {"1 rows": {"seconds": 1.0}}, "status": "started"}}
  assert [x.name for x in path.parent.iterdir()] == ["found.json"]


def test_missing_packages_are_named_in_one_sentence(monkeypatch):
  calls = []
  monkeypatch.setattr(driver, "NEEDS", {"json": "json", "no_such_module": "no-such-package"})
  monkeypatch.setattr(driver.subprocess, "run", lambda words, **_: calls.append(words))
  with pytest.raises(SystemExit, match="install no-such-package, or name a folder .* PYTHONPATH"):
    driver._require()
  assert [words[1:4] + words[-1:] for words in calls] == [["-m", "pip", "install",
                                                           "no-such-package"]]
  # A package that one part alone needs stops no other part.
  monkeypatch.setattr(driver, "OPTIONAL", {"no_such_module"})
  driver._require()


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


def test_the_readme_has_the_table_of_the_stored_results():
  readme = (ROOT / "benchmarks" / "README.md").read_text()
  for path in (ROOT / "benchmarks" / "results").glob("accelerator-*.json"):
    assert table.of(store.read(path)) in readme


def test_all_parts_fit_the_default_seconds_at_their_least():
  assert sum(part.least for part in plan.PARTS) <= 480
