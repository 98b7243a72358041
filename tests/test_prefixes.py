"""The prefix probe: cuts, the numbers of a known pair, names of folders, and refusals."""

import json

import jax
import numpy as np
import pytest

from configs import arithmetic
from s2d_jax import compiling, evals, keys, prefixes, recipe, rollouts, scoring, sharding, tasks
from s2d_jax.errors import InputError
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import Sampling

PROMPTS = [Prompt(30, (1, 2)), Prompt(20, (3,)), Prompt(10, (4,)), Prompt(40, (5,))]
LEARNER = [[7, 7, 9], [6, 6, 6, 9], [8, 9], [7]]  # of the problems in the order of their ids, once


class Guide:
  """A guide that writes 7 to the end from a prompt, and repeats the last token of a prefix."""
  sampling = Sampling(max_tokens=4)

  def __init__(self):
    self.calls = []

  def __call__(self, params, prompts, seed):
    self.calls.append((params, prompts, seed))
    bare = {p.id: p.tokens for p in PROMPTS}
    last = [7 if p.tokens == bare[p.id] else p.tokens[-1] for p in prompts]
    return rollouts.given_solutions(prompts, [[token] * 4 for token in last], 8, 4), None


def begun():
  """The learner's responses, and second ones that no cut may touch."""
  twice = [p for p in PROMPTS for _ in range(2)]
  both = [ids for first in LEARNER for ids in (first, [0, 0, 0, 0])]
  rows = rollouts.given_solutions(twice, both, 4, 4)
  return rows._replace(sample_index_B=np.tile(np.arange(2, dtype=np.int32), 4))


def test_the_numbers_of_a_known_pair(monkeypatch):
  # 30 is right with a 7 at the end, 20 with a 6, 10 with an 8, 40 with a 5.
  want = {30: 7, 20: 6, 10: 8, 40: 5}
  cuts = {30: 2, 20: 3, 10: 1, 40: 0}
  monkeypatch.setattr(prefixes, "cut", lambda ids, seed, prompt_id: ids[: cuts[prompt_id]])
  guide = Guide()
  checked = []
  def reward(prompt_id, ids):
    checked.append((prompt_id, ids.tolist()))
    return float(ids[-1] == want[prompt_id])
  answer = lambda ids: None if ids[-1] == 6 else "7"
  found = prefixes.measure(guide, "weights", PROMPTS, begun(), reward, answer, (4, 2))
  # Four tokens in all, those of the prefix included.
  assert checked == [(p.id, [7] * 4) for p in PROMPTS] + [
      (30, [7] * 4), (20, [6] * 4), (10, [8] * 4), (40, [7] * 4)]
  assert found == {"problems": 4, "guide": 0.25, "after_prefix": 0.75, "drop": [0, -1, -1, 0],
                   "right_to_wrong": 0, "wrong_to_right": 2,
                   "guide_well_formed": 1.0, "after_prefix_well_formed": 0.75}
  assert guide.calls == [
      ("weights", PROMPTS, (4, 2)),
      ("weights", [Prompt(30, (1, 2, 7, 7)), Prompt(20, (3, 6, 6, 6)), Prompt(10, (4, 8)),
                   Prompt(40, (5,))], (4, 2))]
  # A learner that misleads the guide on 20 and 10.
  want |= {20: 7, 10: 7, 40: 7}
  cuts |= {30: 2, 20: 2, 10: 1}
  found = prefixes.measure(Guide(), "weights", PROMPTS, begun(), reward, None, (4, 2))
  assert found == {"problems": 4, "guide": 1.0, "after_prefix": 0.5, "drop": [0, 1, 1, 0],
                   "right_to_wrong": 2, "wrong_to_right": 0}


def test_a_cut_is_uniform_and_leaves_a_token():
  ids = np.array([5, 6, 7, 8])
  lengths = [len(prefixes.cut(ids, (0, 1), prompt_id)) for prompt_id in range(4000)]
  # Each of 0, 1, 2, 3 a thousand times; the standard deviation is 27.
  assert np.bincount(lengths).tolist() == pytest.approx([1000] * 4, abs=130)
  np.testing.assert_array_equal(prefixes.cut(ids, (0, 1), 3), ids[: lengths[3]])
  assert lengths[:50] != [len(prefixes.cut(ids, (1, 1), i)) for i in range(50)]
  assert len(prefixes.cut(ids[:1], (0, 1), 3)) == 0


# Names of folders, and the doctor.


def shipped(**changes):
  config = arithmetic.get_config("tiny").unlock()
  config.probe.update(changes)
  return config


def test_absent_it_names_nothing_new_and_given_it_does():
  plain, changed = shipped(), shipped(prefixes=2)
  assert "prefixes" not in plain.probe
  assert "prefixes" not in keys.hashed(plain.probe, evals.PROBE_KEYS)
  before = keys.hashed(plain.probe, evals.PROBE_KEYS)
  assert keys.hashed(changed.probe, evals.PROBE_KEYS) == before | {"prefixes": 2}


@pytest.mark.parametrize("changes, said", [
    ({"prefixes": 5}, "prefixes is 5 and problems is 4: lower prefixes, or raise problems"),
    ({"prefixes": 2, "sampling": {"min_tokens": 1}}, "prefixes needs sampling.min_tokens = 0"),
    ({"prefixes": 2, "sampling": {"stop_strings": ("=",)}}, "no sampling.stop_strings, because"),
    ({"prefixes": 0}, "prefixes is 0: set it to a whole number of at least 1, or leave it out.")])
def test_values_that_do_not_fit_are_refused(changes, said):
  config = shipped(**changes)
  with pytest.raises(InputError, match=said) as refused:
    recipe.plan(config, tasks.get(config))
  assert str(refused.value).startswith("config.probe.prefixes")


@pytest.mark.medium
def test_a_guide_that_is_the_learner_finishes_as_it_did(tmp_path, monkeypatch):
  config = shipped(prefixes=4)
  config.arms = "untrained"
  config.probe.sampling.temperature = 0.0
  plan = recipe.plan(config, tasks.get(config))
  whole = []
  measure = prefixes.measure
  def watched(sample, params, prompts, begun, reward, answer, seed):
    def recorded(prompt_id, ids):
      whole.append((prompt_id, ids.tolist()))
      return reward(prompt_id, ids)
    row_of = {key: row for row, key in enumerate(rollouts.keys_of(begun))}
    learner.extend((p.id, begun.response(row_of[p.id, 0]).tolist()) for p in prompts)
    return measure(sample, params, prompts, begun, recorded, answer, seed)
  learner = []
  monkeypatch.setattr(prefixes, "measure", watched)
  compiled = []
  compile_ = compiling.Samplers.compile
  monkeypatch.setattr(compiling.Samplers, "compile", lambda self, *args, **changes: (
      compiled.append((self.prompt_tokens, changes)), compile_(self, *args, **changes))[1])
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    name = scoring.probe(plan, "teacher", "teacher", tmp_path)
  assert len(learner) == 4 and whole == learner + learner
  # The guide's own sampler comes first, before anything is sampled.
  tokens = config.prompt_tokens
  wide = tokens + config.probe.sampling.max_tokens
  assert compiled == [(wide, {"samples_per_prompt": 1}), (tokens, {}), (tokens, {})]
  compiled.clear()
  result = json.loads((tmp_path / name / "result.json").read_text())
  found = result["prefixes"]
  right = np.mean([one[0] for one in result["student"]["correct"]])
  assert found["guide"] == found["after_prefix"] == right
  assert found["problems"] == 4 and found["right_to_wrong"] == found["wrong_to_right"] == 0
  # Without the key the same programs run, and the numbers of both models are the same bytes.
  del config.probe.prefixes
  plan = recipe.plan(config, tasks.get(config))
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    plain = scoring.probe(plan, "teacher", "teacher", tmp_path)
  assert plain != name and json.loads((tmp_path / plain / "result.json").read_text()) == {
      text: result[text] for text in ("student", "teacher")}
  assert compiled == [(tokens, {}), (tokens, {})]
  inputs = json.loads((tmp_path / plain / "manifest.json").read_text())["inputs"]
  assert set(inputs) == {"weights", "guide", "probe", "dtype", "cache", "seed", "tokenizer", "task",
                         "problems"}
