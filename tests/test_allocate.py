"""Shares of families: counts and orders by hand, refusals, rules in a world of known transfer."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from s2d_jax import allocate, keys
from s2d_jax.errors import InputError
from s2d_jax.rollouts import Prompt

BLOCK = {"interval": 3, "rule": "transfer", "weights": "", "requirement": "", "kappa": 1.0,
         "beta": 0.5, "explore": 5, "problems": 8}
FAMILIES = ("a", "b", "c", "d")


def config(**changes):
  return ConfigDict({"steps": 60, "prompts": 4, "allocate": BLOCK | changes})


def test_shares_are_written_as_text():
  assert allocate.parse("left=0.25, right=0.75") == {"left": 0.25, "right": 0.75}
  for text in ("a=0.5", "a=0.5,b=0.6", "a=-0.5,b=1.5", "a", "a=x"):
    with pytest.raises(InputError, match="write families with shares that sum to one"):
      keys.check_value("weights", text, allocate.KEYS["weights"])


@pytest.mark.parametrize("shares, size, want", [
    ([0.2] * 5, 64, [13, 13, 13, 13, 12]),   # 12.8 each: four of equal remainders are raised
    ([0.25, 0.75], 4, [1, 3]), ([1.0, 0.0], 7, [7, 0]), ([0.5, 0.5], 3, [2, 1]),
    ([1 / 3, 1 / 3, 1 / 3], 1, [1, 0, 0]), ([0.1, 0.7, 0.2], 10, [1, 7, 2])])
def test_counts_have_the_size_as_their_sum(shares, size, want):
  assert allocate.counts(np.array(shares), size) == want


def test_a_family_is_drawn_whole_before_a_problem_repeats_also_when_shares_change():
  # Six problems of "odd", four of "even", and four a step.
  prompts = [Prompt(i, (i,)) for i in (1, 3, 5, 7, 9, 11, 0, 2, 4, 6)]
  family_of = lambda i: "odd" if i % 2 else "even"
  order = allocate.Order(prompts, family_of, seed=0, stage="sft", size=4)
  order.decisions = [{"step": 0, "shares": {"even": 0.25, "odd": 0.75}},
                     {"step": 4, "shares": {"even": 0.75, "odd": 0.25}},
                     {"step": 6, "shares": {"even": 0.5, "odd": 0.5}}]
  taken = {"even": [], "odd": []}
  for step in range(9):
    found = order(step, 0)
    counts = {"even": [1, 3, 2][(step >= 4) + (step >= 6)]}
    counts["odd"] = 4 - counts["even"]
    assert len({p.id for p in found}) == 4 and order(step, 0) == found
    for prompt in found:
      # Its samples are those of its own pass, whatever the other family's is.
      name = family_of(prompt.id)
      assert order.epoch(step, prompt) == sum(prompt.id == i for i in taken[name])
    for name, count in counts.items():
      new = [p.id for p in found if family_of(p.id) == name]
      assert len(new) == count
      taken[name] += new
  for name, size in (("even", 4), ("odd", 6)):
    times = [taken[name].count(i) for i in set(taken[name])]
    assert len(times) == size and max(times) - min(times) <= 1


def test_before_the_first_decision_shares_are_equal():
  order = allocate.Order([Prompt(i, (i,)) for i in range(8)], lambda i: "odd" if i % 2 else "even",
                         seed=0, stage="sft", size=4)
  assert sorted(p.id % 2 for p in order(0, 0)) == [0, 0, 1, 1]


def test_actions_are_single_families_pairs_and_all():
  action_AF = allocate.actions(3)
  assert len(action_AF) == 3 + 3 * 3 + 1
  np.testing.assert_allclose(action_AF.sum(axis=1), 1)
  assert [0.25, 0.0, 0.75] in action_AF.tolist()


def test_a_reward_by_hand():
  # Gains of 1 and 3, a loss of 2 in a family that counts for a quarter, beta 0.5.
  value = allocate.reward(np.array([0.5, 0.25, 0.25]), np.array([[1.0, 3.0, -2.0]]), 0.5)
  assert value == pytest.approx([0.5 + 0.75 - 0.5 - 0.5 * 0.5])


def run(transfer_FF, seed, **changes):
  """The mean score after twenty decisions, and their shares: gains shrink with the gap, noisy."""
  hp = config(**changes)
  rng = np.random.default_rng(seed)
  score_F, teacher_F = np.array([-2.0, -1.5, -1.5, -1.0]), np.zeros(4)
  history = []
  for n in range(20):
    noisy_F = score_F + 0.01 * rng.normal(size=4)
    share_F = allocate.decide(history, 3 * n, noisy_F, teacher_F, FAMILIES, hp, (seed,)).share_F
    history.append({"step": 3 * n, "shares": dict(zip(FAMILIES, share_F, strict=True)),
                    "scores": dict(zip(FAMILIES, noisy_F, strict=True))})
    score_F = score_F + 0.3 * (share_F @ transfer_FF) * (teacher_F - score_F)
  return score_F.mean(), history


def test_the_transfer_model_beats_uniform_and_the_largest_gap_where_families_help_and_harm():
  # "c" teaches all; "a" teaches itself and harms "b".
  transfer_FF = 0.5 * np.eye(4)
  transfer_FF[2] = [0.5, 0.4, 0.6, 0.4]
  transfer_FF[0, 1] = -0.6
  mean = {rule: np.mean([run(transfer_FF, seed, rule=rule)[0] for seed in range(200)])
          for rule in ("uniform", "largest_gap", "transfer")}
  # Of the best choice at each decision, made with the true model, -0.075.
  assert mean["transfer"] > mean["largest_gap"] + 0.1 > mean["uniform"] + 0.2


@pytest.mark.medium
def test_the_ensemble_beats_uniform_where_a_family_harms():
  transfer_FF = np.eye(4)
  transfer_FF[0, 1] = -1.0
  ensemble = np.mean([run(transfer_FF, seed, rule="ensemble")[0] for seed in range(5)])
  assert ensemble > run(transfer_FF, 0, rule="uniform")[0] + 0.1


def test_without_transfer_it_comes_near_the_best_rule():
  # Then the best choice is the largest gap; uniform shares end 0.07 below it.
  mean = {rule: np.mean([run(np.eye(4), seed, rule=rule)[0] for seed in range(50)])
          for rule in ("uniform", "largest_gap", "transfer")}
  assert mean["uniform"] + 0.04 < mean["transfer"] <= mean["largest_gap"]


def regrets(transfer_FF, seed, rule, requirement="", decisions=20, **changes):
  """(the mean of what each choice earns less than the best, the shares [N, F], the first gaps).

  Help is in proportion to the gap, harm is not. Worlds differ in their gaps, by the seed.
  """
  hp = config(rule=rule, requirement=requirement, **changes)
  hp.steps = 3 * decisions
  weight_of = allocate.parse(requirement) or dict.fromkeys(FAMILIES, 0.25)
  requirement_F = np.array([weight_of[name] for name in FAMILIES])
  gap_F = np.random.default_rng((1, seed)).uniform(0.5, 2, 4)
  first_F, history, lost = gap_F, [], []
  for n in range(decisions):
    share_F = allocate.decide(history, 3 * n, -gap_F, np.zeros(4), FAMILIES, hp, (seed,)).share_F
    history.append({"step": 3 * n, "shares": dict(zip(FAMILIES, share_F, strict=True)),
                    "scores": dict(zip(FAMILIES, -gap_F, strict=True))})
    # Row by row what a share of each action, and last of the choice, changes.
    choice_AF = np.array([*allocate.actions(4), share_F])
    change_AF = (choice_AF @ np.maximum(transfer_FF, 0)) * gap_F + choice_AF @ np.minimum(
        transfer_FF, 0)
    worth_A = change_AF @ requirement_F - 0.5 * np.maximum(-change_AF, 0) @ requirement_F
    lost.append(worth_A.max() - worth_A[-1])
    gap_F = gap_F - change_AF[-1]
  return np.mean(lost), np.array([list(row["shares"].values()) for row in history]), first_F


@pytest.mark.medium
def test_the_regret_of_the_transfer_model_is_far_below_those_of_simple_rules_and_above_greedys():
  # "d" teaches itself less than the others do, and harms "a".
  transfer_FF = 0.25 * np.array([[1, .3, 0, 0], [.3, 1, 0, 0], [0, 0, 1, 0], [-.8, 0, 0, .6]])
  regret_N = {(rule, kappa): np.array([regrets(transfer_FF, seed, rule, kappa=kappa)[0]
                                       for seed in range(200)])
              for rule, kappa in (("uniform", 1.0), ("largest_gap", 1.0), ("transfer", 1.0),
                                  ("transfer", 0.0))}
  simple = min(regret_N["uniform", 1.0].mean(), regret_N["largest_gap", 1.0].mean())
  assert regret_N["transfer", 1.0].mean() < 0.6 * simple
  # A negative result: the spread does not help here. 0.0161 with it, 0.0133 without it; the mean
  # of the paired differences is 0.0028, 16 standard errors.
  more_N = regret_N["transfer", 1.0] - regret_N["transfer", 0.0]
  assert more_N.mean() > 10 * more_N.std(ddof=1) / np.sqrt(200)
  assert regret_N["transfer", 0.0].mean() < 0.5 * simple


def test_without_transfer_shares_follow_requirement_times_gap():
  written = "a=0.1,b=0.2,c=0.3,d=0.4"
  for seed in range(10):
    _, share_NF, gap_F = regrets(0.1 * np.eye(4), seed, "transfer", written, decisions=40)
    target_F = gap_F * [0.1, 0.2, 0.3, 0.4]
    assert np.corrcoef(share_NF[5:].mean(axis=0), target_F)[0, 1] > 0.9


@pytest.mark.medium
@pytest.mark.parametrize("rule", ["transfer", "ensemble"])
def test_a_history_gives_the_same_decisions_again(rule):
  _, history = run(np.eye(4), 3, rule=rule)
  teacher_F = np.zeros(4)
  for n in (0, 4, 5, 11):
    score_F = np.array([history[n]["scores"][name] for name in FAMILIES])
    again = allocate.decide(history[:n], 3 * n, score_F, teacher_F, FAMILIES, config(rule=rule),
                            (3,))
    assert dict(zip(FAMILIES, again.share_F, strict=True)) == history[n]["shares"]


@pytest.mark.parametrize("rule", ["transfer", "ensemble"])
@pytest.mark.parametrize("beta, want", [(0.0, [1, 0]), (8.0, [0, 1])])
def test_a_harmful_family_is_left_out_where_beta_is_large(rule, beta, want):
  # "a" gains 0.1 and takes 0.06 from "b", which is worth 0.02; "b" gains 0.01, worth 0.005.
  score_F, history = np.zeros(2), []
  for share_F in [*allocate.actions(2)] * 4:
    history.append({"step": 0, "shares": dict(zip("ab", share_F, strict=True)),
                    "scores": dict(zip("ab", score_F, strict=True))})
    score_F = score_F + share_F @ [[0.1, -0.06], [0.0, 0.01]]
  found = allocate.decide(history, 3, score_F, np.full(2, 5.0), "ab",
                          config(rule=rule, kappa=0.0, beta=beta), (0,))
  assert found.share_F.tolist() == want


def test_tenths_of_the_stage_that_begin_without_a_gain_by_hand():
  # Of sixty steps, tenths begin at 0, 6, 12 and 18 with 0, 1, 1 and 2: one did not rise.
  step_N = np.array([0, 3, 6, 9, 12, 15, 18])
  assert allocate._stalls(np.array([0.0, 9, 1, 9, 1, 9, 2]), step_N, 60) == 1


def test_a_tenth_without_a_gain_lowers_the_weight_of_the_spread(monkeypatch):
  _, history = run(np.eye(4), 0)

  def chosen(stalls, kappa):
    monkeypatch.setattr(allocate, "_stalls", lambda *args: stalls)
    return [allocate.decide(history[:n], 3 * n, np.full(4, -1.0), np.zeros(4), FAMILIES,
                            config(kappa=kappa), (seed,)).share_F.tolist()
            for n in (5, 6, 8) for seed in range(6)]

  assert chosen(2, 8.0) == chosen(0, 8.0 * 0.7**2) != chosen(0, 8.0)


def test_first_decisions_are_random_without_repeats():
  _, history = run(np.eye(4), 1, explore=20)
  assert len({tuple(row["shares"].values()) for row in history}) == 20


def test_a_requirement_of_one_family_is_met():
  _, history = run(np.eye(4), 0, requirement="d=1.0")
  assert np.mean([row["shares"]["d"] for row in history[-8:]]) > 0.7
  share_F = allocate.decide([], 0, None, None, FAMILIES, config(rule="fixed", weights="b=1"),
                            ()).share_F
  assert share_F.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("changes, has_teacher, message", [
    ({"pass_samples": 4}, True, "weights them by pass rates already: take one of the two out"),
    ({"rounds": 2}, True, "rounds is 2: set rounds to 0 or 1"),
    ({}, False, "compares with a teacher, and this stage has none: choose 'uniform' or 'fixed'"),
    ({"rule": "fixed"}, True, "the rule 'fixed' needs weights"),
    ({"weights": "a=1"}, True, "no other reads them"),
    ({"rule": "uniform", "requirement": "a=1"}, True, "'uniform' does not read it: leave it empty"),
])
def test_a_stage_that_cannot_take_shares_is_refused(changes, has_teacher, message):
  hp = config(**{k: v for k, v in changes.items() if k in BLOCK})
  hp.update({k: v for k, v in changes.items() if k not in BLOCK})
  with pytest.raises(InputError, match=message):
    allocate.check(hp, has_teacher)


@pytest.mark.parametrize("changes, family_of, message", [
    ({}, None, "the task has none"),
    ({"weights": "even=0.5,left=0.5", "rule": "fixed"}, lambda i: "even" if i % 2 else "odd",
     "names the family 'left' and no problem of the split all is of it: choose from even, odd"),
    ({"requirement": "long=1"}, lambda i: "even", "allocate.requirement names the family 'long'"),
    ({}, lambda i: "few" if i < 2 else "many",
     "may draw 4 prompts of a step from the family 'few', which has 2 problems: lower prompts"),
    ({"rule": "uniform"}, lambda i: "one" if i < 1 else "many",
     "may draw 2 prompts of a step from the family 'one', which has 1 problems: lower prompts"),
    ({}, lambda i: i % 2, "that of problem 0 is 0: let the task's `family` return a text"),
    ({"problems": 1}, lambda i: "even" if i % 2 else "odd", "is 1 and there are 2 families"),
    ({"problems": 40}, lambda i: "even" if i % 2 else "odd", "split has 6: lower it"),
])
def test_problems_without_the_families_are_refused(changes, family_of, message):
  prompts = [Prompt(i, (i,)) for i in range(12)]
  with pytest.raises(InputError, match=message):
    allocate.check_families(config(**changes), "all", family_of, prompts, prompts)


@pytest.mark.parametrize("changes", [
    {"rule": "uniform"}, {"rule": "fixed", "weights": "few=0.5,many=0.5"},
    {"rule": "fixed", "weights": "many=1"}])
def test_a_small_family_fits_shares_that_do_not_change(changes):
  prompts = [Prompt(i, (i,)) for i in range(12)]
  allocate.check_families(config(**changes), "all", lambda i: "few" if i < 2 else "many", prompts,
                          prompts)


@pytest.mark.parametrize("text, fits", [
    ("", True), ("a=1", True), ("a=0.5, b=0.5", True), ("a=0.5,a=1", False), ("a=0.5,a=0.5", False),
    ("a=0.7", False), ("a=-1,b=2", False)])
def test_shares_are_of_distinct_families_and_sum_to_one(text, fits):
  assert allocate.KEYS["weights"].check(text) is fits


def test_means_are_over_the_tokens_of_each_group():
  value_BT = np.array([[1.0, 2, 9], [3, 9, 9], [5, 6, 7]])
  weight_BT = np.array([[1.0, 1, 0], [1, 0, 0], [1, 1, 1]])
  assert allocate.means(value_BT, weight_BT, [2, 1]).tolist() == [2.0, 6.0]
