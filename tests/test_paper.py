"""The paper's tables: every number is as it was printed, and runs fill their own cells."""

import numpy as np
import pytest

from s2d_jax import files, ladder, paper, report, stats
from tests import test_report as by_hand

PROBLEMS = {"math500": 500, "aime24": 30, "aime25": 30}


def config(student="Qwen3-1.7B", teacher="Qwen3-8B", **changes):
  return {"student": f"/models/{student}", "teacher": f"/models/{teacher}", "label_share": 1.0,
          **changes}


def scored(folder, arm, benchmark, share, seed=0, at=0, samples=16, problems=None, **models):
  """A finished arm whose samples are right for this share of the problems."""
  count = problems or PROBLEMS[benchmark]
  correct = [[int(p < share * count)] * samples for p in range(count)]
  name = by_hand.score(folder, f"eval-{arm}-{benchmark}-{seed}-{at}", correct, split=benchmark,
                       problems=benchmark, seed=seed)
  result = files.read_json(folder / name / "result.json")
  result["scores"] = {f"avg@{samples}": [share, share - 0.01, share + 0.01]}
  files.write_json(folder / name / "result.json", result)
  trained = by_hand.stage(folder, f"student_grpo-{arm}-{seed}-{at}", [1], inputs={
      "seed": seed, "row": by_hand.stage_row(f"student_grpo-{arm}", "student")})
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
  contrast = ladder.Contrast(stats.Interval(*difference), 0.01, "", seeds)
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
