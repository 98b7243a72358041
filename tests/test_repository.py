"""The repository: the README's tree, banned text, lengths of files, packaging."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SKIPPED = re.compile(r"^(\.git|\.venv.*|\..*_cache|\.idea|\.vscode|runs|build|dist|__pycache__|"
                     r"\.ipynb_checkpoints|.*\.egg-info|\.DS_Store)$")
TEXT = {".py", ".sh", ".md", ".toml", ".txt", ".yaml", ".ipynb", ".in", ".jinja", ""}
VAGUE = re.compile("(Trainer|Manager|Runner|Handler)$")
MAX_FILE, MAX_FUNCTION = 400, 60  # lines

# Put together from pieces, so that this file does not match itself.
BANNED = {
  "a path of one machine": re.compile(r"(?<![\w.:/}])/(wo" r"rk|ro" r"ot|ho" r"me|Us" r"ers)/"),
  "unfinished business": re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b"),
  "a deprecated spelling of sharding": re.compile(
    "with me" "sh:|experimental.pj" "it|jax.pm" "ap|experimental.shard" "_map|interpreters.p" "x"),
  "a feature test in place of a version": re.compile(r"\bhas" r"attr\("),
  "remote code": re.compile("trust_remote_code=" "True"),
}


def entries(folder):
  """The entries of a folder that git does not ignore."""
  return sorted(path for path in folder.iterdir() if not SKIPPED.match(path.name))


def files(folder=ROOT):
  for path in entries(folder):
    if path.is_dir():
      yield from files(path)
    else:
      yield path


def sources():
  return [path for path in files()
          if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests"]


def written(path):
  """A file's text, without the pictures in a notebook's outputs."""
  return re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8"))


def banned(text):
  """The names of the banned things a text holds."""
  return [name for name, pattern in BANNED.items() if pattern.search(text)]


def tree(readme):
  """The paths of the README's tree: the fenced block that has a line `s2d_jax/ ...`.

  Each line is one entry and what it is for; a folder ends in `/`, and two spaces of indentation
  say what is inside it.
  """
  blocks = re.findall(r"^```\w*\n(.*?)^```$", readme, re.M | re.S)
  (block,) = [block for block in blocks if re.search(r"^s2d_jax/(\s|$)", block, re.M)]
  paths, above = [], []
  for line in filter(str.strip, block.splitlines()):
    depth = (len(line) - len(line.lstrip())) // 2
    name = line.split()[0]
    above = [*above[:depth], name]
    paths.append("".join(above))
  return paths


def test_tree_is_read():
  readme = "# x\n```\nmake run\n```\n```\nsetup.py  ranges\ns2d_jax/\n  main.py   flags\n" \
           "  losses/   mathematics\n    kl.py   KL\nLICENSE\n```\n"
  assert tree(readme) == [
    "setup.py", "s2d_jax/", "s2d_jax/main.py", "s2d_jax/losses/", "s2d_jax/losses/kl.py", "LICENSE"]


def test_tree_of_the_readme_is_true():
  named = tree((ROOT / "README.md").read_text(encoding="utf-8"))
  absent = [path for path in named if not (ROOT / path).exists()
            or path.endswith("/") != (ROOT / path).is_dir()]
  assert absent == []
  shown = [*entries(ROOT), *entries(ROOT / "s2d_jax")]
  here = {str(path.relative_to(ROOT)) + "/" * path.is_dir() for path in shown}
  # .ci/run stands for its folder; __init__.py and .gitignore speak for themselves.
  unnamed = here - set(named) - {".ci/", ".gitignore", "s2d_jax/__init__.py"}
  assert unnamed == set()


def test_no_text_holds_a_banned_thing():
  wrong = {}
  for path in files():
    if path.suffix in TEXT and path.name != "LICENSE":
      found = banned(written(path))
      if found:
        wrong[str(path.relative_to(ROOT))] = found
  assert wrong == {}


@pytest.mark.parametrize("text, count", [
  ("see /wo" "rk/main", 1), ("open('/ro" "ot/x')", 1), ("# TO" "DO later", 1),
  ("with me" "sh:", 1), ("https://host/ho" "me/page", 0), ("with jax.set_mesh(mesh):", 0),
  ("gs://bucket/wo" "rk/run", 0),
])
def test_a_banned_thing_is_found(text, count):
  assert len(banned(text)) == count


def test_files_and_functions_are_short():
  long = []
  for path in sources():
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    if len(text.splitlines()) > MAX_FILE:
      long.append(f"{name}: {len(text.splitlines())} lines")
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION:
        long.append(f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
  assert long == []


def test_every_file_has_a_docstring():
  texts = {path: path.read_text(encoding="utf-8") for path in files() if path.suffix == ".py"}
  silent = [str(path.relative_to(ROOT)) for path, text in texts.items()
            if text and not ast.get_docstring(ast.parse(text))]
  assert silent == []


def test_names_of_files_and_classes_are_not_vague():
  vague = [str(path.relative_to(ROOT)) for path in sources()
           if path.stem in {"utils", "misc", "helpers", "registry"}
           or path.stem == "common" and path.parent.name != "configs"]
  for path in sources():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ClassDef) and VAGUE.search(node.name):
        vague.append(f"{path.relative_to(ROOT)}: {node.name}")
  assert vague == []


def test_every_folder_of_code_is_a_package():
  package = ROOT / "s2d_jax"
  folders = {path.parent for path in package.rglob("*.py")}
  # Below assets/ the scripts travel as data, beside what they made.
  folders = {path for path in folders if "assets" not in path.relative_to(package).parts}
  assert [path for path in sorted(folders) if not (path / "__init__.py").exists()] == []


def literals(path):
  """The module-level names of a file whose values are literals."""
  found = {}
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict):
      found[node.targets[0].id] = ast.literal_eval(node.value)
  return found


def pins(python):
  """The constraints that hold on one version of Python, by canonical name."""
  environment = {**default_environment(), "python_version": python}
  lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
  found = {}
  for line in lines:
    if not line.startswith("#"):
      pin = Requirement(line)
      if pin.marker is None or pin.marker.evaluate(environment):
        name = canonicalize_name(pin.name)
        assert name not in found, f"{name} is pinned twice on Python {python}"
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        found[name] = specifier.version
  return found


def test_setup_has_the_extras():
  extras = literals(ROOT / "setup.py")["EXTRAS"]
  assert set(extras) == {"test", "math", "tpu", "cuda13", "gpu-compile", "gcs", "s3",
                         "notebook"}
  assert [name for name, lines in extras.items() if "torch" in " ".join(lines)] == ["test"]


def test_the_plugin_that_compiles_for_gpus_has_jaxs_version():
  installed = importlib.metadata.version("jax")
  plugins = []
  for line in literals(ROOT / "setup.py")["EXTRAS"]["gpu-compile"]:
    requirement = Requirement(line)
    assert "cuda12-plugin" not in requirement.name  # whose version pip would choose by itself
    if requirement.name == "jax":
      plugins += [found for found in map(Requirement, importlib.metadata.requires("jax"))
                  if found.name == "jax-cuda12-plugin" and any(
                      found.marker.evaluate({"extra": extra}) for extra in requirement.extras)]
  (plugin,) = plugins
  # Neither an earlier nor a later version, and without a driver's libraries.
  assert plugin.specifier.contains(installed) and not plugin.extras
  assert not plugin.specifier.contains("0.10.1") and not plugin.specifier.contains("99")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_lie_in_the_ranges(python):
  setup, pinned = literals(ROOT / "setup.py"), pins(python)
  environment = {**default_environment(), "python_version": python}
  extras = setup["EXTRAS"]
  for line in [*setup["REQUIRES"], *extras["test"], *extras["math"], *extras["notebook"]]:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate(environment):
      version = pinned[canonicalize_name(requirement.name)]
      assert requirement.specifier.contains(version), f"{line} against {version}"


def test_torch_is_for_python_311_alone():
  assert pins("3.11")["torch"] == "2.13.0"
  assert "torch" not in pins("3.12")


def test_warnings_are_errors_and_every_exception_has_its_reason():
  text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  first, *named = tomllib.loads(text)["tool"]["pytest"]["ini_options"]["filterwarnings"]
  assert first == "error"
  assert text.count("  # ", text.index("filterwarnings")) >= len(named)


def test_the_makefile_has_the_commands_of_the_readme():
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
  assert {"run", "test", "test-fast", "test-slow", "clean"} <= targets
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert set(re.findall(r"\bmake ([a-z][\w-]+)$", readme, re.M)) <= targets


@pytest.mark.medium
@pytest.mark.parametrize("end, status", [("0", "skipped"), (str(2**40), "passed")])
def test_no_test_begins_after_the_end_of_the_time_for_tests(end, status):
  name = "tests/test_repository.py::test_torch_is_for_python_311_alone"
  done = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name], cwd=ROOT, text=True,
      capture_output=True, check=False, env=os.environ | {"S2D_TESTS_END": end})
  assert f"1 {status}" in done.stdout, done.stdout + done.stderr
