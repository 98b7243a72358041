"""`s2d-jax export`: a finished stage as a Hugging Face folder of its own."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from s2d_jax import checkpoint, command, files, manifest, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.models import hf, saving

EXAMPLE = "s2d-jax export --workdir=runs/tiny --stage=student_grpo --out=models/student"
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> None:
  """Writes the folder and prints its path."""
  parser = command.Parser("export", "Writes a finished stage as a Hugging Face folder.", EXAMPLE)
  parser.add_argument("--workdir", required=True, help="the work folder of a run")
  parser.add_argument("--stage", required=True,
                      help="the stage's folder in it, or its name where there is one such folder")
  parser.add_argument("--out", required=True, help="the new folder")
  parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE",
                      help=f"of the weights: {', '.join(DTYPES)}; by default as they are")
  args = parser.parse_args(argv)
  print(export(args.workdir, args.stage, args.out, args.dtype))


def export(workdir: str | Path, stage: str, out: str | Path, dtype: str | None = None) -> Path:
  """Writes a finished stage's model to `out`; returns its path.

  The weights are those of the stage's `hf/` or, where that was deleted, of `checkpoints/final`.

  Raises:
    InputError: no finished stage has this name, or several have; `hf.load` or `hf.save` refuses.
  """
  # First, so that no model is loaded for a folder that cannot be written.
  saving.check_target(out)
  folder = find(Path(workdir), stage)
  saved = folder / "hf"
  # Loading and saving checks that every weight is there, whole and of its shape.
  if saved.exists():
    model, params = hf.load(saved)
    lineage = files.read_json(saved / "lineage.json")
    return hf.save(out, model, params, saved, lineage, dtype or "source")
  record = manifest.read(folder)
  # The learner's base has the config and the tokenizer.
  base = record["bases"][record["inputs"]["row"]["learner"]]["folder"]
  model = models.build(hf.read_config(base))
  manifest.check_files(folder, weights=True)
  params = checkpoint.load_final(
      folder, models.laid_out(model.config, sharding.make_mesh((1, 1, 1))))
  lineage = {"stage": folder.name, "revision": record["revision"],
             "bases": {role: base["identity"] for role, base in record["bases"].items()}}
  return hf.save(out, model, jax.device_get(params), base, lineage, dtype)


def find(workdir: Path, stage: str) -> Path:
  """The finished stage folder of that name, or the only one of that name before its hash.

  Raises:
    InputError: no folder fits, or several do.
  """
  # A stage is finished once its manifest is written; scores have manifests and no checkpoints.
  folders = workdir.iterdir() if workdir.is_dir() else ()
  finished = sorted(path.name for path in folders if (path / "checkpoints" / "final").exists()
                    and manifest.read(path) is not None)
  found = [name for name in finished if stage in (name, name.rpartition("-")[0])]
  if len(found) == 1:
    return workdir / found[0]
  if not finished:
    raise InputError(f"{workdir} has no finished stage: run its recipe first.")
  number = "several finished stages" if found else "no finished stage"
  # Without a match every finished stage is a choice; with several, only these.
  choices = ", ".join(found or finished)
  raise InputError(f"{workdir} has {number} {stage!r}: choose --stage from {choices}.")


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
