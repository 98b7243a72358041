"""Settings of a stage that are in range one by one and make no sense together.

Each function raises InputError, whose message begins with a key of the stage's block.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from s2d_jax.errors import InputError
from s2d_jax.sampler import Sampling


def check_rewards(hp: ConfigDict) -> None:
  """Refuses rewards that could teach nothing, and a penalty before the first token."""
  sampling = hp.sampling
  if sampling.samples_per_prompt < 2:
    raise InputError("sampling.samples_per_prompt is 1 and rewards are compared between the "
                     "samples of a prompt: set it to 2 or more.")
  if sampling.temperature == 0:
    raise InputError("sampling.temperature is 0, so all samples of a prompt are equal and their "
                     "rewards teach nothing: choose it above 0.")
  if hp.overlong_cache > sampling.max_tokens:
    raise InputError(f"overlong_cache is {hp.overlong_cache}: choose at most sampling.max_tokens, "
                     f"{sampling.max_tokens}.")


def check_policy(hp: ConfigDict) -> None:
  """Refuses a coefficient that nothing reads, and samples that are not from the trained policy."""
  if hp.get("kl") == "none" and hp.kl_coef > 0:
    raise InputError(f"kl_coef is {hp.kl_coef} and kl is 'none', so nothing reads it: set kl_coef "
                     "to 0, or choose a kl.")
  changed = [name for name in ("temperature", "top_p", "top_k", "min_p")
             if hp.sampling[name] != Sampling.KEYS[name].neutral]
  # The ratio of an update would compare two distributions that the samples are not from.
  if changed and hp.get("mismatch") == "none":
    name = changed[0]
    raise InputError(f"sampling.{name} is {hp.sampling[name]} and mismatch is 'none', so samples "
                     "are not from the policy that is trained: set mismatch to truncate or mask, "
                     f"or sampling.{name} to {Sampling.KEYS[name].neutral}.")


def check_problems(hp: ConfigDict, problems: int, split: str) -> None:
  """Refuses a split of fewer problems than a step, all of its rounds, or a search takes."""
  ahead = {"foresee.problems": hp.foresee.problems} if "foresee" in hp else {}
  for key, needed in ({"prompts": hp.prompts} | ahead).items():
    if needed > problems:
      raise InputError(f"{key} is {needed} and the split {split} has {problems} problems: lower "
                       "it.")
  if hp.get("rounds", 0) * hp.prompts > problems:
    raise InputError(f"rounds is {hp.rounds}, which takes {hp.rounds * hp.prompts} problems in a "
                     f"step, and the split {split} has {problems}: lower rounds or prompts.")


def check_arm(arm: str, steps: Sequence[int]) -> None:
  """Refuses an arm that trains nothing; `steps` are those of its stages."""
  if steps and not any(steps):
    raise InputError(f"the arm {arm} trains nothing, because all of its stages have 0 steps: raise "
                     "steps, or drop the arm.")
