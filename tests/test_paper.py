"""The paper's tables: every number is as it was printed, and runs fill their own cells."""

import copy

import numpy as np
import pytest

from configs import qwen3_math
from s2d_jax import files, intervals, ladder, paper, report
from tests import test_report as by_hand

PROBLEMS = {"math500": 500, "aime24": 30, "aime25": 30}


WHOLE = qwen3_math.get_config().to_dict()
DECODING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 16384}


def config(student="Qwen3-1.7B", teacher="Qwen3-8B", **changes):
  """The paper's settings, with keys such as stages__student_grpo__steps changed."""
  found = copy.deepcopy(WHOLE) | {"student": f"/models/{student}", "teacher": f"/models/{teacher}"}
  for key, value in changes.items():
    *blocks, name = key.split("__")
    inner = found
    for block in blocks:
      inner = inner[block]
    inner[name] = value
  return found


def scored(folder, arm, benchmark, share, seed=0, at=0, samples=16, problems=None,
           decoding=DECODING, **models):
  """A finished arm whose samples are right for this share of the problems."""
  count = problems or PROBLEMS[benchmark]
  correct = [[int(p < share * count)] * samples for p in range(count)]
  name = by_hand.score(folder, f"eval-{arm}-{benchmark}-{seed}-{at}", correct, split=benchmark,
                       problems=benchmark, seed=seed)
  result = files.read_json(folder / name / "result.json")
  result["scores"] = {f"avg@{samples}": [share, share - 0.01, share + 0.01]}
  files.write_json(folder / name / "result.json", result)
  manifest = files.read_json(folder / name / "manifest.json")
  manifest["inputs"]["evaluation"]["sampling"] = {"samples_per_prompt": samples, **decoding}
  files.write_json(folder / name / "manifest.json", manifest)
  # Runs of another config are of another recipe, and not two seeds of one.
  changed = {key: str(value) for key, value in models.items()}
  trained = by_hand.stage(folder, f"student_grpo-{arm}-{seed}-{at}", [1], inputs={
      "seed": seed, "changed": changed,
      "row": by_hand.stage_row(f"student_grpo-{arm}", "student")})
  by_hand.arm(folder, f"{arm}-{benchmark}", [(arm, [trained], name)], seed=seed, at=at,
              config=config(**models))


def rows(lines, title):
  """{row: its cells} of the first table below a heading, {} where the heading is absent."""
  start = next((i for i, line in enumerate(lines) if line.startswith(f"### {title}")), None)
  if start is None:
    return {}
  found = {}
  for line in lines[start + 4:]:
    if not line.startswith("|"):
      break
    name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    found[name] = cells
  return found


def differences(lines, title):
  """{(difference, teacher, benchmark): (paper, here, verdict)} of the second table."""
  start = next(i for i, line in enumerate(lines) if line.startswith(f"### {title}"))
  found = {}
  for line in lines[start + 1:]:
    if line.startswith("### "):
      break
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 6 and " − " in cells[0]:
      found[tuple(cells[:3])] = tuple(cells[3:])
  return found


def test_the_numbers_are_those_that_were_printed():
  tables = paper.published()["tables"]
  # Spot checks against the paper's text: its abstract has 79.3/25.2 against 75.9/19.8, and 75.4
  # which fresh labels raise to 78.5.
  cells = {(table["where"], row["row"]): row["scores"] for table in tables for row in table["rows"]}
  transfer, halves = "v1 table 3, v4 table 6", "v1 table 4, v4 table 2"
  assert cells[transfer, "RL'd 8B, bridge"] == [[79.3, 0.7], [25.2, 1.6], [20.2, 1.3]]
  assert cells[transfer, "direct GRPO"] == [[75.9, 0.9], [19.8, 1.4], [17.1, 0.9]]
  assert cells[halves, "RL'd 8B, bridge on 1H"][0] == [75.4, 0.8]
  assert cells[halves, "RL'd 8B, then GRPO on 2H"][0] == [78.5, 0.9]
  assert [len(table["rows"]) for table in tables] == [4, 14, 6, 6, 6, 3, 10]
  # Every row of the ablation repeats one of the transfer table, and its deltas as printed in v4.
  *_, ablation = tables
  points = [row["scores"][0][0] for row in ablation["rows"]]
  assert [round(x - points[0], 1) for x in points[1:5]] == [-7.8, -1.7, -3.3, -3.4]
  assert [round(x - points[5], 1) for x in points[6:]] == [-5.8, -1.5, -2.1, -2.7]


def test_the_published_orders_of_the_report_are_the_tables():
  # report.PUBLISHED counts in how many of six comparisons an order holds: RL'd 8B and 14B.
  counted = {}
  for table in paper.published()["tables"]:
    for above, below in table["contrasts"]:
      for size in ("qwen3-8b", "qwen3-14b"):
        a, b = (next((row for row in table["rows"] if row["arm"] == arm
                      and row["teacher"] in (size, None)), None) for arm in (above, below))
        if a and b and table["title"] != "The bridge without one of its parts, MATH-500":
          counted.setdefault((above, below), []).extend(
              x[0] > y[0] for x, y in zip(a["scores"], b["scores"], strict=True))
  checked = {pair: sum(signs) for pair, signs in counted.items() if len(signs) == 6}
  stored = {pair: count for pair, count in report.PUBLISHED.items() if pair in checked}
  assert len(stored) >= 13 and {pair: checked[pair] for pair in stored} == stored


def test_a_run_fills_its_cells_and_the_others_are_missing(tmp_path):
  for at, (arm, share) in enumerate({"bridge": 0.8, "cold_grpo": 0.7}.items()):
    for benchmark in PROBLEMS:
      scored(tmp_path, arm, benchmark, share, at=at)
  lines = paper.section(ladder.read([tmp_path]))
  found = rows(lines, "Transfer only")
  assert found["RL'd 8B, bridge"] == ["79.3 ± 0.7", "80.0 [79.0, 81.0]", "25.2 ± 1.6",
                                      "80.0 [79.0, 81.0]", "20.2 ± 1.3", "80.0 [79.0, 81.0]"]
  assert found["direct GRPO"][1::2] == ["70.0 [69.0, 71.0]"] * 3
  assert found["RL'd 14B, bridge"][1::2] == ["missing"] * 3
  assert found["RL'd 8B, OPD only"][1::2] == ["missing"] * 3
  assert rows(lines, "Direct GRPO")["Qwen3-1.7B"][1] == "70.0 [69.0, 71.0]"
  assert rows(lines, "Direct GRPO")["Qwen3-4B, v1 only"][1] == "missing"
  assert rows(lines, "Llama")["direct GRPO"][1] == "missing"
  pairs = differences(lines, "Transfer only")
  printed, here, verdict = pairs["`bridge` − `cold_grpo`", "qwen3-8b", "MATH-500"]
  # The first 80 % of the problems are right in one and the first 70 % in the other.
  assert (printed, verdict) == ("+3.4", "above in this seed") and here.startswith("10.0 [")
  assert pairs["`bridge` − `cold_grpo`", "qwen3-14b", "MATH-500"] == ("+2.7", "missing", "missing")
  assert pairs["`opd_only` − `sft_only`", "qwen3-8b", "AIME 2025"] == ("-0.5", "missing", "missing")


@pytest.mark.parametrize("difference, printed, seeds, said", [
    ((0.02, 0.01, 0.03), 3.4, (0, 1), "agrees"), ((-0.02, -0.03, -0.01), 3.4, (0, 1), "disagrees"),
    ((-0.02, -0.03, -0.01), -0.5, (0, 1), "agrees"),
    ((0.0, -0.01, 0.01), 3.4, (0, 1), "not resolved"),
    ((0.02, 0.01, 0.03), 0.0, (0, 1), "above; the paper has no order"),
    ((-0.02, -0.03, -0.01), 3.4, (0,), "below in this seed")])
def test_a_verdict(difference, printed, seeds, said):
  contrast = ladder.Contrast(intervals.Interval(*difference), 0.01, "", seeds)
  assert paper.verdict(contrast, printed) == said
  assert paper.verdict(None, printed) == "missing"


def test_another_model_another_label_share_or_part_of_a_set_does_not_pass_for_the_papers(tmp_path):
  scored(tmp_path, "bridge", "math500", 0.5, at=0, teacher="Qwen3-4B")
  scored(tmp_path, "bridge", "aime24", 0.5, at=1, label_share=0.5)
  assert paper.section(ladder.read([tmp_path])) == []
  scored(tmp_path, "bridge", "aime25", 0.5, at=2, problems=10, teacher="qwen3-14b")
  lines = paper.section(ladder.read([tmp_path]))
  found = rows(lines, "Transfer only")["RL'd 14B, bridge"]
  assert found[1::2] == ["missing", "missing", "50.0 [49.0, 51.0] †"]


def test_unlike_scores_are_not_in_one_table(tmp_path):
  scored(tmp_path, "bridge", "math500", 0.5)
  scored(tmp_path, "bridge", "aime24", 0.5, samples=4, at=1)
  lines = paper.section(ladder.read([tmp_path]))
  assert lines.count("## The paper's tables") == 2
  first = rows(lines, "Transfer only")["RL'd 8B, bridge"]
  assert first[1::2] == ["50.0 [49.0, 51.0]", "missing", "missing"]


def test_other_benchmarks_have_no_such_section(tmp_path):
  by_hand.arm(tmp_path, "bridge", [("bridge", [], by_hand.score(tmp_path, "eval", by_hand.RIGHT))])
  found = ladder.read([tmp_path])
  assert paper.section(found) == [] and "The paper's tables" not in report.markdown(found)
  scored(tmp_path, "cold_grpo", "aime24", 0.5, at=1)
  assert "## The paper's tables" in report.markdown(ladder.read([tmp_path]))


def test_intervals_of_several_seeds_have_verdicts(tmp_path):
  rng = np.random.default_rng(0)
  for seed in range(3):
    scored(tmp_path, "bridge", "math500", 0.8 + 0.01 * rng.random(), seed=seed, at=seed)
    scored(tmp_path, "cold_grpo", "math500", 0.6 + 0.01 * rng.random(), seed=seed, at=3 + seed)
  pairs = differences(paper.section(ladder.read([tmp_path])), "Transfer only")
  assert pairs["`bridge` − `cold_grpo`", "qwen3-8b", "MATH-500"][2] == "agrees"


def test_the_settings_are_those_of_the_config():
  found = qwen3_math.get_config("all_arms,sft_teacher")
  assert found.data.labelled == paper._LABELLED
  assert {name: found.stages[name].steps for name in paper._STEPS} == paper._STEPS
  for name in paper._STEPS:
    for key, value in paper._STAGE.items():
      inner = found.stages[name]
      for word in key.split("."):
        inner = inner[word]
      assert inner == value, key
  for name in PROBLEMS:
    sampling = found.evals[name].sampling
    assert {key: sampling[key] for key in DECODING} == DECODING == paper._DECODING


def notes(lines, title):
  """The lines between the first and the second table below a heading."""
  start = next(i for i, line in enumerate(lines) if line.startswith(f"### {title}"))
  found = []
  for line in lines[start + 1:]:
    if line.startswith(("### ", "| difference")):
      break
    if line.startswith("- "):
      found.append(line)
  return found


@pytest.mark.parametrize("change, said", [
    ({"data__labelled": "gsm8k_train"}, "`data.labelled=gsm8k_train`, not `dapo_math_17k`"),
    ({"template": {"enable_thinking": True}},
     "`template.enable_thinking=True`, not `False`"),
    ({"template": {}}, "`template.enable_thinking=not set`, not `False`"),
    ({"stages__student_grpo__lora__rank": 32}, "`stages.student_grpo.lora.rank=32`, not `0`"),
    ({"stages__student_grpo__steps": 100}, "`stages.student_grpo.steps=100`, not `2710`"),
    ({"stages__student_grpo__prompts": 16}, "`stages.student_grpo.prompts=16`, not `64`"),
    ({"stages__student_grpo__optim__lr": 1e-5}, "`stages.student_grpo.optim.lr=1e-05`, not `1e-"),
    ({"stages__student_grpo__sampling__max_tokens": 4096},
     "`stages.student_grpo.sampling.max_tokens=4096`, not `16384`"),
    ({"stages__student_grpo__sampling__temperature": 0.6},
     "`stages.student_grpo.sampling.temperature=0.6`, not `1.0`"),
    ({"data__leave_out": "labelled:1"}, "`data.leave_out=labelled:1`, not `not set`"),
    ({"student_layers": 4}, "`student_layers=4`, not `0`"),
    ({"decoding": DECODING | {"max_tokens": 1024}}, "`scored with max_tokens=1024`, not `16384`"),
    ({"decoding": {"max_tokens": 16384}}, "`scored with temperature=1.0`, not `0.7`"),
    ({"samples": 4}, "`scored with samples=4`, not `16`"),
    ({"problems": 10}, "`scored with problems=10`, not `500`")])
def test_an_unlike_setting_is_marked_and_named(tmp_path, change, said):
  scored(tmp_path, "cold_grpo", "math500", 0.5, **change)
  lines = paper.section(ladder.read([tmp_path]))
  assert rows(lines, "Transfer only")["direct GRPO"][1] == "50.0 [49.0, 51.0] †"
  found = notes(lines, "Transfer only")
  assert f"- † {said}" in "\n".join(found)
  assert all(line.endswith(": direct GRPO (MATH-500)") for line in found)


@pytest.mark.parametrize("change", [
    {}, {"stages__sft__steps": 3}, {"stages__teacher_sft__lora__rank": 8},  # of no stage of the arm
    {"data__labelled": "dapo_math_17k:/sets/dapo.parquet"}, {"data__math500": "math500:/x.jsonl"},
    {"stages__student_grpo__sampling__temperature": 1}, {"seed": 3}])
def test_the_papers_settings_have_no_mark(tmp_path, change):
  scored(tmp_path, "cold_grpo", "math500", 0.5, **change)
  lines = paper.section(ladder.read([tmp_path]))
  assert rows(lines, "Transfer only")["direct GRPO"][1] == "50.0 [49.0, 51.0]"
  assert notes(lines, "Transfer only") == []


def test_a_half_may_make_the_printed_passes_over_its_half(tmp_path):
  scored(tmp_path, "half_bridge_grpo_2h", "math500", 0.5, stages__student_grpo__steps=1355)
  scored(tmp_path, "cold_grpo", "math500", 0.5, at=1, stages__student_grpo__steps=1355)
  lines = paper.section(ladder.read([tmp_path]))
  title = "Transfer on 1H, then GRPO on 2H"
  assert rows(lines, title)["RL'd 8B, two-stage bridge"][1] == "50.0 [49.0, 51.0]"
  assert rows(lines, "Transfer only")["direct GRPO"][1] == "50.0 [49.0, 51.0] †"


@pytest.mark.parametrize("steps, verdict", [((2710, 100), "above in this seed"),
                                            ((100, 2710), "above in this seed"),
                                            ((50, 100), "several runs")])
def test_every_run_of_a_cell_is_shown_with_the_keys_that_differ(tmp_path, steps, verdict):
  for at, (count, share) in enumerate(zip(steps, (0.8, 0.6), strict=True)):
    scored(tmp_path, "bridge", "math500", share, at=at, stages__student_grpo__steps=count)
  scored(tmp_path, "cold_grpo", "math500", 0.5, at=2)
  lines = paper.section(ladder.read([tmp_path]))
  marks = ["" if count == 2710 else " †" for count in steps]
  assert rows(lines, "Transfer only")["RL'd 8B, bridge"][1] == (
      f"80.0 [79.0, 81.0]{marks[0]} (1); 60.0 [59.0, 61.0]{marks[1]} (2)")
  found = notes(lines, "Transfer only")
  assert found[-1] == (
      "- RL'd 8B, bridge (MATH-500) has 2 runs that differ: (1) `stages.student_grpo.steps="
      f"{steps[0]}`; (2) `stages.student_grpo.steps={steps[1]}`")
  assert len(found) == 1 + sum(count != 2710 for count in steps)
  pairs = differences(lines, "Transfer only")
  assert pairs["`bridge` − `cold_grpo`", "qwen3-8b", "MATH-500"][2] == verdict


def test_runs_that_differ_in_a_setting_without_a_mark_are_named(tmp_path):
  scored(tmp_path, "cold_grpo", "aime24", 0.5, stages__student_grpo__kl_coef=0.5)
  scored(tmp_path, "cold_grpo", "aime24", 0.6, at=1)
  found = notes(paper.section(ladder.read([tmp_path])), "Transfer only")
  assert found == ["- direct GRPO (AIME 2024) has 2 runs that differ: (1) `stages.student_grpo."
                   "kl_coef=0.5`; (2) `stages.student_grpo.kl_coef=0.0005`"]


def test_a_difference_of_marked_cells_is_marked(tmp_path):
  scored(tmp_path, "bridge", "math500", 0.8, stages__student_grpo__steps=100)
  scored(tmp_path, "cold_grpo", "math500", 0.6, at=1)
  _, here, verdict = differences(paper.section(ladder.read([tmp_path])), "Transfer only")[
      "`bridge` − `cold_grpo`", "qwen3-8b", "MATH-500"]
  assert here.endswith("] †") and verdict == "above in this seed"
