"""A sweep: a config with a list of flat overrides, each a run of its own in one work folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from s2d_jax import manifest
from s2d_jax.errors import InputError
from s2d_jax.planning import Plan


def expand(config: ConfigDict) -> list[ConfigDict]:
  """The configs of a sweep, [config] without one.

  `config.sweep` is a list of flat overrides such as {"seed": 1, "stages.sft.optim.lr": 1e-3}. Each
  of them gives a config of its own. Runs in one work folder share the stages they have in common.

  Raises:
    InputError: an override names no key, or has a value of another type.
  """
  if "sweep" not in config:
    return [config]
  configs = []
  for changes in config.sweep:
    one = config.copy_and_resolve_references()
    with one.unlocked():
      del one.sweep
    # An override that names no key is an error only where the config is locked.
    one.lock()
    try:
      one.update_from_flattened_dict(changes)
    except (KeyError, TypeError, AttributeError) as error:
      raise InputError(f"config.sweep has {dict(changes)}, which does not fit the config "
                       f"({str(error).splitlines()[0]}): name its keys, with values of their "
                       "types.") from error
    configs.append(one)
  # The mesh is set up once, around all runs of the process.
  if len({one.mesh for one in configs}) > 1:
    raise InputError("config.sweep has several meshes and a process has one: run a sweep of each.")
  if not configs:
    raise InputError("config.sweep is empty: list some overrides, or leave the key out.")
  return configs


def outline(plans: Sequence[Plan], overrides: Sequence[Mapping[str, Any]],
            workdir: epath.PathLike) -> list[str]:
  """Lines that describe the runs of these plans: arms, finished stages, and each stage's passes.

  Args:
    plans: one of each run.
    overrides: the changes of each run, {} where there are none.
    workdir: the folder of all runs.
  """
  lines = []
  found: set[str] = set()
  stages = []
  for plan, changes in zip(plans, overrides, strict=True):
    # A stage of an earlier run has the same name, so it is trained once.
    new = plan.nodes.keys() - found
    found |= new
    stages += [_stage(plan, name) for name in plan.nodes if name in new]
    shared = len(plan.nodes) - len(new)
    lines.append(f"{changes or 'as configured'}: arms {', '.join(plan.arms)}; "
                 f"{len(plan.nodes)} stages"
                 + (f", {shared} of them shared with the runs above" if shared else ""))
  done = sum(manifest.read(epath.Path(workdir) / name) is not None for name in found)
  runs = "1 run" if len(plans) == 1 else f"{len(plans)} runs"
  return [*lines, f"{runs}, {len(found)} distinct stages, {done} of them finished in {workdir}",
          *stages]


def _stage(plan: Plan, name: str) -> str:
  """A stage's arms, its split, its steps, and its passes over the problems of the split."""
  node = plan.nodes[name]
  problems = len(plan.prompts[node.split])
  # With dynamic resampling a step owns the problems of all its rounds, drawn or not.
  owned = node.hp.steps * node.hp.prompts * max(1, node.hp.get("rounds", 0))
  return (f"{name}: {node.hp.steps:,} steps of {node.hp.prompts} problems, "
          f"{owned / problems:.2f} passes over the {problems:,} of {node.split}, for "
          + ", ".join(arm for arm, names in plan.arms.items() if name in names))
