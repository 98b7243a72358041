"""Runs the parts one after another, each in a process with a limit, and prints a table.

  benchmarks/accelerator.sh [--results=FOLDER] [--parts=NAME,NAME] [--seconds=480] [--smoke]

A part that fails, or is stopped at its limit, leaves what it has found, and the next one begins.
Parts that cannot start before the end of the seconds are named as not started. The results of parts
that an earlier run has measured on such a device stay.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from benchmarks.accelerator import plan, store, table
from benchmarks.accelerator.plan import Part

ROOT = pathlib.Path(__file__).parents[2]
# Module: its name for pip. Torch, which the rivals need, is not fetched: it is large.
NEEDS = {
    "jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint",
    "transformers": "transformers", "ml_collections": "ml-collections", "etils": "etils[epath]",
    "safetensors": "safetensors", "tensorboardX": "tensorboardX", "scipy": "scipy",
    "tensorflow_datasets": "tensorflow-datasets", "array_record": "array_record",
    "importlib_resources": "importlib_resources", "absl": "absl-py", "tqdm": "tqdm",
    "matplotlib": "matplotlib", "jinja2": "jinja2"}
# One part alone needs these, and the others run without them.
OPTIONAL = {"tensorflow_datasets", "array_record", "importlib_resources", "matplotlib"}
SMOKE_PATIENCE = 4  # limits are for an accelerator's host, and tests run on a laptop's busy cores
TAIL = 15  # lines of a failed part's output that are kept


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Runs everything and returns the path of the results."""
  options = _options(argv)
  if options.part:
    from benchmarks.accelerator import parts  # jax, which the other process must not start
    parts.run(_part(options.part), options.into, options.smoke)
    return options.into
  _require()
  deadline = time.monotonic() + options.seconds
  signal.signal(signal.SIGTERM, _stop)
  with tempfile.TemporaryDirectory() as scratch:
    cache = options.cache or pathlib.Path(scratch) / "cache"
    path = pathlib.Path(scratch) / "accelerator.json"
    chosen = options.parts.split(",") if options.parts else [part.name for part in plan.PARTS]
    try:
      for part in plan.PARTS:
        # Rates first and always: the shares of all others are of them.
        if part.name in chosen or part.name == "rates":
          _measure(part, path, cache, deadline, options.smoke)
          path = _named(path, options, argv)
    finally:
      print(table.of(store.read(path)), flush=True)
      print(path, flush=True)
  return path


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="benchmarks/accelerator.sh",
                                   description=__doc__.splitlines()[0])
  parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results",
                      help="where the JSON goes")
  parser.add_argument("--parts", default="", help="only these, with commas between")
  parser.add_argument("--seconds", type=float, default=float(os.environ.get("SECONDS_LEFT", 480)),
                      help="of all parts; also the environment's SECONDS_LEFT")
  parser.add_argument("--cache", type=pathlib.Path,
                      help="a folder of compiled programs that stays; by default one for this run")
  parser.add_argument("--smoke", action="store_true", help="tiny sizes: a test that all parts run")
  parser.add_argument("--part", default="", help=argparse.SUPPRESS)
  parser.add_argument("--into", type=pathlib.Path, help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  for name in filter(None, options.parts.split(",")):
    if name not in {part.name for part in plan.PARTS}:
      names = ", ".join(part.name for part in plan.PARTS)
      parser.error(f"there is no part {name!r}: choose from {names}.")
  return options


def _part(name: str) -> Part:
  """The Part of a name."""
  return next(part for part in plan.PARTS if part.name == name)


def _missing(optional: bool) -> list[str]:
  """The packages that are not installed, by their names for pip."""
  return [package for module, package in NEEDS.items()
          if importlib.util.find_spec(module) is None and (optional or module not in OPTIONAL)]


def _require() -> None:
  """Installs packages that are missing, or exits with a sentence that names them."""
  missing = _missing(optional=True)
  if not missing:
    return
  # One try: a machine without a network would hold it for minutes.
  try:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--retries=0",
                    "--timeout=5", *missing], check=False, stderr=subprocess.DEVNULL, timeout=60)
  except subprocess.TimeoutExpired:
    print("pip was stopped after 60 s", flush=True)
  importlib.invalidate_caches()
  missing = _missing(optional=False)
  if missing:
    sys.exit("these packages are not installed and pip cannot fetch them: install "
             f"{' '.join(missing)}, or name a folder that has them in PYTHONPATH.")


def _stop(number: int, frame: FrameType | None) -> None:
  raise SystemExit(f"stopped by signal {number}")


def _named(path: pathlib.Path, options: argparse.Namespace,
           argv: Sequence[str] | None) -> pathlib.Path:
  """The file's place in the results, once the first part has said which device this is."""
  if path.parent == options.results:
    return path
  found = store.read(path)
  device = found.get("machine", {}).get("device", "unknown").lower().replace(" ", "-")
  stored = options.results / f"accelerator-{device}.json"
  arguments = sys.argv[1:] if argv is None else argv
  before = store.read(stored)
  # Parts of an earlier run stay unless they are measured again.
  store.write(stored, before | found | {
      "command": " ".join(["benchmarks/accelerator.sh", *arguments]),
      "parts": before["parts"] | found["parts"]})
  return stored


def _measure(part: Part, path: pathlib.Path, cache: pathlib.Path, deadline: float,
             smoke: bool) -> None:
  """Runs a part in a process of its own, and stores how that ended."""
  seconds = deadline - time.monotonic()
  if seconds < part.least:
    store.update(path, part.name, status=f"not started: {max(seconds, 0):.0f} s were left",
                 results={})
    print(f"{part.name}: not started", flush=True)
    return
  limit = min(part.limit * (SMOKE_PATIENCE if smoke else 1), seconds)
  programs = cache / part.cache
  if part.cold:
    shutil.rmtree(programs, ignore_errors=True)
  programs.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  environment = os.environ | part.environment | {
      "PYTHONUNBUFFERED": "1", "STARTED": str(start), "TF_CPP_MIN_LOG_LEVEL": "2",
      "JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
  store.update(path, part.name, status="not finished: the whole run was stopped", results={})
  command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={part.name}",
             f"--into={path}", *["--smoke"] * smoke]
  # Into a file, because a pipe that is not read would stop the part.
  with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
      code = process.wait(limit)
      status = "finished" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
      status = f"not finished: stopped after {limit:.0f} s"
    finally:
      _kill(process)
    fields = {}
    if status != "finished":
      output.seek(0)
      fields["output"] = output.read().splitlines()[-TAIL:]
  wall = time.monotonic() - start
  store.update(path, part.name, status=status, seconds=wall, **fields)
  print(f"{part.name}: {status}, {wall:.0f} s", *fields.get("output", ()), sep="\n  ", flush=True)


def _kill(process: subprocess.Popen) -> None:
  """Ends a part's process and the rivals that it has started."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


if __name__ == "__main__":
  main()
