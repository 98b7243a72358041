"""Fetches the packages that are missing, in the versions of constraints.txt."""

import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
# Module: its name for pip. Torch, which the rivals need, is not fetched: it is large.
NEEDS = {
    "jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint",
    "transformers": "transformers", "ml_collections": "ml-collections", "etils": "etils[epath]",
    "safetensors": "safetensors", "tensorboardX": "tensorboardX", "scipy": "scipy",
    "absl": "absl-py", "tqdm": "tqdm", "jinja2": "jinja2"}
# For least times, which preflight's package reads, and for the arithmetic world. All other parts
# run without them.
OPTIONAL = {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array_record",
            "importlib_resources": "importlib_resources", "matplotlib": "matplotlib"}


def missing(needs: dict[str, str]) -> list[str]:
  """The packages that are not installed, by their names for pip."""
  return [package for module, package in needs.items() if importlib.util.find_spec(module) is None]


def constraints(text: str) -> str:
  """The lines of constraints.txt, with the versions of what is installed in their place.

  The installed jax fits the accelerator's plugin and driver, so pip must not exchange it.
  """
  lines = []
  for line in text.splitlines():
    name = re.split(r"[=;\s]", line.strip())[0]
    if not name or name.startswith("#"):
      continue
    try:
      lines.append(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      lines.append(line)
  return "\n".join(dict.fromkeys(lines)) + "\n"


def packages(seconds: float) -> None:
  """Installs what is missing; pip is stopped after `seconds`.

  Exits with a sentence that names the packages where pip cannot fetch one of NEEDS.
  """
  absent = missing(NEEDS | OPTIONAL)
  if not absent:
    return
  start = time.monotonic()
  with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as pinned:
    pinned.write(constraints((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    pinned.flush()
    # One try: a machine without a network would hold it for minutes.
    try:
      subprocess.run(
          [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--retries=0",
           "--timeout=5", f"--constraint={pinned.name}", *absent], check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
      print(f"pip was stopped after {seconds:.0f} s", flush=True)
  print(f"installation: {time.monotonic() - start:.0f} s", flush=True)
  importlib.invalidate_caches()
  refused = missing(NEEDS)
  if refused:
    sys.exit("these packages are not installed and pip cannot fetch them: install "
             f"{' '.join(refused)} with --constraint={ROOT / 'constraints.txt'}, or name a folder "
             "that has them in PYTHONPATH.")
