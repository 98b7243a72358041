"""`s2d-jax preflight`: compiles a config's programs ahead of time and prints what memory they need.

Needs the two model folders' config.json and tokenizer, no weights, no data and, with `--topology`
(needs libtpu), no chip. Memory is the compiled program's own account, per device.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.stages import Compiled
from ml_collections import ConfigDict

from s2d_jax import (
  chat,
  command,
  compiling,
  doctor,
  evals,
  keys,
  models,
  objectives,
  planning,
  recipe,
  sampler,
  sharding,
  stage,
  sweep,
  training,
)
from s2d_jax.compiling import Role, Samplers
from s2d_jax.losses.agreement import agreement
from s2d_jax.models import hf

_EXAMPLE = "s2d-jax preflight --config=configs/arithmetic.py:tiny --topology=v5e:2x2"


class _Cost(NamedTuple):
  """The memory of one program on each device, in bytes."""
  stage: str
  program: str
  arguments: int
  temporaries: int
  output: int  # beyond what reuses the arguments' memory


def abstract_role(config: ConfigDict, role: str, mesh: Mesh,
                  shapes: Callable = models.frozen_shapes) -> Role:
  """A base model with the types, shapes and layouts of its weights, from its config.json alone."""
  model = models.get(hf.read_json(config[role]), **{key: config[key] for key in models.RUN})
  return Role(model, models.laid_out(model.config, mesh, shapes))


def costs(config: ConfigDict) -> Iterator[_Cost]:
  """Yields a _Cost for every program of every stage and score of a config, on the current mesh."""
  table = {row.name: row for row in recipe.STAGES}
  mesh = sharding.current_mesh()
  # The doctor first: it takes seconds, and a wrong config would waste minutes of compilation.
  doctor.check_config(config, table)
  samplers = compiling.samplers(config, chat.Chat(config.student, **config.template))
  # The base models stand for every role: a stage's weights have the shapes of its base's.
  bases = {"teacher": "teacher", "student": "student"}
  for name, hp in config.stages.items():
    if hp.steps == 0:  # left out
      continue
    row = table[name]
    stage_models = stage.load_models(
        row, hp, planning.parents(row, hp, bases),
        lambda role, shapes: abstract_role(config, role, mesh, shapes),
        lambda model: models.split(model.config, models.laid_out(model.config, mesh))[0])
    optimizer = stage.optimizer(hp, stage_models.learner.model.config)
    programs = compiling.compile_programs(stage_models, hp, row.objective, objectives.logp,
                                          optimizer, samplers)
    # Listed in the order in which a step runs them.
    found = {"update": programs.update}
    if programs.token_logps is not None:
      found = {"token_logps": programs.token_logps, **found}
    if programs.pass_rate_sampler is not None:
      found = {**_sampling("pass rates", programs.pass_rate_sampler), **found}
    if programs.sampler is not None:
      found = {**_sampling("sample", programs.sampler), **found}
    for program, compiled in found.items():
      yield _cost(name, program, compiled)
  yield from _scoring(config, mesh, samplers)


def _sampling(name: str, compiled_sampler: sampler.Sampler) -> dict[str, Compiled]:
  """A sampler's two large programs: decoding the largest batch at its longest, and prefill."""
  # Smaller batches and shorter caches need less, so these two bound the memory of the others.
  return {name: compiled_sampler.decode_program,
          f"{name} prefill": compiled_sampler.programs.prefill}


def _cost(stage: str, program: str, compiled: Compiled) -> _Cost:
  # Donated arguments hold a part of the output, which must not be counted twice.
  memory = compiled.memory_analysis()
  return _Cost(stage, program, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
               memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _scoring(config: ConfigDict, mesh: Mesh, samplers: Samplers) -> Iterator[_Cost]:
  """Costs of what scores either model: each evaluation, and the probe."""
  roles = {role: abstract_role(config, role, mesh) for role in ("teacher", "student")}
  def sampling(block, size, program, **change):
    for role in roles:
      compiled_sampler = samplers.compile(roles[role], block.sampling, size, **change)
      yield from _sampling(f"{role}{program}", compiled_sampler).items()
  found = {}
  for name, hp in config.evals.items():
    found[name] = [cost for way, change in evals.ways(hp).items()
                   for cost in sampling(hp, evals.batch(hp), f" {way}".replace(" sampled", ""),
                                        **change)]
  if config.probe.problems:
    found["probe"] = [*sampling(config.probe, config.probe.prompts, ""), ("both", _compare(
        config, roles, mesh))]
  for block, programs in found.items():
    for program, compiled in programs:
      yield _cost(block, program, compiled)


def _compare(config: ConfigDict, roles: dict[str, Role], mesh: Mesh) -> Compiled:
  """The program that compares a probe's two models on the same tokens."""
  hp = config.probe
  student = roles["student"]
  teacher = roles["teacher"]
  rows = hp.prompts * hp.sampling.samples_per_prompt
  # Both models are scored in one program, so their memory is needed at the same time.
  batch = compiling.abstract_batch(rows, config.prompt_tokens + hp.sampling.max_tokens - 1, mesh)
  compared = training.compare(student.model, teacher.model, agreement, hp)
  return compared.lower(*(sharding.abstract(role.params) for role in (student, teacher)),
                        batch).compile()


def main(argv: Sequence[str]) -> None:
  """`s2d-jax preflight`: prints the table of a config's programs."""
  parser = command.config_parser(
      "preflight", "Compiles every program of a config and prints the memory it needs.", _EXAMPLE)
  parser.add_argument("--topology", metavar="v5e:4x4",
                      help="a TPU to compile for that is not here; needs libtpu")
  config, args = command.parse_config(parser, argv)
  show(config, args.topology)


def show(config: ConfigDict, topology: str | None = None) -> None:
  """Prints a line per program: bytes of arguments, temporaries and outputs on each device."""
  devices = None
  if topology:
    from jax.experimental import topologies  # needs libtpu, which only this option asks for
    # A cached program cannot be read back without a chip: it would be a warning each.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  with keys.prefixed("config."):
    mesh = sharding.make_mesh(config.mesh, devices)
  with jax.set_mesh(mesh):
    print("bytes on each device")
    print(f"{'stage':<16}{'program':<20}{'arguments':>14}{'temporaries':>14}{'output':>14}")
    # Flushed line by line, because a large program takes minutes to compile.
    printed = set()
    for one in sweep.expand(config):
      for cost in costs(one):
        if cost not in printed:  # runs of a sweep share programs
          printed.add(cost)
          print(f"{cost.stage:<16}{cost.program:<20}{cost.arguments:>14,}"
                f"{cost.temporaries:>14,}{cost.output:>14,}", flush=True)


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
