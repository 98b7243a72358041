"""A score that was stopped: its samples are read again, and the result is an undisturbed one's."""

import json

import jax
import pytest

from configs import arithmetic
from s2d_jax import recipe, rollouts, sampler, scoring, sharding, tasks

pytestmark = pytest.mark.medium


class Stopped(Exception):
  """Raised where a kill would stop the process."""


@pytest.fixture(scope="module")
def plan():
  """Four problems of the test split with three samples each, beside a greedy one."""
  config = arithmetic.get_config("tiny").unlock()
  config.arms = "untrained"
  hp = config.evals.test
  hp.problems, hp.prompts, hp.ks = 4, 2, (1, 3)
  hp.sampling.samples_per_prompt = 3
  return recipe.plan(config, tasks.get(config))


def scored(plan, workdir):
  """The folder of the student's score."""
  with jax.set_mesh(sharding.make_mesh(plan.config.mesh)):
    return workdir / scoring.evaluate(plan, "student", "test", workdir)


def parts(folder, way):
  return [rollouts.from_bytes(path.read_bytes()) for path in sorted(folder.glob(f"{way}-*/*.npz"))]


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
  return scored(plan, tmp_path_factory.mktemp("undisturbed"))


def test_every_sample_is_on_disk(plan, undisturbed):
  samples = json.loads((undisturbed / "result.json").read_text())["samples"]
  for way, count in (("sampled", 3), ("greedy", 1)):
    rows = rollouts.concatenate(parts(undisturbed, way))
    ids = [prompt.id for prompt in plan.prompts["test"][:4]]
    assert sorted(rollouts.keys_of(rows)) == sorted((i, g) for i in ids for g in range(count))
    length = dict(zip(rollouts.keys_of(rows), rows.response_length_B.tolist(), strict=True))
    assert samples[way]["length_PG"] == [[length[i, g] for g in range(count)] for i in ids]


@pytest.mark.parametrize("stop", [2, 5, 11, 12, 14])
def test_a_stopped_score_continues(plan, undisturbed, monkeypatch, tmp_path, stop):
  monkeypatch.setattr(scoring, "_ROWS", 2)
  finished = []
  sample_rows = sampler.Sampler.sample_rows
  def counted(self, params, requests, seed, weight_version=0, on_finish=None):
    def finish(row, rollout):
      finished.append(requests[row])
      if len(finished) == stop:
        raise Stopped
      on_finish(row, rollout)
    return sample_rows(self, params, requests, seed, weight_version, finish)
  monkeypatch.setattr(sampler.Sampler, "sample_rows", counted)
  with pytest.raises(Stopped):
    scored(plan, tmp_path)
  # Twelve sampled rows come first, then four greedy ones; whole pairs of each are on disk.
  folder = tmp_path / undisturbed.name
  stored = [sum(len(part.prompt_id_B) for part in parts(folder, way))
            for way in ("sampled", "greedy")]
  assert stored == [min(stop - 1, 12) // 2 * 2, max(stop - 13, 0) // 2 * 2]
  finished.clear()
  stop = None
  assert scored(plan, tmp_path) == folder
  assert len(finished) == 16 - sum(stored)
  for name in ("result.json", "samples.json"):
    assert json.loads((folder / name).read_text()) == json.loads((undisturbed / name).read_text())
  for way in ("sampled", "greedy"):
    found, expected = (
        {key: rows.response(row).tolist() for rows in parts(f, way)
         for row, key in enumerate(rollouts.keys_of(rows))} for f in (folder, undisturbed))
    assert found == expected
  # One part has all rows, in the order of the problems: its bytes do not depend on the stop.
  files = [{str(path.relative_to(f)): path.read_bytes() for path in f.glob("*/*.npz")}
           for f in (folder, undisturbed)]
  assert files[0] == files[1] and len(files[0]) == 2
