"""`s2d-jax doctor`: checks a config, and prints its models, problems and arms."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from s2d_jax import command, recipe, sweep, tasks

EXAMPLE = "s2d-jax doctor --config=configs/arithmetic.py"


def main(argv: Sequence[str]) -> None:
  """Prints the diagnosis of a config.

  Raises:
    ValueError: the config is wrong; the message names the first mistake.
  """
  parser = command.config_parser(
      "doctor", "Checks a config, its models, tokenizers and data; writes nothing.", EXAMPLE)
  config, _ = command.parse_config(parser, argv)
  print(diagnosis(config))


def diagnosis(config: ConfigDict) -> str:
  """A config's models, problems and arms, in lines; of a sweep, those of its first run.

  Raises:
    ValueError: a run is wrong; the message names the first mistake.
  """
  # Planning a run checks it, so every run of a sweep is planned and the first one printed.
  plan = [recipe.plan(one, tasks.get(one)) for one in sweep.expand(config)][0]
  lines = [f"{role}: {base['folder']} ({base['identity'][:12]})"
           for role, base in plan.bases.items()]
  for split, prompts in plan.prompts.items():
    longest = max(len(p.tokens) for p in prompts)
    lines.append(f"{split}: {len(prompts)} problems, prompts of at most {longest} tokens; the "
                 f"window is {config.prompt_tokens}")
  for arm, names in plan.arms.items():
    lines.append(f"{arm}: {' -> '.join(names) or 'nothing to train'}")
  return "\n".join(lines)
