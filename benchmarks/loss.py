"""Seconds and temporaries of losses and their gradients: block by block, on all logits, and TRL's.

  python -m benchmarks.loss [--tokens=1024,2048,4096,8192] [--trl=PYTHON]
  python -m benchmarks.loss --topology=v5p:2x2x1 --dtype=bfloat16    (compiles, for a TPU; libtpu)

Times are measured at the sizes `width`, `guide_width` and `vocab`: all numbers of tokens in one
run, the implementations in turn. `--trl` names the Python of an environment that has TRL
(`peers/README.md`). Memory is the compiler's account at the sizes `memory_*`. Those programs are
compiled and not run, so the sizes may exceed this machine. `beyond_gradient_bytes` are the
temporaries without one float32 gradient of the unembedding.
"""

import json
import pathlib
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from s2d_jax import sharding
from s2d_jax.losses import blockwise, kl, tokens
from s2d_jax.losses.blockwise import Head

FULL = {"tokens": "1024,2048,4096,8192", "width": 256, "guide_width": 512, "vocab": 32_000,
        "block": 512, "repeats": 5, "seconds": 3600.0, "peak": 4096, "trl": "", "topology": "",
        "dtype": "float32",
        "memory_tokens": "4096,8192,16384", "memory_width": 2048, "memory_guide_width": 4096,
        "memory_vocab": 151_936, "memory_blocks": "64,128,256,512,1024"}
SMOKE = FULL | {"tokens": "8,16", "width": 8, "guide_width": 16, "vocab": 32, "block": 4,
                "repeats": 1, "peak": 16, "memory_tokens": "8,16", "memory_width": 8,
                "memory_guide_width": 16, "memory_vocab": 32, "memory_blocks": "2,4"}
parse = measure.parser(__doc__, FULL, SMOKE)


# loss(student_head, guide_head, targets_BT): the sum over all tokens
Loss = Callable[[Head, Head, jax.Array], jax.Array]


def logits(head: Head) -> jax.Array:
  """The logits of all tokens: [B, T, V] float32."""
  return jnp.einsum("BTD,VD->BTV", head.features_BTD,
                    head.weight_VD.astype(head.features_BTD.dtype),
                    preferred_element_type=jnp.float32)


def losses(block: int) -> dict[str, dict[str, Loss]]:
  """{loss: {implementation: function}}; `block` is the number of tokens of a block."""
  def nll(student_BTV: jax.Array, _: None, targets_BT: jax.Array) -> jax.Array:
    return tokens.negative_log_likelihood(student_BTV, targets_BT)
  def of_targets(student: Head, _: Head, targets_BT: jax.Array) -> jax.Array:
    weight_BT = jnp.ones(targets_BT.shape, jnp.float32)
    return blockwise.divergence(nll, student, None, weight_BT, block, targets_BT)[0]
  def of_guide(f: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss:
    def total(student: Head, guide: Head, targets_BT: jax.Array) -> jax.Array:
      weight_BT = jnp.ones(targets_BT.shape, jnp.float32)
      return blockwise.divergence(f, student, guide, weight_BT, block)[0]
    return total
  def half(student_BTV: jax.Array, guide_BTV: jax.Array) -> jax.Array:
    return kl.jsd(student_BTV, guide_BTV, 0.5)
  return {
      "negative_log_likelihood": {
          "blockwise": of_targets,
          "logp": lambda s, g, targets_BT: -blockwise.logp(s, targets_BT, block)[0].sum(),
          "direct": lambda s, g, targets_BT: nll(logits(s), None, targets_BT).sum()},
      **{name: {"blockwise": of_guide(f), "direct": lambda s, g, targets_BT, f=f: f(
          logits(s), logits(g)).sum()}
         for name, f in (("forward_kl", kl.forward_kl), ("reverse_kl", kl.reverse_kl),
                         ("jsd", half))}}


def arrays(sizes: Namespace, count: int) -> tuple[Head, Head, np.ndarray]:
  """Random (student head, guide head, targets) of `count` tokens; logits are of order one."""
  rng, dtype = np.random.default_rng(0), jnp.dtype(sizes.dtype)
  def head(width: int) -> Head:
    return Head(rng.normal(size=(1, count, width)).astype(dtype),
                (rng.normal(size=(sizes.vocab, width)) * width**-0.5).astype(dtype))
  return (head(sizes.width), head(sizes.guide_width),
          rng.integers(0, sizes.vocab, (1, count)).astype(np.int32))


def timed(sizes: Namespace, count: int) -> tuple[dict[str, measure.Json], dict[str, measure.Json]]:
  """Returns ({loss: {implementation: times}} of `count` tokens, {rival: versions}).

  The implementations of a loss run in turn, and must agree.
  """
  student, guide, targets_BT = arrays(sizes, count)
  found = {}
  with tempfile.TemporaryDirectory() as scratch:
    trl = None
    if sizes.trl:
      path = f"{scratch}/arrays.npz"
      heads = {"student": student.features_BTD[0], "student_weight": student.weight_VD,
               "guide": guide.features_BTD[0], "guide_weight": guide.weight_VD}
      np.savez(path, **{name: x.astype(np.float32) for name, x in heads.items()})
      trl = measure.Peer([sizes.trl, "benchmarks/peers/trl_losses.py", path, sizes.dtype],
                         sizes.seconds)
    placed = jax.device_put((student, guide, targets_BT))
    try:
      for name, ways in losses(sizes.block).items():
        programs = {way: jax.jit(jax.value_and_grad(f)).lower(*placed).compile()
                    for way, f in ways.items()}
        sides = {way: Ours(program, placed) for way, program in programs.items()}
        # TRL's generalised JSD is the forward KL at beta 0 and the reverse KL at 1.
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}.get(name)
        if trl is not None and beta is not None:
          rivals = ["trl_chunked"] + ["trl"] * (sizes.dtype == "float32")
          sides |= {way: lambda _, way=way, beta=beta: trl.ask(
              json.dumps({"way": way, "beta": beta})) for way in rivals}
        runs = measure.alternate(sides, sizes.repeats, sizes.seconds)
        for way in programs:
          runs[way][0] |= sides[way].read()
        found[name] = {way: summary(answers) for way, answers in runs.items()}
        check_equal(name, {way: answers[0] for way, answers in runs.items()}, sizes.dtype)
    finally:
      if trl is not None:
        trl.close()
  return found, {} if trl is None else {"trl": trl.versions}


class Ours:
  """A compiled loss; a call runs it once."""

  def __init__(self, program: jax.stages.Compiled, placed: tuple[Head, Head, jax.Array]) -> None:
    self.program = program
    self.placed = placed
    self.first: tuple[jax.Array, tuple[Head, Head]] | None = None

  def __call__(self, _: int) -> measure.Json:
    """Its seconds; the first run's loss and gradients stay on the device for `read`."""
    result, seconds = measure.stopwatch(
        lambda: jax.block_until_ready(self.program(*self.placed)))
    self.first = self.first or result
    return {"seconds": seconds}

  def read(self) -> measure.Json:
    """The loss and the norms of its gradients, fetched after all repeats and not between them."""
    loss, grads = self.first
    return {"loss": float(loss), "gradients": [float(np.linalg.norm(x.astype(np.float64)))
                                               for x in jax.device_get(grads)]}


def summary(runs: Sequence[measure.Json]) -> measure.Json:
  """Medians of the runs after the first, with the first run's loss and gradient norms."""
  seconds = [run["seconds"] for run in runs[1:]]
  return {"seconds": statistics.median(seconds), "repeats": seconds, "first": runs[0]["seconds"],
          "loss": runs[0]["loss"], "gradients": runs[0]["gradients"]}


# A gradient in bfloat16 has 8 bits: its norm is off by 4e-5 for 1,024 tokens and by 8e-4 for 16.
# `trl` is left out there: it rounds every logit and log-probability too, and its JSD is 4 % off.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


def check_equal(name: str, ways: Mapping[str, measure.Json], dtype: str) -> None:
  """Raises ValueError if the loss or a gradient's norm of two implementations differs."""
  want = ways["direct"]
  for way, got in ways.items():
    pairs = zip([got["loss"], *got["gradients"]], [want["loss"], *want["gradients"]], strict=True)
    if any(abs(a - b) > TOLERANCE[dtype] * abs(b) for a, b in pairs):
      raise ValueError(f"{way} of {name} has {got} and direct {want}: time only equal losses.")


def compiled_memory(sizes: Namespace, count: int, block: int,
                    where: jax.sharding.Sharding) -> dict[str, int]:
  """Compiled memory of reverse KL and its gradients at the large sizes; block 0 is direct."""
  dtype = jnp.dtype(sizes.dtype)
  def head(width: int) -> Head:
    return Head(jax.ShapeDtypeStruct((1, count, width), dtype, sharding=where),
                jax.ShapeDtypeStruct((sizes.memory_vocab, width), dtype, sharding=where))
  targets = jax.ShapeDtypeStruct((1, count), jnp.int32, sharding=where)
  f = losses(block or 1)["reverse_kl"]["blockwise" if block else "direct"]
  program = jax.jit(jax.value_and_grad(f)).lower(
      head(sizes.memory_width), head(sizes.memory_guide_width), targets).compile()
  account = measure.memory(program)
  # The float32 gradient is the output, or a temporary that is rounded to an output of its own.
  gradient = 0 if dtype == jnp.float32 else 4 * sizes.memory_vocab * sizes.memory_width
  beyond = account["temporary_bytes"] - (gradient if block else 0)
  return account | {"beyond_gradient_bytes": beyond}


def one_device_mesh(topology: str) -> jax.sharding.Mesh:
  """A mesh of one device of a topology to compile for, or of this machine if it is ""."""
  if not topology:
    return sharding.make_mesh()
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  return sharding.make_mesh((1, 1, 1), devices[:1])


def run(sizes: Namespace, mesh: jax.sharding.Mesh,
        save: Callable[[measure.Json], Any]) -> measure.Json:
  """Memory at the large sizes, and seconds at the small ones unless a topology is compiled for."""
  where = sharding.replicated(mesh)
  counts = [int(text) for text in sizes.memory_tokens.split(",")]
  blocks = [int(text) for text in sizes.memory_blocks.split(",")]
  middle = counts[len(counts) // 2]
  middle_block = blocks[len(blocks) // 2]
  # Every block size at one number of tokens, and the other numbers at one block size.
  pairs = [(middle, block) for block in blocks]
  pairs += [(count, middle_block) for count in counts if count != middle]
  memory = {f"{count} tokens, block {block}": compiled_memory(sizes, count, block, where)
            for count, block in pairs}
  memory[f"{middle} tokens, direct"] = compiled_memory(sizes, middle, 0, where)
  if sizes.topology:
    return {"memory": memory}
  peak = measure.matmul_peak(sizes.peak, sizes.repeats, sizes.dtype)
  found = {"memory": memory, "time": {}, "peers": {}, "matmul_peak": peak}
  for count in sizes.tokens.split(","):
    found["time"][count], found["peers"] = timed(sizes, int(count))
    # Products: the student's logits once and two for its gradients, the guide's once.
    for name, row in found["time"][count].items():
      guided = 0 if name == "negative_log_likelihood" else sizes.guide_width
      flops = 2 * int(count) * sizes.vocab * (3 * sizes.width + guided)
      for way in row.values():
        way["share_of_peak"] = flops / way["seconds"] / peak["flops_per_second"]
    save(found)
  return found


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Measures, writes the JSON and returns its path."""
  options = parse(argv)
  mesh = one_device_mesh(options.sizes.topology)
  with jax.set_mesh(mesh):
    kind = options.sizes.topology.partition(":")[0]
    found = run(options.sizes, mesh, lambda found: measure.save("loss", options, found, kind))
    return measure.write("loss", options, found, kind)


if __name__ == "__main__":
  main()
