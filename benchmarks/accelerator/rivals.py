"""An update and decoding beside `transformers` and `torch.compile`, on our weights and tokens."""

import contextlib
import importlib.util
import json
import pathlib
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent import futures

import jax
import numpy as np

from benchmarks import measure, sampler, step
from benchmarks.accelerator.decoder import Decoder
from benchmarks.accelerator.learner import Learner, network
from benchmarks.accelerator.table import LEFT_OUT
from s2d_jax import ledger, models
from s2d_jax.models import hf

Json = measure.Json
Save = Callable[[str, Json], None]
LeaveOut = Callable[[str, Exception], None]  # takes the name of a rival
DECODING = "transformers"  # the rival of decoding, by its name for benchmarks.peers


def measure_all(sizes: Namespace, save: Save) -> None:
  """Times ours and each rival in turn, and stores a side's result as soon as it exists.

  A rival that is not ready in time, ends, or answers late is left out, and the result says why.

  Raises:
    ValueError: a rival has another loss on the same tokens. All is stored before.
  """
  if importlib.util.find_spec("torch") is None:
    save(LEFT_OUT, {"all rivals": "torch is not installed"})
    return
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
    scratch = pathlib.Path(folder)
    update = Update(sizes, scratch)
    decode = Decode(sizes, scratch)
    left_out: dict[str, str] = {}
    def leave_out(name: str, error: Exception) -> None:
      left_out[name] = str(error)
      save(LEFT_OUT, left_out)
    peers = started(update.commands(sizes) | decode.commands(), sizes.seconds, leave_out)
    for peer in peers.values():
      closing.callback(peer.close)
    update.time("ours", update.ask, save)
    decode.time("ours", decode.ask, save)
    for name in (*sizes.updates[:1], DECODING, *sizes.updates[1:]):
      if name not in peers:
        continue
      task = decode if name == DECODING else update
      task.time(name, asking(name, peers[name], task.line, leave_out), save)
      # Its memory is free before the next one takes its own.
      peers[name].close()
    update.check()


def started(commands: Mapping[str, list[str]], seconds: float,
            leave_out: LeaveOut) -> dict[str, measure.Peer]:
  """{name: Peer} of the rivals that are ready in time; all are started side by side."""
  with futures.ThreadPoolExecutor(len(commands)) as pool:
    starting = {name: pool.submit(measure.Peer, command, seconds)
                for name, command in commands.items()}
  peers = {}
  for name, peer in starting.items():
    try:
      peers[name] = peer.result()
    except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
      leave_out(name, error)
  return peers


def asking(name: str, peer: measure.Peer, line: Callable[[int], str],
           leave_out: LeaveOut) -> measure.Side:
  """The side of a rival, which is left out where it does not answer."""
  def ask(seed: int) -> Json:
    try:
      return peer.ask(line(seed))
    except (OSError, RuntimeError) as error:
      leave_out(name, error)
      # `alternate` goes on without a side that raises this.
      raise TimeoutError(str(error)) from error
  return ask


class Update:
  """An update of a model, here and by PyTorch."""

  def __init__(self, sizes: Namespace, scratch: pathlib.Path) -> None:
    self.sizes = sizes
    self.scratch = scratch
    self.runs: dict[str, list[Json]] = {}
    self.learner = Learner(sizes.update_shape, 0, sizes.block)
    config = self.learner.model.config
    batch = step.random_batch(config.vocab_size, sizes.update_rows, sizes.update_tokens)
    self.batch = self.learner.batch(sizes.update_rows, sizes.update_tokens)
    self.program = self.learner.lower(self.batch).compile()
    self.flops = 3 * ledger.forward_flops(config, [sizes.update_tokens] * sizes.update_rows)
    hf.save(str(scratch / "update"), self.learner.model, jax.device_get(self.learner.state.params))
    np.savez(scratch / "tokens.npz", inputs=batch.inputs_BT, targets=batch.targets_BT)

  def commands(self, sizes: Namespace) -> dict[str, list[str]]:
    """{name: command} of the rivals."""
    dtype = str(self.learner.model.config.dtype)
    module = [sys.executable, "-m", "benchmarks.peers.pytorch", str(self.scratch / "update"),
              str(self.scratch / "tokens.npz"), dtype]
    return {name: [*module, step.PEERS[name]] for name in sizes.updates}

  def ask(self, _: int) -> Json:
    """Makes an update; its loss stays on the device."""
    metrics, seconds = measure.stopwatch(
        lambda: jax.block_until_ready(self.learner.update(self.program, self.batch)))
    return {"seconds": seconds, "loss": metrics["loss"]}

  def line(self, _: int) -> str:
    """The request to a rival."""
    return "train"

  def time(self, name: str, ask: measure.Side, save: Save) -> None:
    """Times a side and stores it beside those before."""
    answers = measure.alternate({name: ask}, self.sizes.repeats, self.sizes.seconds)
    for side, runs in answers.items():
      self.runs[side] = [run | {"loss": float(run["loss"])} for run in runs]
    tokens = self.sizes.update_rows * self.sizes.update_tokens
    save("train", {side: step.summary(runs, tokens, self.flops,
                                      self.sizes.rates["flops_per_second"])
                   for side, runs in self.runs.items()})
    if name == "ours":
      # The rivals need the memory.
      del self.learner, self.batch, self.program

  def check(self) -> None:
    """Raises ValueError if a rival's loss differs from ours."""
    dtype = "bfloat16" if measure.on_accelerator() else "float32"
    step.check_equal("train", self.runs, dtype)


class Decode:
  """Samples of one prompt, here and by `generate`."""

  def __init__(self, sizes: Namespace, scratch: pathlib.Path) -> None:
    self.sizes = sizes
    self.scratch = scratch
    self.runs: dict[str, list[Json]] = {}
    model = network(sizes.decode_shape)
    self.config = model.config
    params = measure.weights(model, models.frozen_shapes)
    self.decoder = Decoder(model, params, sizes.decode_rows, sizes)
    self.weights = self.decoder.sampler.lay_out(params)
    self.workload = sampler.Workload([self.decoder.prompts[0].tokens], sizes.decode_rows,
                                     sizes.max_tokens, 1.0, (), sizes.decode_rows)
    hf.save(str(scratch / "decode"), model, params)
    (scratch / "workloads.json").write_text(json.dumps({"rows": self.workload._asdict()}),
                                            encoding="utf-8")

  def commands(self) -> dict[str, list[str]]:
    """{name: command} of the rival."""
    return {DECODING: [sys.executable, "-m", "benchmarks.peers.transformers_sampler",
                       str(self.scratch / "decode"), str(self.scratch / "workloads.json"),
                       str(self.config.dtype), DECODING]}

  def ask(self, seed: int) -> Json:
    """Samples every row."""
    _, seconds = self.decoder.dispatches(self.weights, seed)
    return {"seconds": seconds, "lengths": [self.sizes.max_tokens] * self.sizes.decode_rows}

  def line(self, seed: int) -> str:
    """The request to the rival."""
    return json.dumps({"workload": "rows", "seed": seed})

  def time(self, name: str, ask: measure.Side, save: Save) -> None:
    """Times a side and stores it beside those before."""
    self.runs |= measure.alternate({name: ask}, self.sizes.repeats, self.sizes.seconds)
    rates = self.sizes.rates
    save(f"decode_{self.sizes.decode_rows}", {
        side: sampler.summary(self.config, self.workload, runs,
                              (rates["flops_per_second"], rates["bytes_per_second"]))
        for side, runs in self.runs.items()})
    if name == "ours":
      # The rivals need the memory.
      del self.decoder, self.weights
