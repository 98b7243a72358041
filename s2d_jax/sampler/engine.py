"""A sampler: what it refuses, what is compiled for it, and the calls that are made of it."""

import jax

from s2d_jax import keys, sharding
from s2d_jax.sampler import programs
from s2d_jax.sampler.decode import Sampling
from s2d_jax.sampler.pages import PagedSchedule
from s2d_jax.sampler.programs import Room
from s2d_jax.sampler.scheduler import Schedule

DEFAULT = Room()


def check_ends(sampling, text):
  """Refuses stop strings that cannot be looked for.

  Raises:
    ValueError: they are no tuple of texts, one is empty, or there is nobody to turn ids into text.
  """
  strings = sampling.stop_strings
  if not isinstance(strings, tuple) or not all(isinstance(s, str) for s in strings):
    raise ValueError(f"stop_strings is {strings!r}: give a tuple of texts.")
  if "" in strings:
    raise ValueError("a stop string is empty, and would end every response: give it a text.")
  if sampling.stop_strings and text is None:
    raise ValueError("stop_strings are looked for in text and this sampler was given no tokenizer: "
                     "give it `text`, or use stop_ids.")


def check_room(room):
  """Refuses a Room that no device could be used by.

  Raises:
    ValueError: a number out of its range, an unknown cache, or pages of int8.
  """
  keys.check_values(room, Room.KEYS)
  if room.page and room.cache == "int8":
    raise ValueError(f"page is {room.page} and the cache int8, which pages do not hold: set one of "
                     "them to 0 or auto.")


def check_sampling(sampling):
  """Raises ValueError, starting with a key's name, for a sampling block out of its ranges."""
  keys.check_values(sampling, Sampling.KEYS)
  if sampling.min_tokens > sampling.max_tokens:
    raise ValueError(f"min_tokens is {sampling.min_tokens}: choose at most max_tokens, "
                     f"{sampling.max_tokens}.")


def check_memory(model, sampling, size, width, room):
  """Refuses a Room that holds no row of so many tokens on the current mesh, as `make` would.

  Args: as `make` takes them; nothing is compiled.

  Raises:
    ValueError: not one row fits, or a cache in pages does not lie on the mesh.
  """
  dtype = programs.cache_type(model.config, room)
  programs.shapes(model.config, sampling, room, size * sampling.samples_per_prompt, width, dtype)


def check(prompts, sampling, width, text=None):
  """Refuses what cannot be sampled, by name, before any device is asked.

  Raises:
    ValueError: no prompts, a prompt without tokens, with more than `width` or with another's id, or
      stop strings that are empty or have nobody to turn ids into text.
  """
  check_ends(sampling, text)
  if not prompts:
    raise ValueError("there are no prompts to sample from: check the split's name and its size.")
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


def make(model, params, sampling, size, width, room=DEFAULT, text=None):
  """Compiles a sampler of prompts of at most `width` tokens; nothing compiles later.

  Args:
    model: a Model; params: its weights, or their abstract arrays, laid out as they will be.
    sampling: a Sampling.
    size: prompts that are sampled side by side where memory suffices; any number may be asked for.
    width: tokens of the longest prompt.
    room: a Room.
    text: ids -> str, for stop strings.

  Returns:
    draw(params, prompts, seed, first_sample=0, weight_version=0, ended=None) -> Rollout, its rows a
    prompt's samples side by side, in the order of `prompts`. `seed` is a tuple of ints; row (prompt
    id, sample index) draws from (seed…, prompt id, sample index) and from nothing else.
    ended(place, rollout) is called as rows end, while others still decode; that row is whole.
    For a model that stays as it is, params may be draw.lay_out(params), made once.
    `draw.programs` is what was compiled. `draw.seen` counts over calls, until it is emptied:
    dispatches, prefills, tokens, slot_tokens (slots times steps, what was paid for the tokens),
    waited_again (rows, of pages), and weights_bytes and weights_seconds, laying the weights out for
    decoding.
  """
  return Sampler(model, params, sampling, size, width, room, text)


class Sampler:
  """What `make` returns."""

  def __init__(self, model, params, sampling, size, width, room, text):
    check_room(room)
    check_ends(sampling, text)
    self.mesh = sharding.current_mesh()
    leaves, tree = jax.tree.flatten(sharding.abstract(params))
    self.programs = programs.build(
        model, sampling, room, size * sampling.samples_per_prompt, width, self.mesh, tree,
        tuple(leaves))
    self.sampling, self.width, self.text, self.seen = sampling, width, text, {}

  def __call__(self, params, prompts, seed, first_sample=0, weight_version=0, ended=None):
    samples = range(first_sample, first_sample + self.sampling.samples_per_prompt)
    return self.rows(params, [(p, g) for p in prompts for g in samples], seed, weight_version,
                     ended)

  def rows(self, params, wanted, seed, weight_version=0, ended=None):
    """The Rollout of (prompt, sample index) pairs, best a prompt's side by side."""
    check([prompt for prompt, _ in wanted], self.sampling, self.width, self.text)
    schedule = PagedSchedule if self.programs.room.page else Schedule
    return schedule(self, params, wanted, seed, weight_version).run(ended)

  def lay_out(self, params):
    """The decode.Weights of parameters: what a call makes of them, and takes in their place."""
    return jax.block_until_ready(self.programs.prepare(params))

  @property
  def compiled(self):
    """The executable that decodes the largest batch to its longest."""
    return self.programs.decode[self.programs.shapes.batches[0], self.programs.shapes.lengths[-1]]

  def put(self, x):
    """A host's array on the devices, whole on each."""
    return jax.device_put(x) if self.mesh is None else sharding.put(
        x, sharding.replicated(self.mesh))


def sample(model, params, prompts, sampling, seed, room=DEFAULT, text=None):
  """Samples every prompt: `make` then draw, for when compiling once does not matter.

  Args:
    model: a Model; params: its weights; prompts: list of rollouts.Prompt; sampling: a Sampling.
    seed: a tuple of ints; room, text: as `make` takes them.

  Returns:
    A Rollout of len(prompts) · samples_per_prompt rows.

  Raises:
    ValueError: no prompts, or stop strings without `text`.
  """
  width = max((len(p.tokens) for p in prompts), default=0)
  check(prompts, sampling, width, text)
  return make(model, params, sampling, len(prompts), width, room, text)(params, prompts, seed)
