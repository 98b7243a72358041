"""Every benchmark runs at its smoke size and writes a result with command, machine and sizes."""

import importlib
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import grpo, loss, measure, sampler
from s2d_jax import models

ROOT = Path(__file__).parents[2]
TORCH = importlib.util.find_spec("torch") is not None
COMMON = {"benchmark", "command", "revision", "date", "machine", "load_average", "sizes"}
MACHINE = {"system", "processor", "cores", "python", "jax", "platform", "device", "devices"}
TIMED = {"seconds", "repeats", "first"}
COMPILED = {"compile_seconds", "argument_bytes", "temporary_bytes", "output_bytes", "alias_bytes"}
KEYS = {
    "step": {"forward", "train", "flops", "compile_seconds", "memory", "forward_memory", "peers",
             "matmul_peak", "profile"},
    "sampler": {"workloads", "peers", "matmul_peak", "bandwidth"},
    "grpo": {"step", "flops", "compile_seconds", "memory", "peers", "matmul_peak"},
    "loss": {"memory", "time", "peers", "matmul_peak"},
    "loading": {"stored_bytes", "largest_tensor_bytes", "ours"} | ({"transformers"} if TORCH
                                                                   else set()),
    "depth": {"programs"},
    "checksums": {"bytes", "idle", "busy", "final", "read"},
    "checker": {"agreement", "held_out_agreement", "fresh_agreement", "unread_agreement", "hostile",
                "linear", "string_answers_per_second"},
}
STEP = {"seconds", "repeats", "first", "first_loss", "last_loss", "tokens_per_second",
        "share_of_peak"}
SAMPLER = TIMED | {"tokens_per_second", "tokens", "bound_tokens_per_second", "share_of_bound"}
OURS = SAMPLER | {"compile_seconds", "memory", "slots", "stats"}
RIVALS = ("transformers", "transformers_continuous")
GRPO = TIMED | {"tokens", "entropy", "share_of_peak"}
LOADING = {"seconds", "touch_seconds", "repeats", "bytes_per_second", "peak_above_start_bytes",
           "peak_anonymous_bytes", "peak_above_weights_bytes", "parameter_bytes"}


def smoke(name, folder, *flags):
  """The result of a benchmark at its smoke size."""
  argv = ["--smoke", f"--results={folder}", *flags]
  path = importlib.import_module(f"benchmarks.{name}").main(argv)
  assert path.parent == folder and re.fullmatch(rf"{name}-[a-z0-9-]+\.json", path.name)
  result = json.loads(path.read_text())
  assert set(result) == COMMON | KEYS[name]
  assert set(result["machine"]) == MACHINE
  assert result["command"] == " ".join(["python -m", f"benchmarks.{name}", *argv])
  if "matmul_peak" in result:
    assert set(result["matmul_peak"]) == TIMED | {
        "size", "dtype", "calls", "flops_per_second"}
    assert result["matmul_peak"]["flops_per_second"] > 0
  return result


def test_every_benchmark_has_its_keys_here():
  scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
  # `sizes` compiles for chips that are not here, and measures nothing.
  assert scripts - {"__init__", "measure", "sizes"} == set(KEYS)


@pytest.mark.medium
@pytest.mark.parametrize("objective", ["grpo", "forward_kl", "reverse_kl", "jsd"])
def test_step(objective, tmp_path):
  result = smoke("step", tmp_path, f"--objective={objective}", "--repeats=2")
  assert (tmp_path / f"step-{objective.replace('_', '-')}-cpu.json").exists()
  assert result["sizes"]["objective"] == objective and result["peers"] == {}
  for task in ("forward", "train"):
    assert set(result[task]) == {"ours"} and set(result[task]["ours"]) == STEP
    assert len(result[task]["ours"]["repeats"]) == 2
  # Each of 2 × 8 tokens: 2 FLOPs a weight, which are 1 layer of q, o 16 × 16, k, v 16 × 8 and 3 of
  # 16 × 16, and 64 × 16 unembedded. Each of 36 pairs a row: 4 × 2 heads of 8. Thrice that for the
  # update, and the guide's once more.
  forward = 2 * 8 * 2 * (2 * 256 + 2 * 128 + 3 * 256 + 1024) + 2 * 36 * 4 * 2 * 8
  assert result["flops"] == {"forward": forward,
                             "train": forward * (3 if objective == "grpo" else 4)}
  train = result["train"]["ours"]
  assert train["tokens_per_second"] == pytest.approx(16 / train["seconds"])
  # Both slots of AdamW and the weights are donated, and 4 bytes each.
  assert result["memory"]["alias_bytes"] >= 3 * 4 * (2 * 256 + 2 * 128 + 3 * 256 + 1024)


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason="the peer is PyTorch")
def test_step_and_pytorch(tmp_path):
  result = smoke("step", tmp_path)
  for task in ("forward", "train"):
    for name in ("pytorch_eager", "pytorch_compiled"):
      assert set(result[task][name]) == STEP | {"peak_bytes"}
      # Weights and tokens are equal, so losses are too, at first and after an update of each.
      for key in ("first_loss", "last_loss"):
        mine, theirs = (result[task][side][key] for side in ("ours", name))
        assert theirs == pytest.approx(mine, rel=1e-5)
    change = result["train"]["ours"]["last_loss"] - result["train"]["ours"]["first_loss"]
    assert abs(change) > 1e-4  # the update changed the loss


@pytest.mark.medium
def test_sampler(tmp_path):
  result = smoke("sampler", tmp_path)
  assert set(result["workloads"]) == {"ragged", "refill", "uniform"} and result["peers"] == {}
  assert result["bandwidth"]["bytes_per_second"] > 0
  for workload in result["workloads"].values():
    assert set(workload) == {"ours"} and set(workload["ours"]) == OURS
    ours = workload["ours"]
    assert ours["tokens_per_second"] == pytest.approx(ours["tokens"][0] / ours["seconds"])
    assert ours["slots"] == 4 and ours["stats"]["tokens"] == ours["tokens"][0]
    assert set(ours["memory"]) == COMPILED - {"compile_seconds"}
  # 2 × 2 rows, three times as many, and all of them to their 8 tokens.
  assert result["workloads"]["uniform"]["ours"]["tokens"] == [4 * 8]
  assert 4 <= result["workloads"]["ragged"]["ours"]["tokens"][0] <= 4 * 8
  assert 12 <= result["workloads"]["refill"]["ours"]["tokens"][0] <= 12 * 8


@pytest.mark.medium
def test_sampler_decoding_alone(tmp_path):
  argv = ["--smoke", f"--results={tmp_path}", "--decode=1,4", "--max_tokens=16"]
  result = json.loads(sampler.main(argv).read_text())
  assert result["command"] == " ".join(["python -m benchmarks.sampler", *argv])
  assert set(result["workloads"]) == {"decode_1", "decode_4"}
  for name, rows in (("decode_1", 1), ("decode_4", 4)):
    ours = result["workloads"][name]["ours"]
    assert ours["tokens"] == [16 * rows] and ours["slots"] == rows
    # 2,560 weights of 4 bytes, and keys and values of 8 numbers at 5 to 19 places of each row.
    assert ours["decoding"]["bytes_per_step"] == 4 * (2560 + 2 * 8 * rows * (5 + 19) / 2)
    assert set(ours["decoding"]) == {"seconds_per_step", "bytes_per_step", "share_of_bandwidth",
                                     "share_of_bound"}


@pytest.mark.medium
def test_rows_sampled_alone_and_in_a_batch(tmp_path):
  argv = ["--smoke", f"--results={tmp_path}", "--alone=float32,bfloat16"]
  found = json.loads(sampler.main(argv).read_text())["alone"]
  assert found["float32"] == {"rows": 4, "differ": 0}
  assert found["bfloat16"]["rows"] == 4


def test_the_bound_by_hand():
  config = models.get(measure.SHAPES["qwen3-smoke"]).config
  workload = sampler.Workload([[1, 2, 3]] * 3, 1, 8, 1.0, (), slots=2)
  # Rows of 3, 1 and 2 tokens in two slots: the third takes the second's, and ends with the first.
  flops_S, bytes_S = sampler.step_costs(config, workload, [3, 1, 2])
  attended_S = np.array([3 + 3, 4 + 3, 5 + 4])
  np.testing.assert_array_equal(bytes_S, 4 * (2560 + 2 * 8 * attended_S))
  np.testing.assert_array_equal(flops_S, 2 * 2560 * 2 + 4 * 2 * 8 * attended_S)
  assert sampler.bound(flops_S, bytes_S, 1.0, 1e9) == pytest.approx(flops_S.sum())
  assert sampler.bound(flops_S, bytes_S, 1e9, 1.0) == pytest.approx(bytes_S.sum())


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason="the rivals are PyTorch")
def test_sampler_and_transformers(tmp_path):
  result = smoke("sampler", tmp_path, "--workloads=ragged,refill", f"--rivals={','.join(RIVALS)}")
  assert set(result["peers"]) == set(RIVALS)
  for name, rows in (("ragged", 4), ("refill", 12)):
    for rival in RIVALS:
      row = result["workloads"][name][rival]
      assert set(row) == SAMPLER and rows <= row["tokens"][0] <= rows * 8


def test_unequal_samplers_are_not_timed():
  greedy = {"ours": {"tokens": [[1, 2]]}, "theirs": {"tokens": [[1, 3]]}}
  with pytest.raises(ValueError, match="theirs continues greedily with .*time only equal samplers"):
    sampler.check_equal(greedy)


@pytest.mark.medium
def test_grpo(tmp_path):
  result = smoke("grpo", tmp_path, "--repeats=2")
  assert set(result["step"]) == {"ours"} and result["peers"] == {}
  ours = result["step"]["ours"]
  assert set(ours) == GRPO | {"draw", "reward", "update", "logp_gap_max"}
  assert len(ours["repeats"]) == 2 and ours["tokens"] == 2 * 2 * 8
  assert ours["logp_gap_max"] < 1e-5
  # Each of 2 prompts of 4 tokens, 10 pairs, is read once; 4 rows of 12 tokens, 78 pairs: 8 tokens
  # drawn, then three forwards. 1,536 weights at every token, 64 x 16 more at the 8 of an answer.
  row, read = 2 * (12 * 1536 + 8 * 1024) + 78 * 64, 2 * 4 * 1536 + 10 * 64
  assert result["flops"] == 2 * (read + 2 * (row - read + 3 * row))
  assert set(result["memory"]) == {"draw", "update"}


def test_unequal_steps_are_not_timed():
  found = {"ours": {"tokens": 8, "entropy": 3.0}, "trl": {"tokens": 8, "entropy": 3.1}}
  with pytest.raises(ValueError, match="trl has 8 tokens of entropy 3.1 and we"):
    grpo.check_equal(found)


@pytest.mark.medium
def test_loss(tmp_path):
  result = smoke("loss", tmp_path)
  assert set(result["time"]) == {"8", "16"}
  for ways in result["time"].values():
    assert set(ways) == {"negative_log_likelihood", "forward_kl", "reverse_kl", "jsd"}
    for name, row in ways.items():
      assert set(row) == {"blockwise", "direct"} | ({"logp"} if name.startswith("neg") else set())
      for way in row.values():
        assert set(way) == TIMED | {"loss", "gradients", "share_of_peak"}
  assert set(result["memory"]) == {"16 tokens, block 2", "16 tokens, block 4", "8 tokens, block 4",
                                   "16 tokens, direct"}
  for account in result["memory"].values():
    assert set(account) == COMPILED - {"compile_seconds"} | {"beyond_gradient_bytes"}
  assert result["peers"] == {}


@pytest.mark.medium
def test_loss_in_another_type(tmp_path):
  result = smoke("loss", tmp_path, "--dtype=bfloat16", "--tokens=16")
  assert result["matmul_peak"]["dtype"] == "bfloat16"
  single = json.loads(loss.main(["--smoke", f"--results={tmp_path}", "--tokens=16"]).read_text())
  for name, ways in result["time"]["16"].items():
    off = abs(ways["direct"]["loss"] / single["time"]["16"][name]["direct"]["loss"] - 1)
    assert 1e-6 < off < 1e-2  # rounded, and nearly the same


@pytest.mark.parametrize("dtype, off", [("float32", 2e-5), ("bfloat16", 2e-3)])
def test_unequal_losses_are_not_timed(dtype, off):
  ways = {"direct": {"loss": 1.0, "gradients": [2.0, 3.0]},
          "blockwise": {"loss": 1.0, "gradients": [2.0, 3.0 * (1 + off)]}}
  with pytest.raises(ValueError, match="blockwise of reverse_kl has .*time only equal losses"):
    loss.check_equal("reverse_kl", ways, dtype)
  ways["blockwise"]["gradients"][1] = 3.0 * (1 + off / 4)
  loss.check_equal("reverse_kl", ways, dtype)


def test_the_result_holds_the_command_and_its_file_the_kind(tmp_path):
  parse = measure.parser("A benchmark.", {"rows": 8}, {"rows": 1})
  options = parse(["--smoke", f"--results={tmp_path}"])
  path = measure.write("loss", options, {}, "v5p")
  assert path.name == "loss-v5p-cpu.json"
  result = json.loads(path.read_text())
  assert result["benchmark"] == "loss"
  assert result["command"] == f"python -m benchmarks.loss --smoke --results={tmp_path}"


@pytest.mark.medium
def test_loading(tmp_path):
  result = smoke("loading", tmp_path)
  weights = 2 * 256 + 2 * 128 + 3 * 256 + 64 * 16
  norms = 3 * 16 + 2 * 8
  assert 0 < result["stored_bytes"] - 2 * (weights + norms) < 2000  # the file's header
  assert result["largest_tensor_bytes"] == 2 * 64 * 16  # the embedding
  for name in ("ours", *("transformers",) * TORCH):
    assert set(result[name]) == LOADING
    assert result[name]["parameter_bytes"] == 2 * (weights + norms)


@pytest.mark.medium
def test_checksums(tmp_path):
  result = smoke("checksums", tmp_path)
  assert result["bytes"] == 4 * 1000 * 1000
  for kind in ("idle", "busy"):
    found = result[kind]
    assert len(found["with"]) == len(found["without"]) == 1
    assert found["save_seconds_per_GB"] == pytest.approx(found["save_seconds"] / 0.004)
    assert 0 < found["waited_seconds"] == pytest.approx(
        found["share_of_save"] * found["save_seconds"])
  final = result["final"]
  assert final["hash_seconds"] == pytest.approx(final["share_of_work"] * final["save_seconds"])
  assert final["added_seconds"] == pytest.approx(final["with"][0] - final["without"][0])
  assert result["read"]["checkpoint"]["share_of_work"] > 0
  assert result["read"]["hf_load"]["bytes"] > 4 * 64 * 16  # the embedding


@pytest.mark.medium
def test_depth(tmp_path):
  result = smoke("depth", tmp_path)
  one, two = (result["programs"][layers] for layers in ("1", "2"))
  assert {"decode", "prefill", "layer_weights", "admit"} <= set(one) and set(one) == set(two)
  assert set(one["decode"]) == {"seconds", "processor_seconds", "code_bytes", "text_bytes",
                                "kernels"}
  # Decoding has all layers written out, and reading prompts has one.
  assert two["decode"]["kernels"] > one["decode"]["kernels"]
  assert two["prefill"]["kernels"] == one["prefill"]["kernels"] > 0


def test_the_median_is_of_the_repeats_and_not_of_the_first_run(monkeypatch):
  clock = iter([0.0, 100.0, 0.0, 1.0, 0.0, 5.0, 0.0, 2.0])
  monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
  assert measure.timed(lambda: (), 3) == {"seconds": 2.0, "repeats": [1.0, 5.0, 2.0],
                                          "first": 100.0}


def test_flags_move_one_size_and_unknown_ones_are_refused(capsys):
  parse = measure.parser("A benchmark.", {"rows": 8, "shape": "large"},
                         {"rows": 1, "shape": "small"})
  assert vars(parse([]).sizes) == {"rows": 8, "shape": "large"}
  assert vars(parse(["--smoke", "--rows=3"]).sizes) == {"rows": 3, "shape": "small"}
  with pytest.raises(SystemExit):
    parse(["--cows=3"])
  assert "--cows" in capsys.readouterr().err
  with pytest.raises(ValueError, match="no model is called 'huge'"):
    measure.model("huge")


def test_the_named_shape_has_29_million_parameters():
  shape = measure.SHAPES["qwen3-29m"]
  keys = ("hidden_size", "vocab_size", "intermediate_size", "head_dim", "num_attention_heads",
          "num_key_value_heads")
  D, V, F, H, N, K = (shape[key] for key in keys)
  assert (D, V, F, H, N, K) == (512, 32_000, 1536, 64, 8, 4)
  layer = D * H * (2 * N + 2 * K) + 3 * D * F
  assert math.isclose(V * D + 4 * layer, 29e6, rel_tol=0.02)


def test_the_readme_names_every_command():
  readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
  for name in KEYS:
    assert f"python -m benchmarks.{name}" in readme


@pytest.mark.medium
def test_checker(tmp_path):
  result = smoke("checker", tmp_path)
  assert sum(n["rows"] for n in result["agreement"].values()) >= 12
  assert sum(n["rows"] for n in result["held_out_agreement"].values()) >= 12
  tables = [result[key] for key in ("agreement", "held_out_agreement", "fresh_agreement")]
  # No checker accepts a wrong answer, and math-verify misses none of the first three sets.
  for n in [n for table in tables for n in table.values()]:
    assert n["verify_agrees"] == n["rows"] >= n["string_agrees"]
  for n in [n for table in (*tables, result["unread_agreement"]) for n in table.values()]:
    assert n["string_false_positives"] == n["verify_false_positives"] == 0
  assert result["hostile"]["stopped"] == 1 and result["hostile"]["honest_verdicts_unchanged"]
  assert result["string_answers_per_second"] > 0
