"""A sweep: a config with a list of flat overrides, each a run of its own in one work folder."""

from etils import epath

from s2d_jax import manifest


def expand(config):
  """The configs of a sweep, [config] without one.

  `config.sweep` is a list of flat overrides such as {"seed": 1, "stages.sft.optim.lr": 1e-3}; each
  makes a config of its own, and a shared work folder shares the stages they have in common.

  Raises:
    ValueError: an override names no key, or has a value of another type.
  """
  if "sweep" not in config:
    return [config]
  configs = []
  for changes in config.sweep:
    made = config.copy_and_resolve_references()
    with made.unlocked():
      del made.sweep
    made.lock()  # an override that names no key is then an error
    try:
      made.update_from_flattened_dict(changes)
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"config.sweep has {dict(changes)}, which does not fit the config "
                       f"({str(error).splitlines()[0]}): name its keys, with values of their "
                       "types.") from error
    configs.append(made)
  if len({made.mesh for made in configs}) > 1:
    raise ValueError("config.sweep has several meshes, and one process has one: run them apart.")
  if not configs:
    raise ValueError("config.sweep is empty: list some overrides, or leave the key out.")
  return configs


def outline(plans, overrides, workdir):
  """What `walk.run` would do with these plans, each with its overrides, in lines."""
  lines, seen = [], {}
  for made, changes in zip(plans, overrides, strict=True):
    new = [name for name in made.nodes if name not in seen]
    seen |= made.nodes
    lines.append(f"{changes or 'as configured'}: arms {', '.join(made.arms)}; "
                 f"{len(made.nodes)} stages, {len(made.nodes) - len(new)} of them shared with "
                 "the runs above")
  done = sum(manifest.read(epath.Path(workdir) / name) is not None for name in seen)
  return [*lines, f"{len(plans)} runs, {len(seen)} distinct stages, {done} of them finished in "
          f"{workdir}"]
