"""Where rollouts come from: each source by hand, with a sampler that counts its calls."""

import errno

import numpy as np
import pytest

from s2d_jax import recipe, rollouts
from s2d_jax.errors import InputError, WriteError
from s2d_jax.rollouts import Prompt

STATS = rollouts.SamplerStats(dispatches=3, tokens=8)
PROMPTS = [Prompt(10, (5, 6)), Prompt(20, (7,))]


class Sampler:
  """Answers every prompt with two rows whose first token is the sample index; records its calls."""

  def __init__(self):
    self.calls = []

  def __call__(self, params, prompts, seed, first_sample=0, weight_version=0, on_finish=None):
    self.calls.append((params, [p.id for p in prompts], seed, first_sample, weight_version))
    pairs = [(prompt, first_sample + g) for prompt in prompts for g in range(2)]
    rollout = rollouts.given_solutions(
        [prompt for prompt, _ in pairs], [[index, 1] for _, index in pairs], 2, 2)
    zeros_BT = np.zeros((len(pairs), 2), np.float32)
    return rollout._replace(sample_index_B=np.array([index for _, index in pairs], np.int32),
                            sampler_logp_BT=zeros_BT, behaviour_logp_BT=zeros_BT,
                            weight_version=weight_version), STATS


def frozen(sampler, folder, stage):
  return rollouts.FrozenActor(sampler, "frozen", rollouts.Store(folder), (3,), stage, 2,
                              lambda step, prompt: step // 4)


def test_an_on_policy_source_seeds_by_step_and_round():
  sampler = Sampler()
  source = rollouts.OnPolicy(sampler, (3, 4), updates_per_step=6)
  rollout, fresh_B, stats = source.sample("live", PROMPTS, 5, 1)
  assert sampler.calls == [("live", [10, 20], (3, 4, 5, 1), 0, 30)]
  assert fresh_B.tolist() == [True] * 4 and rollout.weight_version == 30 and stats == STATS


def test_a_frozen_actor_samples_once_an_epoch_with_its_own_weights(tmp_path):
  sampler = Sampler()
  source = frozen(sampler, tmp_path / "store", "a")
  first, fresh_B, stats = source.sample("live", PROMPTS, 0)
  assert sampler.calls == [("frozen", [10, 20], (3,), 0, 0)] and fresh_B.all()
  assert stats == STATS
  assert first.sample_index_B.tolist() == [0, 1, 0, 1]
  again, fresh_B, stats = source.sample("live", PROMPTS, 1)  # the same epoch: nothing is missing
  assert len(sampler.calls) == 1 and not fresh_B.any() and stats is None
  np.testing.assert_array_equal(again.response_BT, first.response_BT)
  later, fresh_B, _ = source.sample("live", PROMPTS, 4)  # the next epoch asks for samples 2 and 3
  assert sampler.calls[1][3] == 2 and fresh_B.all()
  assert later.sample_index_B.tolist() == [2, 3, 2, 3]


def test_prompts_of_one_step_may_be_in_different_epochs(tmp_path):
  sampler = Sampler()
  source = frozen(sampler, tmp_path / "store", "a")._replace(
      epoch=lambda step, prompt: 2 if prompt.id == 10 else 1)
  rollout, fresh_B, stats = source.sample("live", PROMPTS, 0)
  # In the order of the prompts, though the smaller epoch is sampled first.
  assert rollout.prompt_id_B.tolist() == [10, 10, 20, 20] and fresh_B.all()
  assert rollout.sample_index_B.tolist() == [4, 5, 2, 3]
  assert [call[1:4:2] for call in sampler.calls] == [([20], 2), ([10], 4)]
  assert stats.tokens == 2 * STATS.tokens
  again, fresh_B, _ = source.sample("live", PROMPTS, 0)  # the same step: one part holds both
  assert fresh_B.all() and len(sampler.calls) == 2
  np.testing.assert_array_equal(again.response_BT, rollout.response_BT)


def test_a_step_done_again_after_a_kill_is_charged_for_the_same_rows(tmp_path):
  frozen(Sampler(), tmp_path / "store", "a").sample(None, PROMPTS, 0)
  sampler = Sampler()
  _, fresh_B, _ = frozen(sampler, tmp_path / "store", "a").sample(None, PROMPTS, 0)
  assert fresh_B.all() and sampler.calls == []
  _, fresh_B, _ = frozen(sampler, tmp_path / "store", "b").sample(None, PROMPTS, 0)
  assert not fresh_B.any() and sampler.calls == []  # another stage reuses them


def test_given_solutions_have_no_log_probabilities_and_are_not_fresh():
  source = rollouts.GivenSolutions({10: [8, 1], 20: [9, 9, 1]}.get, prompt_tokens=2, max_tokens=4)
  rollout, fresh_B, stats = source.sample(None, PROMPTS, 0)
  assert [rollout.response(b).tolist() for b in range(2)] == [[8, 1], [9, 9, 1]]
  assert not fresh_B.any() and rollout.sampler_logp_BT is None and stats is None
  batch = rollouts.batch(rollout)
  assert (batch.sampler_logp_BT, batch.behaviour_logp_BT, batch.old_logp_BT) == (None, None, None)


def test_label_use_of_each_stage():
  assert {stage.name: stage.label_use for stage in recipe.STAGES} == {
      "teacher_grpo": "each_step", "teacher_sft": "each_step", "student_grpo": "each_step",
      "forward_kl": "none", "sft": "none", "reverse_kl": "none", "weighted_fkl": "once",
      "self_distillation": "none"}


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: b"",
    *(lambda data, share=share: data[: (n := int(share * len(data)))] + bytes([data[n] ^ 0x40])
      + data[n + 1 :] for share in (0, 0.01, 0.1, 0.5, 0.9, 0.98, 0.999))])
def test_a_damaged_part_of_a_store_is_named_and_sampled_again_once_deleted(tmp_path, damage):
  source = frozen(Sampler(), tmp_path / "store", "a")
  whole, _, _ = source.sample("live", PROMPTS, 0)
  path, = (tmp_path / "store").iterdir()
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(InputError, match=f"{path} is damaged .*: delete it, and its responses are"):
    rollouts.Store(tmp_path / "store")
  path.unlink()
  again, fresh_B, _ = frozen(Sampler(), tmp_path / "store", "a").sample("live", PROMPTS, 0)
  assert fresh_B.all()
  np.testing.assert_array_equal(again.response_BT, whole.response_BT)


def test_a_part_that_cannot_be_read_is_tried_again_and_not_called_damaged(tmp_path, failing_disk):
  source = frozen(Sampler(), tmp_path / "store", "a")
  whole, _, _ = source.sample("live", PROMPTS, 0)
  path, = (tmp_path / "store").iterdir()
  waits = failing_disk("read_bytes", 1, errno.EIO)
  rows = rollouts.Store(tmp_path / "store").rows()
  np.testing.assert_array_equal(rows.response_BT, whole.response_BT)
  assert len(waits) == 1
  failing_disk("read_bytes", 9, errno.EIO)
  with pytest.raises(WriteError) as refused:
    rollouts.Store(tmp_path / "store")
  assert str(refused.value) == (f"{path} cannot be read (Input/output error): mend the disk, and "
                                "the same command goes on from there.")
