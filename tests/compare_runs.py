"""Whether two work folders hold the same results, bit for bit.

  python -m tests.compare_runs FOLDER FOLDER

Compares the final weights, ledgers and logged samples of each stage, the stored rollouts, and the
evaluations. A stage's folder name may differ between two revisions, so folders are matched by
their contents. Prints a line for each kind of result, and exits with 1 if any differs.
"""

import collections
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from safetensors.numpy import load_file

# Other seconds in each run.
CLOCKS = "device_seconds"


def digest(value: object) -> str:
  """A hash of a JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights(folder: pathlib.Path) -> list[tuple[str, str]]:
  """(name, hash of the bytes) of each tensor of a Hugging Face folder."""
  tensors = {}
  for path in folder.glob("*.safetensors"):
    tensors |= load_file(path)
  return [(name, hashlib.sha256(tensors[name].tobytes()).hexdigest()) for name in sorted(tensors)]


def samples(folder: pathlib.Path) -> list[list]:
  """Step, prompt, sample, tokens and reward of each logged sample, in order."""
  entries = []
  for path in sorted(folder.iterdir()):
    text = path.read_text()
    entries += json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
  fields = ("step", "prompt_id", "sample_index", "tokens", "reward")
  return [[entry.get(field) for field in fields] for entry in entries]


def stored(folder: pathlib.Path) -> list[list]:
  """[prompt id, sample index, tokens] of each row of a store of rollouts, sorted."""
  rows = []
  for path in folder.glob("*.npz"):
    with np.load(path) as part:
      for b, length in enumerate(part["response_length_B"]):
        rows.append([int(part["prompt_id_B"][b]), int(part["sample_index_B"][b]),
                     part["response_BT"][b, :length].tolist()])
  return sorted(rows)


def scores(result: dict) -> dict:
  """The rewards and the scores of an evaluation that every revision computes."""
  correct = result.get("correct") or result["samples"]["sampled"]["correct_PG"]
  names = [name for name in result["scores"] if name.startswith(("greedy", "avg@", "pass@"))]
  return {"correct": correct, "scores": {name: result["scores"][name] for name in names}}


def results(workdir: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (kind, hash) of every finished result of a work folder."""
  for folder in workdir.iterdir():
    # A stage or an evaluation without a manifest is not finished.
    if folder.name.startswith("rollouts"):
      yield "stored rollouts", digest(stored(folder))
    if not (folder / "manifest.json").exists():
      continue
    if (folder / "hf").is_dir():
      stage = folder.name.rpartition("-")[0]
      ledger = json.loads((folder / "ledger.json").read_text())
      yield f"{stage} weights", digest(weights(folder / "hf"))
      yield f"{stage} samples", digest(samples(folder / "samples"))
      yield f"{stage} ledger", digest({key: value for key, value in ledger.items()
                                       if not key.startswith(CLOCKS)})
    elif (folder / "result.json").exists() and folder.name.startswith("eval"):
      yield "evaluations", digest(scores(json.loads((folder / "result.json").read_text())))


def compare(first: pathlib.Path, second: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{kind: (number of results that both have, number that only one has)}."""
  of_first = collections.Counter(results(first))
  of_second = collections.Counter(results(second))
  in_both = of_first & of_second
  in_one = (of_first | of_second) - in_both
  found = {}
  for kind in sorted({kind for kind, _ in of_first | of_second}):
    both = sum(count for (name, _), count in in_both.items() if name == kind)
    one = sum(count for (name, _), count in in_one.items() if name == kind)
    found[kind] = (both, one)
  return found


def main(argv: list[str]) -> None:
  """Prints the comparison."""
  found = compare(*map(pathlib.Path, argv))
  for kind, (both, one) in found.items():
    print(f"{kind:<28}{both:>4} equal{one:>5} only in one")
  if not found or any(one for _, one in found.values()):
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1:])
