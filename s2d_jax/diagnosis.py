"""`s2d-jax doctor`: checks a config before a chip is rented, and prints what it leads to."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from s2d_jax import command, recipe, sweep, tasks

EXAMPLE = "s2d-jax doctor --config=configs/arithmetic.py"


def main(argv: Sequence[str]) -> None:
  """Prints the diagnosis of a config.

  Raises:
    ValueError: the first thing that is wrong.
  """
  parser = command.config_parser(
      "doctor", "Checks a config, its models, tokenizers and data; writes nothing.", EXAMPLE)
  config, _ = command.parse_config(parser, argv)
  print(diagnosis(config))


def diagnosis(config: ConfigDict) -> str:
  """A config's models, problems and arms, in lines; of a sweep, those of its first run.

  Raises:
    ValueError: the first thing that is wrong in any run.
  """
  plan, *_ = [recipe.plan(one, tasks.get(one)) for one in sweep.expand(config)]
  lines = [f"{role}: {base['folder']} ({base['identity'][:12]})"
           for role, base in plan.bases.items()]
  for split, prompts in plan.prompts.items():
    longest = max(len(p.tokens) for p in prompts)
    lines.append(f"{split}: {len(prompts)} problems, prompts of at most {longest} tokens; the "
                 f"window is {config.prompt_tokens}")
  for arm, names in plan.arms.items():
    lines.append(f"{arm}: {' -> '.join(names) or 'nothing to train'}")
  return "\n".join(lines)
