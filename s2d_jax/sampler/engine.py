"""The sampler's interface: checks of its arguments, compiling, and calls."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from s2d_jax import keys, sharding
from s2d_jax.models import Model
from s2d_jax.rollouts import Prompt, Rollout
from s2d_jax.sampler import programs
from s2d_jax.sampler.decode import Sampling, Weights
from s2d_jax.sampler.pages import PagedSchedule
from s2d_jax.sampler.programs import Room
from s2d_jax.sampler.scheduler import OnEnd, RowList, Schedule
from s2d_jax.sharding import Params

DEFAULT = Room()

# Turns token ids into text; a sampler needs it only to look for stop strings.
ToText = Callable[[np.ndarray], str]


def check_ends(sampling: Sampling, text: ToText | None) -> None:
  """Checks that stop strings can be looked for.

  Raises:
    ValueError: they are not a tuple of texts, one is empty, or `text` is missing.
  """
  strings = sampling.stop_strings
  if not isinstance(strings, tuple) or not all(isinstance(s, str) for s in strings):
    raise ValueError(f"stop_strings is {strings!r}: give a tuple of texts.")
  # The empty text is in every text.
  if "" in strings:
    raise ValueError("a stop string is empty, and would end every response: give it a text.")
  if sampling.stop_strings and text is None:
    raise ValueError("stop_strings are looked for in text and this sampler was given no tokenizer: "
                     "give it `text`, or use stop_ids.")


def check_room(room: Room) -> None:
  """Checks a Room's values.

  Raises:
    ValueError: a number is out of its range, or the cache is unknown or in pages of int8.
  """
  keys.check_values(room, Room.KEYS)
  # Pages have no array for int8's scales.
  if room.page and room.cache == "int8":
    raise ValueError(f"page is {room.page} and the cache int8, which pages do not hold: set one of "
                     "them to 0 or auto.")


def check_sampling(sampling: Sampling) -> None:
  """Raises ValueError, starting with a key's name, for a sampling block out of its ranges."""
  keys.check_values(sampling, Sampling.KEYS)
  # Each key's range is a table's; a relation between two keys is not in it.
  if sampling.min_tokens > sampling.max_tokens:
    raise ValueError(f"min_tokens is {sampling.min_tokens}: choose at most max_tokens, "
                     f"{sampling.max_tokens}.")


def check_memory(model: Model, sampling: Sampling, size: int, width: int, room: Room) -> None:
  """Checks that a Room's memory holds the longest row on the current mesh; compiles nothing.

  Args:
    model, sampling, size, width, room: as in `make`, which makes this check too.

  Raises:
    ValueError: not one row fits, or the mesh cannot split a cache in pages.
  """
  # The shapes are computed for their errors alone.
  dtype = programs.cache_type(model.config, room)
  programs.shapes(model.config, sampling, room, size * sampling.samples_per_prompt, width, dtype)


def check(prompts: Sequence[Prompt], sampling: Sampling, width: int,
          text: ToText | None = None) -> None:
  """Checks the prompts of a call and its stop strings.

  Raises:
    ValueError: there are no prompts; a prompt has no tokens, more than `width`, or the id of
      another one; or a stop string is empty or cannot be looked for without `text`.
  """
  check_ends(sampling, text)
  if not prompts:
    raise ValueError("there are no prompts to sample from: check the split's name and its size.")
  # One prompt may come several times, for several samples; its draws are named by its id.
  tokens = {}
  for prompt in prompts:
    if tokens.setdefault(prompt.id, prompt.tokens) != prompt.tokens:
      raise ValueError(f"two prompts have the id {prompt.id} and not the same tokens: give each an "
                       "id of its own.")
    if not len(prompt.tokens):
      raise ValueError(f"prompt {prompt.id} has no tokens, so nothing to continue: give its "
                       "problem a text.")
    if len(prompt.tokens) > width:
      raise ValueError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and its window is "
                       f"{width}: raise config.prompt_tokens or drop the problem.")


def make(model: Model, params: Params, sampling: Sampling, size: int, width: int,
         room: Room = DEFAULT, text: ToText | None = None) -> "Sampler":
  """Compiles a sampler of prompts of at most `width` tokens; nothing compiles later.

  Args:
    params: the model's weights, or their abstract arrays, laid out as they will be.
    size: prompts that are sampled side by side where memory suffices. A call may have any number.
    width: tokens of the longest prompt.
    text: ids -> str, for stop strings.

  Returns:
    A Sampler, which is called for each rollout.

  Raises:
    ValueError: the Room or the stop strings are refused, or not one row fits the memory.
  """
  return Sampler(model, params, sampling, size, width, room, text)


class Sampler:
  """A compiled sampler, made by `make`.

  Attributes:
    programs: the compiled programs.
    seen: counts over calls, until it is emptied. `dispatches`, `prefills` and `tokens` are numbers
      of each; `slot_tokens` are slots times steps, the cost of the tokens; `waited_again` are rows
      that lost their pages. `weights_bytes` and `weights_seconds` are of the weights' copy for
      decoding.
  """

  def __init__(self, model: Model, params: Params, sampling: Sampling, size: int, width: int,
               room: Room, text: ToText | None) -> None:
    check_room(room)
    check_ends(sampling, text)
    self.mesh = sharding.current_mesh()
    # Programs are cached by their arguments, so the weights' shapes are passed as hashable values.
    leaves, tree = jax.tree.flatten(sharding.abstract(params))
    self.programs = programs.build(
        model, sampling, room, size * sampling.samples_per_prompt, width, self.mesh, tree,
        tuple(leaves))
    self.sampling = sampling
    self.width = width
    self.text = text
    self.seen: dict[str, float] = {}

  def __call__(self, params: Params | Weights, prompts: Sequence[Prompt], seed: tuple[int, ...],
               first_sample: int = 0, weight_version: int = 0,
               ended: OnEnd | None = None) -> Rollout:
    """Samples every prompt `samples_per_prompt` times.

    Args:
      params: the model's weights, or lay_out(params), made once for weights that do not change.
      seed: ints; row (prompt id, sample index) depends on (seed…, prompt id, sample index) alone.
      first_sample: sample index of each prompt's first row.
      weight_version: a number that the Rollout carries.
      ended: called with (place, rollout) as rows end, while others still decode; the row at that
        place is complete.

    Returns:
      A Rollout, a prompt's samples side by side, in the order of `prompts`.

    Raises:
      ValueError: `check` refuses the prompts.
      FloatingPointError: a log-probability is not finite.
    """
    samples = range(first_sample, first_sample + self.sampling.samples_per_prompt)
    return self.rows(params, [(p, g) for p in prompts for g in samples], seed, weight_version,
                     ended)

  def rows(self, params: Params | Weights, wanted: RowList, seed: tuple[int, ...],
           weight_version: int = 0, ended: OnEnd | None = None) -> Rollout:
    """The Rollout of (prompt, sample index) pairs, in their order; see `__call__`.

    A prompt is read once if its samples stand side by side.
    """
    check([prompt for prompt, _ in wanted], self.sampling, self.width, self.text)
    # A schedule lives for one call: nothing but the programs and the counts is kept between calls.
    schedule = PagedSchedule if self.programs.room.page else Schedule
    return schedule(self, params, wanted, seed, weight_version).run(ended)

  def lay_out(self, params: Params) -> Weights:
    """The weights copied for decoding, which a call takes in place of `params`."""
    # Waits for the copy, so that `weights_seconds` is its time and the caller can free `params`.
    return jax.block_until_ready(self.programs.prepare(params))

  @property
  def compiled(self) -> jax.stages.Compiled:
    """The executable that decodes the largest batch to its longest."""
    # Its memory is the largest of all programs that decode, which is what preflight shows.
    return self.programs.decode[self.programs.shapes.batches[0], self.programs.shapes.lengths[-1]]

  def put(self, x: np.ndarray) -> jax.Array:
    """A host's array on the devices, whole on each."""
    return jax.device_put(x) if self.mesh is None else sharding.put(
        x, sharding.replicated(self.mesh))


def sample(model: Model, params: Params, prompts: Sequence[Prompt], sampling: Sampling,
           seed: tuple[int, ...], room: Room = DEFAULT, text: ToText | None = None) -> Rollout:
  """Compiles a sampler and samples every prompt once with it; arguments as in `make`.

  Returns:
    A Rollout of len(prompts) · samples_per_prompt rows.

  Raises:
    ValueError: no prompts, or stop strings without `text`.
  """
  width = max((len(p.tokens) for p in prompts), default=0)
  # Before compiling, which takes much longer than the check.
  check(prompts, sampling, width, text)
  return make(model, params, sampling, len(prompts), width, room, text)(params, prompts, seed)
