"""The probe of a learner by families of problems, and the decision that follows it (`allocate`)."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from s2d_jax import allocate, hosts, ledger, manifest, metrics, rollouts, sampler, sharding
from s2d_jax.compiling import Probe
from s2d_jax.roles import StageModels
from s2d_jax.rollouts import Prompt, RolloutSource
from s2d_jax.sharding import Params


class Allocation(NamedTuple):
  """How a stage decides the families of its prompts."""
  order: allocate.Order
  probed: dict[str, list[Prompt]]   # by family; {} where the rule reads no probes
  teacher: Callable[[sampler.Sampler], RolloutSource]  # of the compiled sampler of its responses
  models: StageModels
  hp: ConfigDict                    # of the stage
  seed: tuple[int, ...]             # of the stage

  def decide(self, programs: Probe | None, params: Params, step: int,
             log: metrics.Log) -> dict[str, float] | None:
    """Decides the shares of the steps from `step` on, and adds them to the log.

    Args:
      programs: None where the rule reads no probes; params: all of the learner's weights.
      log: of the stage's decisions, all of them before `step`.

    Returns:
      The probe's cost, as `ledger.probe_part`, or None.
    """
    families = self.order.families
    score_F = teacher_F = cost = None
    if programs is not None:
      prompts = [prompt for name in families for prompt in self.probed[name]]
      # Sampled once: later probes find the responses in the store.
      rollout, fresh_B, _ = self.teacher(programs.sampler).sample(None, prompts, step)
      batch = rollouts.batch(rollout)
      placed = sharding.put_batch(batch, sharding.current_mesh())
      logp_BT, _ = jax.device_get(programs.token_logps(params, placed))
      sizes = [len(self.probed[name]) for name in families]
      score_F, teacher_F = (allocate.means(x_BT, batch.weight_BT, sizes)
                            for x_BT in (logp_BT, batch.sampler_logp_BT))
      cost = ledger.probe_part(rollout, fresh_B, not log.rows, self.models)
    found = allocate.decide(log.rows, step, score_F, teacher_F, families, self.hp,
                            (*self.seed, zlib.crc32(b"allocate")))
    row = {"step": step, "shares": dict(zip(families, found.share_F, strict=True))}
    if score_F is not None:
      row |= {"scores": dict(zip(families, score_F, strict=True)),
              "teacher": dict(zip(families, teacher_F, strict=True)),
              "mean": found.mean, "spread": found.spread}
    # Processes whose last bits differ would choose other prompts, and wait for each other for ever.
    hosts.agree("shares of families", manifest.digest(row))
    log.add(row)
    return cost
