"""The ladder from run folders written by hand: its numbers, its verdicts, what it will not mix."""

import json
import os
import pathlib
import re
import struct

import numpy as np
import pytest

from s2d_jax import command, figures, files, ladder, report, stats

REVISION = "0123456789abcdef" * 2 + "01234567"
COUNTS = {"updates": 0, "label_uses": 0, "tokens_sampled": 0, "tokens_reused": 0,
          "tokens_trained": 0, "tokens_guide": 0, "flops": 0.0, "flops_reused": 0.0,
          "device_seconds_used": 0.0, "device_seconds_lost": 0.0}


def stage_row(name, role):
  """The row of a stage that samples the model it trains."""
  return {"name": name, "actor": role, "learner": role, "guide": None}


def stage(run, name, labels=(), revision=REVISION, metrics=(), inputs=None, **counts):
  files.write_json(run / name / "ledger.json",
                        {**COUNTS, "labels": list(labels), "label_uses": len(labels), **counts})
  role = "teacher" if name.startswith("teacher") else "student"
  config = {"advantages": "group"} if "grpo" in name else {}
  inputs = {"row": stage_row(name, role), "config": config, "seed": 0, "parents": {}} | (
      inputs or {})
  files.write_json(run / name / "manifest.json", {"inputs": inputs, "revision": revision})
  if metrics:
    lines = "".join(f"{row}\n".replace("'", '"') for row in metrics)
    files.write(run / name / "metrics" / "00000000.jsonl", lines)
  return name


def score(run, name, correct, revision=REVISION, problems="f00dfeed", split="test", seed=0):
  """An evaluation's folder: the scores are what stands here, the matrix is `correct`."""
  samples = len(correct[0])
  scores = {"greedy": [0.25, 0.2, 0.3], f"avg@{samples}": [0.5, 0.4, 0.625],
            f"pass@{samples}": [0.75, 0.7, 0.8], "pass@1": [0.5, 0.4, 0.6],
            "response_length": [12.345, 11.0, 13.0]}
  files.write_json(run / name / "result.json", {"scores": scores, "samples": {
      "sampled": {"correct_PG": correct, "length_PG": correct},
      "greedy": {"correct_PG": [row[:1] for row in correct]}}})
  evaluation = {"split": split, "level": 0.95,
                "sampling": {"samples_per_prompt": samples, "temperature": 1.0}}
  files.write_json(run / name / "manifest.json", {
      "inputs": {"weights": name, "seed": seed, "evaluation": evaluation, "dtype": "float32",
                 "tokenizer": "t", "problems": problems}, "revision": revision})
  return name


def arm(run, name, rows, seed=0, at=0, config=None, probes=()):
  """rows: (label, folders of its stages, its score's folder); `at` orders the arms."""
  path = run / "arms" / f"{name}-{seed}-{at}.json"
  files.write_json(path, {
      "arm": name, "seed": seed, "config": config or {"a": 1}, "probes": list(probes), "rows": [
          {"label": label, "stages": stages, "score": name} for label, stages, name in rows]})
  os.utime(path, (at, at))


RIGHT = [[1, 1], [1, 1], [0, 1]]
WRONG = [[0, 0], [0, 0], [0, 1]]


@pytest.fixture
def finished(tmp_path):
  """A run of two arms, the later name first in time, that share a stage and two labels."""
  teacher = stage(tmp_path, "teacher_grpo-1", [3, 5, 9], label_uses=7, tokens_sampled=1000,
                  tokens_trained=2000, flops=2.5e12, device_seconds_used=10.4,
                  device_seconds_lost=0.6, metrics=[{"step": 0, "reward": 0.25, "loss": 1},
                                                    {"step": 1, "reward": 0.5, "loss": 2}])
  bridge = stage(tmp_path, "reverse_kl-1", tokens_sampled=34, tokens_reused=200, tokens_guide=56,
                 flops_reused=0.5e12, device_seconds_used=1.0, metrics=[{"step": 0, "kl": 0.125},
                                                   {"step": 1, "kl": "nan"}])
  cold = stage(tmp_path, "student_grpo-1", [5, 9, 11], flops=7e12)
  arm(tmp_path, "untrained", [("untrained student", [], score(tmp_path, "eval-0", WRONG))], at=1)
  arm(tmp_path, "cold_grpo", [("cold_grpo", [cold], score(tmp_path, "eval-1", WRONG))], at=3)
  arm(tmp_path, "bridge", [("bridge", [teacher, bridge], score(tmp_path, "eval-2", RIGHT))], at=2)
  arm(tmp_path, "half", [("both", [teacher, cold], score(tmp_path, "eval-3", RIGHT))], at=4)
  return tmp_path


def table(text):
  """The cells of every line of a table, split where Markdown splits them."""
  lines = [line for line in text.splitlines() if line.startswith("|") and "|---" not in line]
  return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_by_hand(finished):
  head, *rows = table(report.markdown(ladder.read([finished])))
  assert head == ["arm", "seeds", "greedy", "avg@2", "pass@1", "pass@2", "response tokens",
                  "labels: distinct", "uses", "tokens sampled", "trained", "by the guide",
                  "TFLOPs", "device-s", "lost"]
  scores = ["25.0 [20.0, 30.0]", "50.0 [40.0, 62.5]", "50.0 [40.0, 60.0]", "75.0 [70.0, 80.0]",
            "12.3 [11.0, 13.0]"]
  assert rows[0] == ["untrained student", "0", *scores, *"00000", "0.0", "0", "0"]
  assert rows[1] == ["bridge", "0", *scores, "3", "7", "1,234", "2,000", "56", "3.0", "11",
                     "1"]  # with the tokens and FLOPs that another arm's stage had spent
  assert rows[2] == ["cold_grpo", "0", *scores, "3", "3", *"000", "7.0", "0", "0"]
  # Labels 3 5 9 and 5 9 11: six spent, or ten uses, of four distinct ones.
  assert rows[3][7:9] == ["4", "10"]


def test_the_words_around_the_table(finished):
  text = report.markdown(ladder.read([finished]))
  assert "Split test, 3 problems (f00dfeed), 2 samples each at temperature 1.0 in float32" in text
  assert "Code: 0123456789ab.\n" in text and "mixes" not in text


def verdicts(run):
  """{difference: (points, verdict)} of the second table."""
  return {row[0]: (row[4], row[6]) for row in table(report.markdown(ladder.read([run])))
          if " − " in row[0]}


def test_a_score_without_the_samples_it_needs_is_a_dash(tmp_path):
  # As after a statistic of a new field: the older run has no score of it, and none can be computed.
  new = score(tmp_path, "new", [[1, 0], [1, 1]])
  old = score(tmp_path, "old", [[1, 0], [0, 0]])
  path = tmp_path / new / "result.json"
  result = json.loads(path.read_text())
  result["scores"]["truncated"] = [0.25, 0.1, 0.4]
  result["samples"]["sampled"]["truncated_PG"] = [[1, 0], [0, 0]]
  path.write_text(json.dumps(result))
  for name in (new, old):
    arm(tmp_path, name, [(name, [], name)])
  head, _, *lines = report.table(ladder.groups(ladder.read([tmp_path])))
  column = head.split(" | ").index("truncated")
  cells = {line.split(" | ")[0]: line.split(" | ")[column] for line in lines}
  assert cells == {"| new": "25.0 [10.0, 40.0]", "| old": "–"}


def test_paired_differences_have_a_sign(tmp_path):
  # Over 40 problems: bridge right on all, cold GRPO on none; raw bridge and half the bridge
  # on the same half of them, so that their difference is not resolved.
  half = np.tile([[1, 0]], (40, 1)).tolist()
  for name, correct in (("bridge", [[0, 0]] * 40), ("cold_grpo", [[1, 1]] * 40),
                        ("raw_bridge", half), ("half_bridge_grpo_2h", half)):
    arm(tmp_path, name, [(name, [], score(tmp_path, f"eval-{name}", correct))])
  found = verdicts(tmp_path)
  assert found["bridge − cold_grpo"] == ("−100.0 [−100.0, −82.4]", "below in this seed (6/6)")
  points, verdict = found["cold_grpo − raw_bridge"]
  assert verdict == "above in this seed (6/6)" and points.startswith("50.0 [")
  assert found["half_bridge_grpo_2h − cold_grpo"][1] == "below in this seed (6/6)"
  other = np.repeat([[0, 0], [1, 1]], 20, axis=0).tolist()  # half of the answers, other problems
  arm(tmp_path, "cold_grpo", [("cold_grpo", [], score(tmp_path, "eval-cold_grpo", other))])
  points, verdict = verdicts(tmp_path)["cold_grpo − raw_bridge"]
  assert verdict == "not resolved in this seed (6/6)" and points.startswith("0.0 [−")
  assert len(found) == 5


def two_seeds(tmp_path, other):
  """bridge and cold_grpo in two work folders, one a seed; every stage is the seed's own."""
  for run, seed, right in ((tmp_path, 0, RIGHT), (other, 1, WRONG)):
    # The first seed's manifest has the row as earlier versions wrote it.
    fields = stage_row("student_grpo", "student")
    one = stage(run, f"student_grpo-{seed}", inputs={
        "row": fields if seed else list(fields.values()), "seed": seed})
    arm(run, "bridge", [("bridge", [one], score(run, "eval-a", right, seed=seed))], seed)
    arm(run, "cold_grpo", [("cold_grpo", [one], score(run, "eval-b", RIGHT, seed=seed))], seed)


def test_seeds_are_compared_with_themselves_and_pooled(tmp_path):
  other = tmp_path / "other"
  two_seeds(tmp_path, other)
  text = report.write([tmp_path, other])
  head, bridge, cold, _, difference = table(text)
  # RIGHT is 5 of 6 right, WRONG 1 of 6: bridge has both, cold_grpo RIGHT twice.
  assert (bridge[1], bridge[3].split()[0]) == ("0 1", "50.0")
  assert (cold[1], cold[3].split()[0]) == ("0 1", "83.3")
  assert difference[:4] == ["bridge − cold_grpo", "0 : 0", "0+0 : 0+0", "0 −"]
  assert difference[4].startswith("−33.3 [−100.0, ") and difference[6] == "not resolved (6/6)"
  assert text.count("| arm |") == 1
  assert (tmp_path / "report.md").read_text() == text and not (other / "report.md").exists()


def test_an_interval_over_seeds_is_wider_than_each(tmp_path):
  two_seeds(tmp_path, tmp_path / "other")
  groups = ladder.groups(ladder.read([tmp_path, tmp_path / "other"]))
  value_SP = np.array([[1, 1, 0.5], [0, 0, 0.5]])
  np.testing.assert_array_equal(groups[0].value_SP(), value_SP)
  np.testing.assert_array_equal(groups[0].value_SP("greedy"), [[1, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(groups[0].value_SP("pass@2"), [[1, 1, 1], [0, 0, 1]])
  # Seed means 5/6 and 1/6: Var/2 = 1/9 is all the variance, and t has one degree of freedom.
  half = 12.7062 * np.sqrt(1 / 9) / 0.25  # on the logit's scale, about logit(1/2) = 0
  np.testing.assert_allclose(groups[0].score("avg@2"),
                             [0.5, 1 / (1 + np.exp(half)), 1 / (1 + np.exp(-half))], rtol=1e-4)


def test_unlike_configs_have_rows_of_their_own_that_say_so(tmp_path):
  for at, share in enumerate((1.0, 0.25)):
    config = {"label_share": share, "stages": {"x": {"steps": 3}}}
    one = stage(tmp_path, f"student_grpo-{at}", range(at + 1), inputs={"split": share})
    for name, correct in (("bridge", RIGHT), ("cold_grpo", WRONG)):
      arm(tmp_path, name, [(name, [one], score(tmp_path, f"eval-{name}-{at}", correct))], at=at,
          config=config)
  text = report.markdown(ladder.read([tmp_path]))
  rows = table(text)
  names = [row[0] for row in rows[1:5]]
  assert sorted(names) == ["bridge", "bridge (label_share=0.25)", "cold_grpo",
                           "cold_grpo (label_share=0.25)"]
  # Like is compared with like: two contrasts and not four.
  assert [row[0] for row in rows if " − " in row[0]] == [
      "bridge − cold_grpo", "bridge (label_share=0.25) − cold_grpo (label_share=0.25)"]
  assert ["bridge", "25 %", "2", "83.3 [40.0, 62.5]".replace("83.3", "50.0"), "0"] in rows
  assert "### What labels buy" in text and "divided" not in text


def test_the_division_of_updates_is_a_curve_of_its_own(tmp_path):
  for at, (first, second) in enumerate(((0, 8), (2, 6), (8, 0), (3, 3))):
    config = {"stages": {"forward_kl": {"steps": first}, "reverse_kl": {"steps": second}}}
    one = stage(tmp_path, f"reverse_kl-{at}", inputs={"steps": [first, second]})
    arm(tmp_path, "bridge", [("bridge", [one], score(tmp_path, f"eval-{at}", RIGHT))], at=at,
        config=config)
  groups = ladder.groups(ladder.read([tmp_path]))
  found = ladder.curves(groups, ladder.SWEPT["division"])
  assert [x for x, _ in found["bridge"]] == [0, 0.25, 1]  # 3 + 3 is another number of updates
  assert "### How a bridge's updates are divided" in report.markdown(ladder.read([tmp_path]))


PROBE = {"forward_kl": 1.25, "reverse_kl": 2.5, "overlap": 0.5, "student_mass": 0.75,
         "teacher_mass": 0.625, "student_entropy": 1.0, "teacher_entropy": 0.125,
         "forward_kl_gradient_worst": 0.25, "reverse_kl_gradient_worst": 0.5,
         "response_length": 7.0, "pass_rate": 0.25, "mixed_groups": 0.375, "same_first": 0.875,
         "entropy": 0.75, "mixed_prompts": [0.25, 0.5, 0.75, 1.0]}


def probe(run, name, **change):
  files.write_json(run / name / "result.json",
                        {text: PROBE | change for text in ("student", "teacher")})
  files.write_json(run / name / "manifest.json", {"inputs": {}})
  return name


def test_the_conditions_by_hand(tmp_path):
  names = [stage(tmp_path, name) for name in ("teacher_grpo-1", "forward_kl-1", "reverse_kl-1")]
  probes = [{"stage": names[0], "before": probe(tmp_path, "probe-0"), "after": None},
            {"stage": names[1], "before": probe(tmp_path, "probe-1"),
             "after": probe(tmp_path, "probe-2", forward_kl=0.5)},
            {"stage": names[2], "before": "probe-2",
             "after": probe(tmp_path, "probe-3", forward_kl=0.25)}]
  arm(tmp_path, "bridge", [("bridge", names, score(tmp_path, "eval-0", RIGHT))], probes=probes)
  text = report.write([tmp_path])
  rows = [row for row in table(text) if len(row) == 16 and row[0] == "bridge" and row[3] != "50.0"]
  rows = [row for row in rows if row[3] in ("teacher's", "student's")]
  assert [row[1:5] for row in rows] == [
      [stage, when, f"{text}'s", kl] for stage, when, kl in (
          ("forward_kl", "before", "1.250"), ("forward_kl", "after", "0.500"),
          ("reverse_kl", "after", "0.250")) for text in ("teacher", "student")]
  assert rows[0][5:] == ["2.500", "0.500", "0.875", "0.750", "0.625", "1.000", "0.125", "0.25",
                         "0.50", "7.0", "0.250"]
  # Without the single answers and the stage's samples it is what the probe stored.
  assert ["bridge", "teacher_grpo", "–", "0.250", "0.625", "0.50", "0.750", "7.0"] in table(text)


# Of the four problems 0, 1, 2 and 4 of 4 samples are right.
CORRECT = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("group, mixed", [
    # Two of the four samples: 3 of 6 pairs are mixed where one is right, 4 of 6 where two are.
    (2, (3 / 6 + 4 / 6) / 4),
    # More samples than the probe has: 1 − p^8 − (1 − p)^8 of p = 1/4 and 1/2.
    (8, (1 - 0.25**8 - 0.75**8 + 1 - 2 * 0.5**8) / 4)])
def test_mixed_groups_are_those_of_the_stages_samples(group, mixed, tmp_path):
  name = stage(tmp_path, "student_grpo-1", inputs={
      "config": {"advantages": "group", "sampling": {"samples_per_prompt": group}}})
  probes = [{"stage": name, "before": probe(tmp_path, "probe-0", correct=CORRECT), "after": None}]
  arm(tmp_path, "cold_grpo", [("cold_grpo", [name], score(tmp_path, "eval-0", RIGHT))],
      probes=probes)
  text = report.markdown(ladder.read([tmp_path]))
  (row,) = [row for row in table(text) if row[:2] == ["cold_grpo", "student_grpo"]]
  assert row[2:6] == [str(group), "0.250", f"{mixed:.3f}", "0.25" if group == 2 else "0.50"]
  assert f"- cold_grpo: student_grpo began with {100 * mixed:.0f} % mixed groups" in text


def test_the_table_of_samples_by_hand(tmp_path):
  one = stage(tmp_path, "reverse_kl-1")
  samples = {"repetition": 0.125, "teacher_rank": 2.0, "teacher_rank_in_top_k": 0.75,
             "delta_logp_repeated": -0.25, "delta_logp_other": -0.5}
  ends = {"problems": 8, "guide": 0.75, "after_prefix": 0.25,
          "drop": [1, 1, 1, 1, 1, -1, 0, 0], "right_to_wrong": 5, "wrong_to_right": 1,
          "guide_well_formed": 1.0, "after_prefix_well_formed": 0.5}
  def write(run, name, prefixes, **change):
    found = {text: PROBE | samples | change for text in ("student", "teacher")}
    del found["teacher"]["delta_logp_repeated"]  # no token of it was repeated
    files.write_json(run / name / "result.json",
                     found | ({"prefixes": prefixes} if prefixes else {}))
    files.write_json(run / name / "manifest.json", {"inputs": {}})
    return name
  probes = [{"stage": one, "before": write(tmp_path, "probe-0", ends),
             "after": write(tmp_path, "probe-1", None, teacher_rank=1.0)}]
  name = score(tmp_path, "eval-0", RIGHT)
  arm(tmp_path, "opd_only", [("opd_only", [one], name)], probes=probes)
  text = report.markdown(ladder.read([tmp_path]))
  part = text.partition("### What the samples are like")[2].partition("\n###")[0]
  head, *rows = table(part)
  assert len(head) == 4 + 5 + 8 and "*Readable* is the share" in part
  none = ["–"] * 8
  # The mean of eight drops has a standard error of 0.75 / √8 = 0.27, and ends at multiples of 1/8.
  drop = rows[1][11]
  low, high = (float(x.replace("−", "-"))
               for x in re.fullmatch(r"50\.0 \[(.*), (.*)\]", drop).groups())
  assert low in (-12.5, 0) and high in (87.5, 100)
  assert rows == [
      ["opd_only", "reverse_kl", "before", "teacher's", "0.125", "2.0", "0.750", "–", "−0.500",
       *none],
      ["opd_only", "reverse_kl", "before", "student's", "0.125", "2.0", "0.750", "−0.250", "−0.500",
       "0.750", "0.250", drop, "5.0", "1.0", "8", "1.000", "0.500"],
      ["opd_only", "reverse_kl", "after", "teacher's", "0.125", "1.0", "0.750", "–", "−0.500",
       *none],
      ["opd_only", "reverse_kl", "after", "student's", "0.125", "1.0", "0.750", "−0.250", "−0.500",
       *none]]
  # Without a prefix probe its columns and its sentences are gone.
  write(tmp_path, "probe-0", None)
  text = report.markdown(ladder.read([tmp_path]))
  part = text.partition("### What the samples are like")[2].partition("\n###")[0]
  assert len(table(part)[0]) == 4 + 5 and "Readable" not in part


def test_a_teacher_that_did_not_improve_is_warned_of(tmp_path):
  arm(tmp_path, "untrained", [
      ("untrained teacher", [], score(tmp_path, "eval-0", RIGHT)),
      ("teacher after teacher_grpo (all)", [stage(tmp_path, "teacher_grpo-1")],
       score(tmp_path, "eval-1", WRONG))])
  text = report.markdown(ladder.read([tmp_path]))
  assert "- teacher after teacher_grpo (all): the teacher did not improve (−66.7 [" in text


def test_a_contrast_shows_both_arms_spending_on_their_shared_seeds(tmp_path):
  # A bridge of 3 + 4 updates on two seeds; cold GRPO of 5 updates on the second alone.
  for seed in (0, 1):
    stages = [stage(tmp_path, f"{name}-{seed}", range(seed + 2) if name == "teacher_grpo" else (),
                    updates=updates, inputs={
                        "seed": seed, "row": stage_row(name, role)})
              for name, role, updates in (("teacher_grpo", "teacher", 9),
                                         ("forward_kl", "student", 3),
                                         ("reverse_kl", "student", 4))]
    arm(tmp_path, "bridge", [("bridge", stages, score(tmp_path, f"eval-{seed}", RIGHT, seed=seed))],
        seed)
  cold = stage(tmp_path, "student_grpo-1", [7], updates=5, inputs={"seed": 1})
  arm(tmp_path, "cold_grpo", [("cold_grpo", [cold], score(tmp_path, "eval-2", WRONG, seed=1))], 1)
  (row,) = [row for row in table(report.markdown(ladder.read([tmp_path]))) if " − " in row[0]]
  assert row[:4] == ["bridge − cold_grpo", "3 : 1", "7+0 : 0+5", "+"]
  assert row[5] == "–" and row[6].endswith("in this seed (6/6)")


def test_an_arm_without_a_teacher_is_not_warned_of_one(tmp_path):
  one = stage(tmp_path, "self_distillation-1", inputs={
      "row": {"name": "self_distillation", "actor": "student", "learner": "student",
              "guide": "reference"}})
  probes = [{"stage": one, "before": probe(tmp_path, "probe-0"),
             "after": probe(tmp_path, "probe-1")}]
  arm(tmp_path, "self_distilled",
      [("self_distilled", [one], score(tmp_path, "eval-0", RIGHT))], probes=probes)
  assert "### Warnings" not in report.markdown(ladder.read([tmp_path]))


def test_the_page_of_runs_explains_every_column():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "run.md").read_text()
  section = page.partition("\n## The report\n")[2].partition("\n## ")[0]
  # Of the scores' names the k is left out.
  explained = set(re.findall(r"^\| ([^|]+) \|", section, re.M))
  head = report.table([])[0]
  labels = {entry.label or name for name, entry in stats.STATISTICS.items()}
  fixed = {cell.strip() for cell in head.split("|")[1:-1]}
  assert fixed | labels <= explained


@pytest.mark.parametrize("shaped", [True, False])
def test_an_untouched_teacher_is_warned_of(shaped, tmp_path):
  names = [*["teacher_grpo-1"] * shaped, "forward_kl-1"]
  taught = {"name": "forward_kl", "actor": "teacher", "learner": "student", "guide": "teacher"}
  stages = [stage(tmp_path, name, inputs={"row": taught} if name == "forward_kl-1" else None)
            for name in names]
  probes = [{"stage": names[-1], "before": probe(tmp_path, "probe-0"),
             "after": probe(tmp_path, "probe-1")}]
  arm(tmp_path, "x", [("x", stages, score(tmp_path, "eval-0", RIGHT))], probes=probes)
  text = report.markdown(ladder.read([tmp_path]))
  assert ("- x: its teacher is the untouched one" in text) == (not shaped)


def test_weights_that_leave_most_sequences_out_are_warned_of(tmp_path):
  one = stage(tmp_path, "weighted_fkl-1", metrics=[{"step": 0, "weighted": 0.25},
                                                   {"step": 1, "weighted": 0.125}])
  arm(tmp_path, "weighted_fkl", [("weighted_fkl", [one], score(tmp_path, "eval-0", RIGHT))])
  text = report.markdown(ladder.read([tmp_path]))
  assert "- weighted_fkl, seed 0: weighted_fkl gave 19 % of its sequences any weight" in text


def test_a_curves_points_have_the_seeds_that_all_of_them_have(tmp_path):
  for seed, share in ((0, 0.25), (0, 1.0), (1, 1.0)):
    one = stage(tmp_path, f"student_grpo-{seed}-{share}", inputs={
        "row": stage_row("student_grpo", "student"), "split": share, "seed": seed})
    arm(tmp_path, "bridge", [("bridge", [one], score(
        tmp_path, f"eval-{seed}-{share}", (RIGHT, WRONG)[seed], seed=seed))], seed, share,
        config={"label_share": share})
  groups = ladder.groups(ladder.read([tmp_path]))
  assert [group.seeds for group in groups] == ["0", "0 1"]
  points = ladder.curves(groups, ladder.SWEPT["labels"])["bridge"]
  assert [(x, group.seeds) for x, group in points] == [(0.25, "0"), (1.0, "0")]


def test_probes_that_one_run_left_out_are_found_in_another(tmp_path):
  one = stage(tmp_path, "student_grpo-1")
  probes = [{"stage": one, "before": probe(tmp_path, "probe-0"), "after": None}]
  name = score(tmp_path, "eval-0", RIGHT)
  for at, found in enumerate(([], probes)):
    arm(tmp_path, "cold_grpo", [("cold_grpo", [one], name)], at=at, probes=found)
  (group,) = ladder.groups(ladder.read([tmp_path]))
  assert len(group.probes()) == 1


def test_the_seconds_of_each_stage_by_hand(finished):
  text = report.markdown(ladder.read([finished]))
  assert "Where the seconds went" not in text  # stages of an earlier version
  phases = {"draw": 3.0, "reward": 1.0, "score": 0.5, "update": 4.0, "host": 0.5, "evaluate": 2.0,
            "save": 1.0}
  entries = [{"step": 0, "seconds": 8.0, "programs_compiled": 2, "compile_seconds": 6.25,
              "compile_seconds_saved": 0.5},
             {"step": 0, "seconds": 12.0, **{f"{name}_seconds": x for name, x in phases.items()}}]
  for name in ("teacher_grpo-1", "student_grpo-1"):
    folder = finished / name
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    files.write(folder / "timing" / "00000000.jsonl", lines)
    written = files.read_json(folder / "manifest.json")
    device = "TPU v5 lite" if name.startswith("teacher") else "cpu"
    files.write_json(folder / "manifest.json", written | {
        "device": device, "mesh": {"data": 1, "fsdp": 2, "tensor": 1}})
  text = report.markdown(ladder.read([finished]))
  head, *rows = [row for row in table(text) if row[1] in ("stage", "teacher_grpo", "student_grpo")]
  assert head == ["arm", "stage", "start", "compile", "saved", "draw", "reward", "score", "update",
                  "host", "evaluate", "save", "move", "lost", "goodput", "MFU"]
  # No entry has moves, as those of an earlier version.
  seconds = ["8.0", "6.2", "0.5", "3.0", "1.0", "0.5", "4.0", "0.5", "2.0", "1.0", "0.0"]
  # A mean of saved seconds may be just below zero, and has no sign then.
  entries[0]["compile_seconds_saved"] = -0.04
  lines = "".join(json.dumps(entry) + "\n" for entry in entries)
  files.write(finished / "student_grpo-1" / "timing" / "00000000.jsonl", lines)
  assert table(report.markdown(ladder.read([finished])))[-1][4] == "0.0"
  # 9 of 20.3 seconds, 0.6 device-seconds lost on two devices; 2.5 TFLOPs of 2 x 197 x 9.
  assert rows == [["bridge", "teacher_grpo", *seconds, "0.3", "44 %", "0.1 %"],
                  ["cold_grpo", "student_grpo", *seconds, "0.0", "45 %", "–"]]


def test_the_report_ends_with_the_choice_of_hyperparameters(tmp_path):
  arm(tmp_path, "mine", [("mine", [], score(tmp_path, "eval-0", RIGHT))])
  assert "chosen" not in report.write([tmp_path])
  (tmp_path / "choice.md").write_text("| row | rate |\n")
  assert report.write([tmp_path]).endswith("were chosen\n\n| row | rate |\n")


def test_without_contrasts_it_says_so(tmp_path):
  arm(tmp_path, "mine", [("mine", [], score(tmp_path, "eval-0", RIGHT))])
  text = report.markdown(ladder.read([tmp_path]))
  assert "No two arms of the paper's contrasts are here." in text


def test_mixed_revisions_are_flagged(tmp_path):
  one = stage(tmp_path, "a-1")
  arm(tmp_path, "x", [("x", [one], score(tmp_path, "eval-0", RIGHT, revision=REVISION + "+"))])
  text = report.markdown(ladder.read([tmp_path]))
  assert "Code: 0123456789ab, 0123456789ab+. **This table mixes revisions.**" in text


def test_a_further_benchmark_sets_no_arm_apart(tmp_path):
  # cold_grpo was run, then a benchmark was added to the config, then bridge was run.
  first = {"a": 1, "evals": {"test": {"split": "test"}}}
  second = {"a": 1, "evals": first["evals"] | {"aime24": {"split": "aime24"}}}
  one = stage(tmp_path, "student_grpo-1")
  arm(tmp_path, "cold_grpo", [("cold_grpo", [one], score(tmp_path, "eval-0", WRONG))], at=1,
      config=first)
  arm(tmp_path, "bridge", [
      ("bridge", [one], score(tmp_path, "eval-1", RIGHT)),
      ("bridge", [one], score(tmp_path, "eval-2", WRONG, split="aime24"))], at=2, config=second)
  text = report.markdown(ladder.read([tmp_path]))
  assert [r[0] for r in table(text)] == ["arm", "cold_grpo", "bridge", "difference",
                                         "bridge − cold_grpo", "arm", "bridge"]
  assert [word for word in re.findall(r"Split (\w+),", text)] == ["test", "aime24"]


@pytest.mark.parametrize("unlike", [{"split": "aime24"}, {"problems": "deadbeef"},
                                    {"correct": [[1, 1, 0]] * 3}])
def test_unlike_scores_have_tables_of_their_own(unlike, tmp_path):
  arm(tmp_path, "bridge", [("bridge", [], score(tmp_path, "eval-0", RIGHT))], at=1)
  arm(tmp_path, "cold_grpo", [("cold_grpo", [], score(
      tmp_path, "eval-1", **{"correct": RIGHT, "revision": "b" * 40} | unlike))], at=2)
  text = report.markdown(ladder.read([tmp_path]))
  rows = table(text)
  assert [row[0] for row in rows] == ["arm", "bridge", "arm", "cold_grpo"]
  assert " − " not in text and "mixes" not in text


def test_samples_cannot_inject_markdown(tmp_path):
  label = "a|b <img src=x>\n`c` [d](e) *f* $\\frac$ & \\"
  arm(tmp_path, "x", [(label, [], score(tmp_path, "eval-0", RIGHT, split="t`<b>"))])
  three = [[1, 1, 0]] * 3  # another avg@k, so another table, but the same figure
  arm(tmp_path, "y", [("y", [], score(tmp_path, "eval-1", three))], seed=1, at=1)
  text = report.write([tmp_path])
  head, row, *_ = table(text)
  assert len(head) == len(row)
  assert row[0] == r"a\|b \<img src=x\> \`c\` \[d\](e) \*f\* $\\frac$ \& \\"
  assert r"Split t\`\<b\>, 3" in text


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "arms").mkdir(),
                                  lambda path: files.write(path / "arms/.a.json.7", "{")])
def test_a_folder_without_arms_is_refused(make, tmp_path, capsys):
  make(tmp_path)
  sentence = f"{tmp_path} has no finished arm: run the recipe with --workdir={tmp_path}."
  with pytest.raises(ValueError) as error:
    ladder.read([tmp_path])
  assert str(error.value) == sentence
  with pytest.raises(SystemExit) as error:
    command.call(report.main, [str(tmp_path)])
  assert error.value.code == 2
  assert capsys.readouterr().err == f"s2d_jax: {sentence}\n"
  assert not (tmp_path / "report.md").exists()


def test_the_figure_by_hand(finished, monkeypatch):
  charts = []

  class KeptFigure(figures.Figure):
    def savefig(self, *args, **kwargs):
      charts.append(self)
      super().savefig(*args, **kwargs)

  monkeypatch.setattr(figures, "Figure", KeptFigure)
  report.write([finished])
  data = (finished / "report.png").read_bytes()
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  assert struct.unpack(">II", data[16:24]) == (2400, 540)  # one row: nothing was swept or probed
  bars, reward, kl, entropy = charts[0].axes
  assert [bar.get_width() for bar in bars.patches] == [50.0] * 4
  ends = bars.collections[0].get_segments()[0][:, 0]
  np.testing.assert_allclose(ends, [40.0, 62.5])
  assert [t.get_text() for t in bars.get_yticklabels()] == [
      "untrained student · seed 0", "bridge · seed 0", "cold_grpo · seed 0", "both · seed 0"]
  (line,) = reward.lines  # of the stage that two arms share, once
  np.testing.assert_allclose(line.get_xydata(), [[0, 0.25], [1, 0.5]])
  assert not entropy.lines
  (line,) = kl.lines  # and no surrogate's loss
  np.testing.assert_array_equal(line.get_ydata(), [0.125, np.nan])


def test_results_of_an_earlier_version_are_read():
  result = {"scores": {"avg@2": [0.75, 0.5, 1.0]}, "correct": [[1, 0], [1, 1]], "greedy": [1, 0]}
  run = ladder.Run("arm", "label", 0, result, [], {}, "", False, set(), [], {}, set())
  samples = run.samples()
  np.testing.assert_array_equal(samples["sampled"].correct_PG, [[1, 0], [1, 1]])
  np.testing.assert_array_equal(samples["greedy"].correct_PG, [[1], [0]])
  assert stats.value_P("avg@2", samples).tolist() == [0.5, 1.0]


def test_the_costs_of_searches_and_probes_by_hand(tmp_path):
  part = {"sequences": 50, "tokens_sampled": 400, "tokens_guide": 0, "flops": 2e9, "label_uses": 40}
  for seed, tokens in ((0, 400), (1, 600)):
    inputs = {"seed": seed, "row": stage_row("a", "student")}
    # Of 40 GFLOPs.
    one = stage(tmp_path, f"reverse_kl-{seed}", flops=30e9, flops_reused=10e9, inputs=inputs,
                foresee=part | {"tokens_sampled": tokens})
    # The teacher's responses were sampled by another stage.
    two = stage(tmp_path, f"forward_kl-{seed}", flops=10e9, inputs=inputs,
                allocate={"sequences": 0, "tokens_sampled": 0, "tokens_reused": 90, "flops": 5e8,
                          "flops_reused": 1e8})
    arm(tmp_path, "bridge", [("bridge", [two, one], score(tmp_path, f"eval-{seed}", RIGHT,
                                                           seed=seed))], seed=seed)
  text = report.markdown(ladder.read([tmp_path]))
  section = text.partition("### What searches and probes by family cost")[2].partition("\n###")[0]
  assert table(section)[1:] == [
      ["bridge", "forward_kl", "probes by family", "0", "90", "0.6", "6.0 %", "0"],
      ["bridge", "reverse_kl", "searches", "50", "500", "2.0", "5.0 %", "40"]]
  # Without such a stage there is no table.
  assert "probes by family cost" not in report.markdown(ladder.read([without(tmp_path)]))


def without(folder):
  """A work folder with one arm, whose stage has no option."""
  run = folder / "plain"
  arm(run, "bridge", [("bridge", [stage(run, "reverse_kl-2")], score(run, "eval-2", RIGHT))])
  return run
