"""Several guides of one stage: the family of a problem, or a column of it, chooses who scores it.

A loss is a sum over rows, and so is its gradient. An update therefore scores the rows of one guide
after another, adds up sums and gradients, and divides once. On the devices is one guide at a time;
the others wait in the host's memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import chat, keys, manifest, sharding
from s2d_jax.compiling import RoutedUpdate
from s2d_jax.errors import InputError, from_user_code
from s2d_jax.roles import Role
from s2d_jax.rollouts import Batch, Prompt, batch_rows
from s2d_jax.sharding import Params
from s2d_jax.training import Totals

# Their values are spent labels, or unlike for each problem.
_NO_COLUMNS = ("answer", "solution", "problem", "id")


def _is_block(block: Any) -> bool:
  names = block.folders
  if set(block) != {"by", "folders"} or not names or block.by in _NO_COLUMNS:
    return False
  return isinstance(block.by, str) and all(isinstance(folder, str) and folder
                                           for folder in names.values())


# Not hashed: a stage's name has the identities of the folders and each problem's guide instead.
KEYS = {"guides": keys.Key(
    _is_block, "write {'by': 'family' or a text column that is no answer, 'folders': {value: "
    "folder}}",
    neutral=None, hashed=False, optional=True)}
TEACHER = ""  # the arm's own teacher, which guides the problems that no folder is for


class Task(Protocol):
  """The field of a `planning.Task` that is read; planning imports this file."""
  family: Callable[[Mapping], str] | None


def check(hp: ConfigDict, taught: bool) -> None:
  """Refuses guides that a stage cannot have; a message begins with the key's name.

  Args:
    hp: the stage's config; taught: whether the arm's teacher guides the stage.
  """
  if "guides" not in hp:
    return
  if not taught:
    raise InputError("guides stand beside the arm's teacher and this stage does not read one: take "
                     "guides out, or choose a stage such as reverse_kl.")
  if "foresee" in hp and hp.foresee.signal == "kl":
    raise InputError("guides are several and foresee.signal \"kl\" compares with one: set it to "
                     "\"reward\".")
  if "allocate" in hp:
    raise InputError("guides are several and allocate probes with one: take one of the two out.")


def role(folder: str) -> str:
  """The name of a further guide's role, unlike that of any other role."""
  return f"guide {folder}"


def folders(config: ConfigDict) -> dict[str, str]:
  """{role: folder} of the base models and of every further guide."""
  further = {role(folder): folder for hp in config.stages.values() if "guides" in hp
             for folder in hp.guides.folders.values()}
  return {role: str(config[role]) for role in ("teacher", "student")} | further


def check_models(config: ConfigDict, student: tuple[Any, chat.Chat],
                 read: Callable[[str], tuple[Any, chat.Chat]]) -> None:
  """Refuses a guide whose tokenizer, vocabulary or positions do not fit the student.

  Args:
    student: as `sampler.read_folder` returns it; read: the same of a folder.
  """
  for name, hp in config.stages.items():
    for folder in (hp.guides.folders if "guides" in hp else {}).values():
      path = f"config.stages.{name}.guides: the guide {folder}"
      model_config, tokenizer = read(folder)
      with keys.prefixed(f"{path}: "):
        chat.same_tokenizer(tokenizer, student[1])
      if model_config.vocab_size != student[0].vocab_size:
        raise InputError(f"{path} embeds {model_config.vocab_size} tokens and the student "
                         f"{student[0].vocab_size}: pad the smaller vocabulary to the larger.")
      tokens = hp.get("hint_tokens", config.prompt_tokens) + hp.sampling.max_tokens
      if tokens > model_config.max_positions:
        raise InputError(f"{path} has {model_config.max_positions} positions and a prompt with its "
                         f"response takes up to {tokens}: lower sampling.max_tokens.")


def chosen(path: str, hp: ConfigDict, task: Task, prompts: Sequence[Prompt],
           problems: Mapping[int, dict]) -> dict[int, str] | None:
  """{problem id: the role that guides it}; None for a stage with one guide.

  Args:
    path: names the stage's config; prompts: of the stage's split; problems: by id.

  Raises:
    InputError: a problem has no such value, or no problem has a value that a folder is for.
  """
  if "guides" not in hp:
    return None
  by = hp.guides.by
  of_folder = {value: role(folder) for value, folder in hp.guides.folders.items()}
  found = {}
  values = set()
  for prompt in prompts:
    problem = problems[prompt.id]
    value = problem.get(by)
    if by == "family" and task.family is not None:
      with (keys.prefixed(f"{path}.guides: "),
            from_user_code(f"the task's family of problem {prompt.id}")):
        value = task.family(problem)
    if not isinstance(value, str):
      raise InputError(f"{path}.guides.by is {by!r} and problem {prompt.id} has no such text: name "
                       "a text column that all problems have, or give the Task a `family`.")
    values.add(value)
    found[prompt.id] = of_folder.get(value, TEACHER)
  for value in of_folder:
    if value not in values:
      raise InputError(f"{path}.guides.folders has a guide for {value!r} and no problem has that "
                       f"{by}: choose from {', '.join(sorted(map(str, values)))}.")
  return found


def inputs(hp: ConfigDict, guide_of: Mapping[int, str] | None,
           identity: Callable[[str], str]) -> dict[str, str]:
  """All that guides add to the inputs of a stage's name; {} for a stage with one guide.

  Args:
    guide_of: as `chosen` returns it; None where the problems are not at hand.
    identity: role -> the name of its weights.
  """
  if "guides" not in hp:
    return {}
  if guide_of is None:
    return {"guides": manifest.digest(hp.guides.to_dict())}
  return {"guides": manifest.digest([(i, role and identity(role))
                                     for i, role in guide_of.items()])}


@dataclasses.dataclass(frozen=True, eq=False)
class _Shards:
  """One array in the memory of this process's host: the parts that its devices hold.

  No pytree, so that a tree of weights has one leaf for each, as a tree of arrays has.
  """
  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: jax.sharding.Sharding
  parts: dict[tuple, np.ndarray]   # by `_key`


def _key(index: tuple[slice, ...]) -> tuple:
  """An array's index in a form that can be a key of a dict."""
  return tuple((one.start, one.stop) for one in index)


def to_host(params: Params) -> Params:
  """The weights as `_Shards`, with shapes and layouts; shapes without weights stay as they are."""
  def moved(x: jax.Array | jax.ShapeDtypeStruct) -> _Shards | jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x
    # A copy: on a CPU the part is the device's own buffer.
    parts = {_key(part.index): np.array(jax.device_get(part.data))
             for part in x.addressable_shards}
    return _Shards(x.shape, x.dtype, x.sharding, parts)

  return jax.tree.map(moved, params)


def _to_device(params: Params) -> Params:
  """The weights of one guide on the devices, as they were before `to_host`."""
  return jax.tree.map(
      lambda x: sharding.from_callback(x.shape, x.sharding,
                                       lambda index: (x.parts[_key(index)], lambda shard: shard)),
      params)


def _microbatches(batch: Batch, role_B: np.ndarray, role: str, rows: int) -> Iterator[Batch]:
  """The rows of one guide in batches of `rows`, the last one filled with rows of weight 0."""
  mine_B = np.flatnonzero(role_B == role)
  for start in range(0, len(mine_B), rows):
    index_B = mine_B[start : start + rows]
    filled = np.concatenate([index_B, np.full(rows - len(index_B), index_B[0])])
    part = batch_rows(batch, filled)
    real_B1 = (np.arange(rows) < len(index_B))[:, None]
    yield part._replace(weight_BT=part.weight_BT * real_B1, count_BT=part.count_BT * real_B1)


def totals(programs: RoutedUpdate, guides: Mapping[str, Role], params: Params,
           non_trainable: Params | None, batch: Batch, role_B: np.ndarray) -> Totals:
  """The gradients and sums of a batch, of which each row is scored by a guide of its own.

  Args:
    guides: by role, their weights in the host's memory.
    params: that are trained; non_trainable: as `training.jit_update` takes them.
    batch: of the host; role_B: the role that guides each row.

  Returns:
    As `training.jit_totals`, for `programs.apply`.
  """
  mesh = sharding.current_mesh()
  total = None
  for role in sorted(set(role_B)):
    guide_params = _to_device(guides[role].params)
    for part in _microbatches(batch, role_B, role, programs.rows):
      found = programs.gradients[role](params, non_trainable, guide_params,
                                       sharding.put_batch(part, mesh))
      total = found if total is None else programs.add(total, found)
      del found  # or it would be in memory beside the next one
    # The next guide is placed after the last program that reads this one.
    jax.block_until_ready(total)
    del guide_params
  return total
