"""The sampler's interface: it checks its arguments, compiles, and runs a schedule for each call."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from s2d_jax import hosts, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.models import Model
from s2d_jax.rollouts import OnFinish, Prompt, Rollout, SamplerStats
from s2d_jax.sampler import capacity, programs
from s2d_jax.sampler.capacity import SamplerConfig
from s2d_jax.sampler.decode import Weights
from s2d_jax.sampler.programs import RUN_COMPILER, Compiler
from s2d_jax.sampler.sampling import Decode, Sampling, check_sampling
from s2d_jax.sampler.scheduler import Request, Schedule
from s2d_jax.sampler.stop_strings import StopDetector
from s2d_jax.sharding import Params

DEFAULT = SamplerConfig()


class Sampler:
  """A compiled sampler: a call samples prompts; nothing compiles later.

    sampler = Sampler(model, Sampling(max_tokens=512), batch=32, prompt_tokens=128)
    rollout, stats = sampler(params, prompts, seed=(0, step))

  Attributes:
    programs: the compiled programs (`programs.Programs`).
  """

  def __init__(self, model: Model, sampling: Sampling, batch: int, prompt_tokens: int,
               config: SamplerConfig = DEFAULT, decode: Decode | None = None,
               params: Params | None = None,
               compiler: Compiler = RUN_COMPILER) -> None:
    """Compiles on the current mesh.

    Args:
      batch: prompts that are sampled side by side where memory suffices. A call may have any
        number.
      prompt_tokens: of the longest prompt.
      decode: token ids -> text, for stop strings.
      params: weights, or their abstract arrays, of the dtypes and layouts that calls will have; by
        default those of `hf.load`: float32, laid out as the trainer's.
      compiler: how, and of which sizes, the programs are compiled.

    Raises:
      InputError: a field of the sampling or of the config is refused. `capacity.Unfit`, which is
        one: not one row fits the memory. The message begins with the field's name.
    """
    check_sampling(sampling)
    capacity.check_config(config)
    if sampling.stop_strings and decode is None:
      raise InputError("stop_strings are looked for in text, and this sampler has no tokenizer: "
                       "give it `decode`, or use stop_ids.")
    mesh = sharding.current_mesh()
    if params is None:
      params = (models.shapes(model.config) if mesh is None
                else models.laid_out(model.config, mesh))
    self.abstract_params = sharding.abstract(params)
    # A caller that holds other arrays beside the weights has computed what is left.
    if config.available is None:
      config = programs.fitted(config, model, params, hosts.device_memory(),
                               sharding.device_bytes(self.abstract_params))
    # Programs are cached by their arguments, so the weights' shapes are passed as hashable values.
    leaves, tree = jax.tree.flatten(self.abstract_params)
    self.programs = programs.build(model, sampling, config, batch * sampling.samples_per_prompt,
                                   prompt_tokens, mesh, tree, tuple(leaves), compiler)
    self.sampling = sampling
    self.prompt_tokens = prompt_tokens
    self.decode = decode

  def __call__(self, params: Params | Weights, prompts: Sequence[Prompt], seed: tuple[int, ...],
               weight_version: int = 0, first_sample: int = 0,
               on_finish: OnFinish | None = None) -> tuple[Rollout, SamplerStats]:
    """Samples every prompt `samples_per_prompt` times.

    Args:
      params: the model's weights, or lay_out(params), computed once for weights that do not change.
      seed: ints; row (prompt id, sample index) depends on (seed…, prompt id, sample index) alone.
      weight_version: a number that the Rollout carries.
      first_sample: sample index of each prompt's first row.
      on_finish: called with (index, rollout) as rows end, while others still decode; the row at
        that index is complete.

    Returns:
      (rollout, stats): a prompt's samples side by side, in the order of `prompts`; and what the
      call did.

    Raises:
      InputError: `check_prompts` refuses the prompts, or the weights have other shapes.
      FloatingPointError: a log-probability is not finite.
    """
    samples = range(first_sample, first_sample + self.sampling.samples_per_prompt)
    requests = [(prompt, sample) for prompt in prompts for sample in samples]
    return self.sample_rows(params, requests, seed, weight_version, on_finish)

  def sample_rows(self, params: Params | Weights, requests: Sequence[Request],
                  seed: tuple[int, ...], weight_version: int = 0,
                  on_finish: OnFinish | None = None) -> tuple[Rollout, SamplerStats]:
    """Samples (prompt, sample index) pairs, in their order; see `__call__`.

    A prompt is read once if its samples stand side by side.
    """
    check_prompts([prompt for prompt, _ in requests], self.prompt_tokens)
    rollout = _empty_rollout(requests, self.prompt_tokens, self.sampling.max_tokens, weight_version)
    stops = StopDetector(self.sampling.stop_strings, self.sampling.min_tokens, self.decode)
    # A schedule lives for one call: nothing but the programs is kept between calls. It is built
    # before the weights are laid out, because its constructor compares the processes, and laying
    # out is the first program that they run together.
    schedule = Schedule(self.programs, self.sampling, stops, requests, seed, rollout)
    start = time.monotonic()
    weights = params if isinstance(params, Weights) else self.lay_out(params)
    seconds = time.monotonic() - start
    stats = schedule.run(weights, on_finish)
    weights_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
    return rollout, stats._replace(weights_bytes=weights_bytes, weights_seconds=seconds)

  def lay_out(self, params: Params) -> Weights:
    """The weights copied for decoding, which a call takes in place of `params`.

    Raises:
      InputError: they are not of the shapes and dtypes that the sampler was compiled for.
    """
    self._check_weights(params)
    # Waits for the copy, so that its time is the copy's and the caller can free `params`.
    return jax.block_until_ready(self.programs.prepare(params))

  def _check_weights(self, params: Params) -> None:
    """Refuses weights of other shapes or dtypes; the compiled program would name neither."""
    if jax.tree.structure(params) != jax.tree.structure(self.abstract_params):
      raise InputError("params are not the parameters of the sampler's model: pass those of the "
                       "model that it was compiled for.")
    for (path, x), want in zip(jax.tree.leaves_with_path(params),
                               jax.tree.leaves(self.abstract_params), strict=True):
      if (x.shape, x.dtype) != (want.shape, want.dtype):
        raise InputError(f"params{jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)} and the "
                         f"sampler was compiled for {want.dtype}{list(want.shape)}: give "
                         "Sampler(…, params=…) the weights, or shapes like theirs.")

  @property
  def decode_program(self) -> jax.stages.Compiled:
    """The executable that decodes the largest batch to its longest."""
    # Its memory is the largest of all programs that decode, which is what preflight shows.
    return self.programs.decode[self.programs.shapes.batches[0], self.programs.shapes.lengths[-1]]


def check_prompts(prompts: Sequence[Prompt], prompt_tokens: int) -> None:
  """Checks the prompts of a call.

  Raises:
    InputError: there are none; or one has no tokens, more than `prompt_tokens`, or the id of
      another one.
  """
  if not prompts:
    raise InputError("there are no prompts to sample from: check the split's name and its size.")
  # One prompt may come several times, for several samples; its samples are named by its id.
  tokens: dict[int, tuple[int, ...]] = {}
  for prompt in prompts:
    if tokens.setdefault(prompt.id, prompt.tokens) != prompt.tokens:
      raise InputError(f"two prompts have the id {prompt.id} and not the same tokens: give each an "
                       "id of its own.")
    if not len(prompt.tokens):
      raise InputError(f"prompt {prompt.id} has no tokens, so nothing to continue: give its "
                       "problem a text.")
    if len(prompt.tokens) > prompt_tokens:
      raise InputError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and prompt_tokens is "
                       f"{prompt_tokens}: raise it, or drop the problem.")


def check_memory(model: Model, sampling: Sampling, batch: int, prompt_tokens: int,
                 config: SamplerConfig) -> None:
  """Checks that the memory holds the longest row on the current mesh; compiles nothing.

  Args are those of `Sampler`, which makes this check too.

  Raises:
    capacity.Unfit: not one row fits, or the mesh cannot split a cache in pages.
  """
  # The shapes are computed for their errors alone.
  capacity.shapes(model.config, sampling, config, batch * sampling.samples_per_prompt,
                  prompt_tokens)


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
  """Puts a model's name before the sentence of a FloatingPointError that is raised within."""
  try:
    yield
  except FloatingPointError as error:
    raise FloatingPointError(f"{model}: {error}") from error


def _empty_rollout(requests: Sequence[Request], prompt_tokens: int, max_tokens: int,
                   weight_version: int) -> Rollout:
  """A Rollout with the prompts of the rows and no response tokens yet."""
  B = len(requests)
  T = max_tokens
  prompt_BT = np.zeros((B, prompt_tokens), np.int32)
  for b, (prompt, _) in enumerate(requests):
    prompt_BT[b, : len(prompt.tokens)] = prompt.tokens
  return Rollout(
      prompt_id_B=np.array([prompt.id for prompt, _ in requests], np.int64),
      sample_index_B=np.array([sample for _, sample in requests], np.int32),
      prompt_BT=prompt_BT,
      prompt_length_B=np.array([len(prompt.tokens) for prompt, _ in requests], np.int32),
      response_BT=np.zeros((B, T), np.int32),
      response_length_B=np.zeros(B, np.int32),
      sampler_logp_BT=np.zeros((B, T), np.float32),
      behaviour_logp_BT=np.zeros((B, T), np.float32),
      finish_reason_B=np.zeros(B, np.int32),
      weight_version=weight_version)
