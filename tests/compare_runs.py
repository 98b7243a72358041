"""Whether two work folders hold the same results, bit for bit.

  python -m tests.compare_runs A B

Compared are, of each finished stage, every tensor and the other files of `hf/`, every field of
`metrics/`, `ledger/` and `samples/`, and the totals of `ledger.json`; every array of the stored
rollouts and passes; every field of each evaluation, probe and arm. A tensor's or array's dtype and
shape count as well as its bytes. Not compared are clocks (`timing/`, `tensorboard/`, `profile/`,
`starts/` and the fields CLOCKS), `checkpoints/`, whose weights `hf/` has, and what names folders or
versions: `manifest.json`, `hf/lineage.json` and `hf/SHA256SUMS`.

A folder's name may differ between two revisions. A result of A is therefore compared with the
result of the same kind in B that has most equal fields. Each difference and each field or result
of only one folder is printed with the folder's name. The exit code is 0 only where all is equal. A
finished folder without one of its files or fields is an error that names it.
"""

import collections
import hashlib
import json
import pathlib
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# Seconds differ in each run. They are fields of `ledger.json` alone; `metrics/` has none.
CLOCKS = ("device_seconds_used", "device_seconds_lost")
# Fields that each entry of a log has; further ones are compared where they are.
LOGS = {"metrics": ("step", "loss"), "ledger": ("step", "labels", "tokens_trained", "flops"),
        "samples": ("step", "prompt_id", "sample_index", "tokens", "text", "logp",
                    "finish_reason", "reward")}
# The arrays of each file of a store, and the older name of one.
STORE = ("prompt_id_B", "sample_index_B", "prompt_BT", "prompt_length_B", "response_BT",
         "response_length_B", "sampler_logp_BT", "behaviour_logp_BT", "finish_reason_B",
         "weight_version")
OLDER = {"drawn_logp_BT": "behaviour_logp_BT"}
STORES = {"rollouts": "stored rollouts", "passes": "stored passes"}
# Files of hf/ that name folders or revisions; the weights are compared tensor by tensor.
NOT_COMPARED = ("lineage.json", "SHA256SUMS", "model.safetensors.index.json")


class Result(NamedTuple):
  """A folder or file of results, as one hash for each field."""
  kind: str
  name: str               # below the work folder
  fields: dict[str, str]


class Row(NamedTuple):
  """A field of two results, and whether it is equal in both."""
  kind: str
  field: str
  verdict: str            # "equal", "differs", "not in A" or "not in B"
  names: tuple[str, ...]  # of the results


def digest(value: object) -> str:
  """A hash of a JSON value; floats are written with all their digits."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(path: pathlib.Path, *names: str) -> dict[str, Any]:
  """A JSON object that has the fields `names`.

  Raises:
    ValueError: the file or a field is missing.
  """
  if not path.exists():
    raise ValueError(f"{path} is missing, and its folder is finished.")
  found = json.loads(path.read_text())
  for name in names:
    if name not in found:
      raise ValueError(f"{path} has no field {name!r}.")
  return found


def weights(folder: pathlib.Path) -> dict[str, str]:
  """{name: hash of dtype, shape and bytes} of each tensor of a Hugging Face folder.

  Raises:
    ValueError: there is no tensor.
  """
  tensors = {}
  for path in sorted(folder.glob("*.safetensors")):
    content = path.read_bytes()
    # The format: the header's length, the header in JSON, the tensors' bytes.
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
      start, end = entry["data_offsets"]
      data = hashlib.sha256(content[8 + length + start : 8 + length + end]).hexdigest()
      tensors[name] = digest([entry["dtype"], entry["shape"], data])
  if not tensors:
    raise ValueError(f"{folder} has no weights, and its stage is finished.")
  return tensors


def log(folder: pathlib.Path, name: str, empty: bool = False) -> dict[str, str]:
  """{field: hash of its values in order} of a log; parts are joined, since a kill adds one.

  Args:
    empty: whether the log may have no entry.

  Raises:
    ValueError: the log has no entry, or an entry lacks a field.
  """
  entries = [json.loads(line) for part in sorted((folder / name).glob("*.jsonl"))
             for line in part.read_text().splitlines()]
  if not entries and not empty:
    raise ValueError(f"{folder / name} has no entry, and its stage is finished.")
  for number, entry in enumerate(entries):
    for field in LOGS[name]:
      if field not in entry:
        raise ValueError(f"{folder / name} has no field {field!r} in entry {number}.")
  # An evaluation between steps adds fields to some entries only.
  fields = sorted({field for entry in entries for field in entry})
  return {f"{name}.{field}": digest([[number, entry[field]] for number, entry in enumerate(entries)
                                     if field in entry]) for field in fields}


def stage(folder: pathlib.Path) -> dict[str, str]:
  """The fields of a finished stage."""
  fields = {f"weights {name}": found for name, found in weights(folder / "hf").items()}
  for path in sorted((folder / "hf").iterdir()):
    if path.suffix != ".safetensors" and path.name not in NOT_COMPARED:
      fields[f"hf/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
  config = read(folder / "manifest.json", "config")["config"]
  name = folder.name.rpartition("-")[0]
  for kind in LOGS:
    silent = kind == "samples" and config["stages"][name]["log_samples"] == 0
    fields |= log(folder, kind, empty=silent)
  totals = read(folder / "ledger.json", "labels", "prompts", "flops")
  return fields | {f"ledger.json {key}": digest(value) for key, value in totals.items()
                   if key not in CLOCKS}


def store(folder: pathlib.Path) -> dict[str, str]:
  """The fields of a store: its arrays, rows sorted by prompt id and sample index.

  Raises:
    ValueError: there is no file, or one lacks an array.
  """
  columns = collections.defaultdict(list)
  for path in sorted(folder.glob("*.npz")):
    with np.load(path) as part:
      arrays = {OLDER.get(name, name): part[name] for name in part}
    for name in STORE:
      if name not in arrays:
        raise ValueError(f"{path} has no field {name!r}.")
    rows = len(arrays["prompt_id_B"])
    for name, values in arrays.items():
      # The version of the weights is one number for all rows of a file.
      columns[name].append(values if values.ndim else np.broadcast_to(values, rows))
  if not columns:
    raise ValueError(f"{folder} has no rows.")
  joined = {name: np.concatenate(parts) for name, parts in columns.items()}
  order = np.lexsort((joined["sample_index_B"], joined["prompt_id_B"]))
  return {name: digest([str(values.dtype), values.shape,
                        hashlib.sha256(values[order].tobytes()).hexdigest()])
          for name, values in joined.items()}


def evaluated(folder: pathlib.Path) -> dict[str, str]:
  """The fields of an evaluation.

  Older ones have the right samples alone, in `correct` and `greedy`, and of the response's length
  the mean without an interval.

  Raises:
    ValueError: a file or a field is missing.
  """
  found = read(folder / "result.json", "scores")
  samples = found.get("samples")
  if samples is None:
    read(folder / "result.json", "correct", "greedy", "response_length")
    samples = {"sampled": {"correct_PG": found["correct"]},
               "greedy": {"correct_PG": [[right] for right in found["greedy"]]}}
    found["scores"]["response_length"] = [found["response_length"]]
  if not samples or not found["scores"]:
    raise ValueError(f"{folder / 'result.json'} has no samples or no scores.")
  fields = {f"{way} {name}": digest(values) for way, of_way in samples.items()
            for name, values in of_way.items()}
  for name, values in found["scores"].items():
    fields[f"score {name}"] = digest(values[0])
    if len(values) > 1:
      fields[f"interval {name}"] = digest(values[1:])
  return fields | {"samples.json": digest(read(folder / "samples.json"))}


def model(workdir: pathlib.Path, name: str | None) -> str | None:
  """A model by its content: of a stage its tensors, of a base its identity; None of None."""
  if name is None or "-" not in name:
    return name
  return digest(weights(workdir / name / "hf"))


def measured(folder: pathlib.Path) -> dict[str, str]:
  """The fields of an evaluation or a probe, and which model and problems it is of."""
  inputs = read(folder / "manifest.json", "inputs")["inputs"]
  if folder.name.startswith("eval-"):
    fields = evaluated(folder)
  else:
    fields = {f"{text} {name}": digest(value)
              for text, found in read(folder / "result.json", "student").items()
              for name, value in found.items()}
    fields["guide"] = digest(model(folder.parent, inputs["guide"]))
  fields["weights"] = digest(model(folder.parent, inputs["weights"]))
  return fields | {name: digest(inputs[name]) for name in ("problems", "seed", "dtype")}


def arm(path: pathlib.Path) -> dict[str, str]:
  """The fields of an arm's entry, folders by their content."""
  workdir = path.parent.parent
  found = read(path, "arm", "seed", "rows", "probes")
  fields = {"seed": digest(found["seed"])}
  for row in found["rows"]:
    label = row["label"]
    fields[f"{label} stages"] = digest([model(workdir, name) for name in row["stages"]])
    # Revisions compute different statistics, so the right samples stand for the evaluation.
    scored = evaluated(workdir / row["score"])
    fields[f"{label} score"] = scored.get("sampled correct_PG") or scored["greedy correct_PG"]
    if "evaluation" in row:
      fields[f"{label} evaluation"] = digest(row["evaluation"])
  fields["probes"] = digest([
      [model(workdir, probe["stage"]),
       *(probe[when] and measured(workdir / probe[when]) for when in ("before", "after"))]
      for probe in found["probes"]])
  return fields


def results(workdir: pathlib.Path) -> Iterator[Result]:
  """Yields every finished result of a work folder.

  Raises:
    ValueError: a finished folder lacks a file or a field.
  """
  for folder in sorted(workdir.iterdir()):
    kind = folder.name.rpartition("-")[0]
    if folder.name == "arms":
      for path in sorted(folder.iterdir()):
        yield Result(f"arm {path.name.rpartition('-')[0]}", f"arms/{path.name}", arm(path))
    elif kind in STORES:
      yield Result(STORES[kind], folder.name, store(folder))
    elif not (folder / "manifest.json").exists():
      if folder.is_dir():
        print(f"not finished, not compared: {folder}")
    elif kind in ("eval", "probe"):
      yield Result({"eval": "evaluation"}.get(kind, kind), folder.name, measured(folder))
    else:
      yield Result(f"stage {kind}", folder.name, stage(folder))


def pairs(first: list[Result], second: list[Result]) -> Iterator[tuple[Result | None, ...]]:
  """Yields results of one kind in pairs, those with most equal fields first; None for no other."""
  first = list(first)
  second = list(second)
  while first and second:
    a, b = max(((a, b) for a in first for b in second),
               key=lambda pair: len(pair[0].fields.items() & pair[1].fields.items()))
    first.remove(a)
    second.remove(b)
    yield a, b
  yield from ((a, None) for a in first)
  yield from ((None, b) for b in second)


def compare(first: pathlib.Path, second: pathlib.Path) -> list[Row]:
  """A Row for every field of every result of two work folders.

  Raises:
    ValueError: a finished folder lacks a file or a field.
  """
  of_kind = collections.defaultdict(lambda: ([], []))
  for side, workdir in enumerate((first, second)):
    for result in results(workdir):
      of_kind[result.kind][side].append(result)
  rows = []
  for kind in sorted(of_kind):
    for a, b in pairs(*of_kind[kind]):
      if a is None:
        rows.append(Row(kind, "whole result", "not in A", (b.name,)))
      elif b is None:
        rows.append(Row(kind, "whole result", "not in B", (a.name,)))
      else:
        rows += [Row(kind, field, verdict(field, a, b), (a.name, b.name))
                 for field in sorted(a.fields.keys() | b.fields.keys())]
  return rows


def verdict(field: str, a: Result, b: Result) -> str:
  """The verdict of a Row; at least one of the results has the field."""
  if field not in a.fields:
    return "not in A"
  if field not in b.fields:
    return "not in B"
  return "equal" if a.fields[field] == b.fields[field] else "differs"


def main(argv: list[str]) -> None:
  """Prints the comparison of the two folders in argv."""
  if len(argv) != 2:
    sys.exit("Name two work folders: python -m tests.compare_runs A B")
  try:
    rows = compare(*map(pathlib.Path, argv))
  except (ValueError, OSError) as error:
    sys.exit(str(error))
  columns = ("equal", "differs", "not in A", "not in B")
  print(f"{'':<28}{'results':>9}" + "".join(f"{column:>10}" for column in columns))
  for kind in sorted({row.kind for row in rows}):
    of_kind = [row for row in rows if row.kind == kind]
    counts = collections.Counter(row.verdict for row in of_kind)
    compared = len({row.names for row in of_kind})
    print(f"{kind:<28}{compared:>9}" + "".join(f"{counts[column]:>10}" for column in columns))
  unequal = collections.defaultdict(list)
  for row in rows:
    if row.verdict != "equal":
      unequal[row.verdict, row.kind, row.field].append(row.names)
  for (found, kind, field), names in sorted(unequal.items()):
    shown = "; ".join(" and ".join(pair) for pair in names[:3])
    print(f"{found}: {kind}, {field}, in {len(names)}: {shown}")
  if unequal or not rows:
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1:])
