"""Measures how the package and its texts are written.

  python -m tests.language [FOLDER] [--list]

prints the figures beside those of other projects; with --list also what has no type or docstring,
and banned words. Counts are simple on purpose, so that anyone can check them by eye.
`tests/test_language.py` holds the package to its limits.
"""

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "s2d_jax"

# Openings that make a sentence depend on another one, or hide its subject.
BANNED_OPENINGS = ("The same", "What ", "Who ", "Whose ", "Nobody", "As many")
# Words of a private vocabulary, metaphors and riddles: each has a plain term in its place.
BANNED_PHRASES = (
  r"\bnobody\b", r"\beveryone\b", r"\bso many\b", r"\bso few\b",
  r"(?<!there )\b(is|are|was|were) (?-i:none)\b",
  r"(?<!there )\b(is|are) no\b(?! (longer|more|larger|smaller)\b)",
  r"\btold\b", r"\bmanners\b", r"\bstrangers?\b", r"\bdoors?\b", r"\bhouses?\b", r"\brooms?\b",
  r"\bwhose turn\b", r"\bpunish\w*", r"\bjudged?\b", r"\bweigh(s|ed|ing)?\b", r"\btalks?\b",
  r"\bcrowds?\b", r"\b(a|one|the|our|whole) draw\b", r"\bwanted\b", r"\bdid not know\b")
# Parts of a name, between underscores or capitals, that belong to the private vocabulary.
BANNED_NAME_PARTS = frozenset(
  "made talk talks judge judged punish punished punishment weigh weighs told seen ended room rooms "
  "wanted wrote how turn turns asked crowd crowded manners stranger strangers nobody everyone who "
  "whose what beside picked door doors house beat".split())
# These are plain inside a longer name or before axes, and say nothing alone.
BANNED_NAMES = frozenset(
  "draw draws drawn gap given kept known left more odd own place places quiet rest same takes "
  "work works".split())
# A name that is the field's own, by the file that defines it.
FIELDS_OWN = {
  # bootstrap draws of a statistic
  ("s2d_jax/stats.py", "draws"), ("s2d_jax/intervals.py", "draws"),
  ("s2d_jax/evals.py", "draws"), ("s2d_jax/evaluate.py", "draws"),
  ("s2d_jax/ladder.py", "draws"), ("tests/test_evals.py", "draws"),
}
# Calls that print a message for a user.
MESSAGE_CALLS = ("fail", "exit", "warn", "warning", "error")


class Density(NamedTuple):
  """How dense code is.

  The mean length of lines that are not empty, in characters without indentation; conditional
  expressions and star-arguments per thousand lines; the share of assignments that set several
  names to several values; and the share of lines that are comments.
  """
  mean_line: float
  ternaries: float
  star_arguments: float
  tuple_assignments: float
  comment_share: float


# Other projects, measured in the same way; the last row is this package before it was rewritten.
REFERENCE = {
  "nanodo": Density(34, 4.6, 0.0, 0.004, 0.157),
  "rlax": Density(40, 0.4, 1.2, 0.008, 0.10),
  "optax.losses": Density(41, 2.4, 0.5, 0.0, 0.11),
  "big_vision core": Density(43, 10.0, 12.6, 0.009, 0.13),
  "jax-llm-examples qwen3": Density(42, 16.0, 9.3, 0.074, 0.075),
  "tinker distillation": Density(38, 2.9, 2.9, 0.0, 0.057),
  "simply": Density(35, 3.8, 2.3, 0.005, 0.076),
  "s2d_jax at ea78d3d": Density(49, 18.5, 17.9, 0.095, 0.005),
}


def package_files() -> list[Path]:
  return sorted(PACKAGE.rglob("*.py"))


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
  """(qualified name, node) of every public function and method outside other functions."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef):
      yield node.name, node
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      for method in node.body:
        if isinstance(method, ast.FunctionDef):
          yield f"{node.name}.{method.name}", method


def is_public(name: str) -> bool:
  """True if no part of a dotted name is private; `__init__` and `__call__` are public."""
  return all(not part.startswith("_") or part in ("__init__", "__call__")
             for part in name.split("."))


def unannotated(tree: ast.Module) -> list[str]:
  """Names of the public parameters and return values that have no annotation."""
  missing = []
  for name, node in functions(tree):
    if not is_public(name):
      continue
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
    for argument in arguments:
      if argument.annotation is None and argument.arg not in ("self", "cls"):
        missing.append(f"{name}({argument.arg})")
    if node.returns is None and not name.endswith("__init__"):
      missing.append(f"{name} -> ?")
  return missing


def vague(tree: ast.Module) -> list[str]:
  """Names of public parameters, results and fields whose annotation says nothing."""
  found = []
  for name, node in functions(tree):
    if is_public(name):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      found += [f"{name}({x.arg})" for x in arguments if _says_nothing(x.annotation)]
      found += [f"{name} -> ?"] * _says_nothing(node.returns)
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and is_public(node.name):
      found += [f"{node.name}.{x.target.id}" for x in node.body
                if isinstance(x, ast.AnnAssign) and _says_nothing(x.annotation)]
  return found


def _says_nothing(annotation: ast.expr | None) -> bool:
  return annotation is not None and ast.unparse(annotation) in ("Any", "object", "Callable")


def argument_count(tree: ast.Module) -> int:
  """Number of parameters of public functions, without self and cls."""
  count = 0
  for name, node in functions(tree):
    if is_public(name):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      count += sum(argument.arg not in ("self", "cls") for argument in arguments)
  return count


def undocumented(tree: ast.Module) -> list[str]:
  """Public classes, functions and methods without a docstring; a class speaks for `__init__`."""
  missing = []
  for name, node in functions(tree):
    documented = name.endswith("__init__") or ast.get_docstring(node) is not None
    if is_public(name) and not documented:
      missing.append(name)
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and is_public(node.name) and ast.get_docstring(node) is None:
      missing.append(node.name)
  return missing


def public_names(tree: ast.Module) -> list[str]:
  """Public functions, methods and classes of a module."""
  classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
  return [name for name in [*classes, *(name for name, _ in functions(tree))] if is_public(name)]


def comments(text: str) -> list[str]:
  """The comments of a source text, without the leading "#"."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return [token.string.lstrip("#! ") for token in tokens if token.type == tokenize.COMMENT]


def comment_lines(text: str) -> int:
  """Number of lines that are a comment and nothing else."""
  return sum(line.lstrip().startswith("#") for line in text.splitlines())


def docstrings(tree: ast.Module) -> list[str]:
  """Every docstring of a module, private ones too."""
  nodes = [node for node in ast.walk(tree)
           if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
  return [text for text in map(ast.get_docstring, nodes) if text]


def banned(text: str) -> list[str]:
  """The banned openings of a text's sentences and the banned phrases in it."""
  found = [phrase for phrase in BANNED_PHRASES if re.search(phrase, text, re.IGNORECASE)]
  for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text):
    found += [opening for opening in BANNED_OPENINGS if sentence.lstrip().startswith(opening)]
  return found


def name_parts(name: str) -> list[str]:
  """The lower-case words of a name: "sampleRows_BT" has sample, rows and bt."""
  return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """(line, name) of everything a module defines.

  These are functions, classes, parameters, fields and variables.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.lineno, node.name
    elif isinstance(node, ast.arg):
      yield node.lineno, node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.lineno, node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      if isinstance(node.value, ast.Name) and node.value.id == "self":
        yield node.lineno, node.attr


def banned_names(tree: ast.Module, path: str = "") -> list[str]:
  """The names in a module that belong to the private vocabulary, each once.

  `path` is the module's path from the checkout; its stem is a name too.
  """
  found = []
  for name in [Path(path).stem, *(name for _, name in defined_names(tree))]:
    whole = name.strip("_").lower()
    wrong = whole in BANNED_NAMES or BANNED_NAME_PARTS & set(name_parts(name))
    if wrong and name not in found and (path, whole) not in FIELDS_OWN:
      found.append(name)
  return found


def messages(tree: ast.Module) -> list[str]:
  """The texts of a module's errors and warnings, without the values put into them."""
  found = []
  for node in ast.walk(tree):
    name = ""
    if isinstance(node, ast.Call):
      name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if isinstance(node, ast.Raise) or name in MESSAGE_CALLS:
      texts = [part.value for part in ast.walk(node)
               if isinstance(part, ast.Constant) and isinstance(part.value, str)]
      found.append(" ".join(texts))
  return [text for text in found if text]


def prose(markdown: str) -> str:
  """A Markdown text with its tables and headings, without code."""
  text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.M | re.S)
  return re.sub(r"`[^`]*`", "Code", text)


def sentences(markdown: str) -> list[str]:
  """The sentences of a Markdown text, without code, tables, headings and link targets.

  A list item ends a sentence, as a full stop, a colon before a line's end and an empty line do.
  """
  text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.M | re.S)
  text = re.sub(r"^\s*\|.*$", "\n", text, flags=re.M)  # tables
  text = re.sub(r"^#+ .*$", "\n", text, flags=re.M)  # headings
  text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.M)  # list items
  text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)  # links keep their words
  text = re.sub(r"`[^`]*`", "Code", text)  # a command is one word, and may open a sentence
  paragraphs = re.split(r"\n\s*\n", text)
  found = []
  for paragraph in paragraphs:
    joined = " ".join(paragraph.split())
    found += re.split(r"(?<=[.!?])[\"*)]*\s+(?=[\"*(A-Z0-9])|(?<=:)\s+(?=[A-Z])", joined)
  return [sentence for sentence in found if re.search(r"[A-Za-z]", sentence)]


def word_count(sentence: str) -> int:
  return len(re.findall(r"[^\s]*[A-Za-z0-9][^\s]*", sentence))


def density(texts: list[str]) -> Density:
  """The Density of several source texts together."""
  lines = [line for text in texts for line in text.splitlines()]
  filled = [line for line in lines if line.strip()]
  ternaries, stars, tuples, assignments = 0, 0, 0, 0
  for text in texts:
    for node in ast.walk(ast.parse(text)):
      ternaries += isinstance(node, ast.IfExp)
      stars += isinstance(node, ast.Starred)
      assignments += isinstance(node, ast.Assign)
      tuples += isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(
        node.targets[0], ast.Tuple)
  thousands = len(lines) / 1000
  return Density(
    mean_line=statistics.mean(len(line.strip()) for line in filled),
    ternaries=ternaries / thousands,
    star_arguments=stars / thousands,
    tuple_assignments=tuples / max(assignments, 1),
    comment_share=sum(map(comment_lines, texts)) / len(lines))


def code_lines(text: str) -> int:
  """Lines that are neither empty nor comments nor part of a docstring."""
  documented = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
      string = node.body[0]
      documented |= set(range(string.lineno, string.end_lineno + 1))
  return sum(bool(line.strip()) and not line.lstrip().startswith("#") and number not in documented
             for number, line in enumerate(text.splitlines(), 1))


def report(folder: Path) -> str:
  """The figures of a package folder as lines of text, beside those of other projects."""
  texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
  trees = [ast.parse(text) for text in texts]
  arguments = sum(map(argument_count, trees))
  missing = [name for tree in trees for name in unannotated(tree)]
  names = sum(len(public_names(tree)) for tree in trees)
  silent = sum(len(undocumented(tree)) for tree in trees)
  rows = [*REFERENCE.items(), (str(folder.name), density(texts))]
  table = [f"{name:<24}{d.mean_line:>8.0f}{d.ternaries:>11.1f}{d.star_arguments:>11.1f}"
           f"{100 * d.tuple_assignments:>8.1f}{100 * d.comment_share:>10.1f}" for name, d in rows]
  return "\n".join([
    f"{len(texts)} files, {sum(len(text.splitlines()) for text in texts)} lines, "
    f"{sum(map(code_lines, texts))} of them code; {names} public names, {silent} without a "
    f"docstring; {arguments} public parameters; {len(missing)} parameters or results have no type",
    "", f"{'':<24}{'line':>8}{'ternaries':>11}{'star-args':>11}{'tuples':>8}{'comments':>10}",
    f"{'':<24}{'mean':>8}{'/kloc':>11}{'/kloc':>11}{'%':>8}{'%':>10}", *table])


def problems(folder: Path) -> Iterator[str]:
  """One line for each missing type, missing docstring and banned wording below a folder."""
  for path in sorted(folder.rglob("*.py")):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    yield from (f"{path}: {name} has no type" for name in unannotated(tree))
    yield from (f"{path}: {name} has no docstring" for name in undocumented(tree))
    names = banned_names(tree, str(path.resolve().relative_to(ROOT)))
    yield from (f"{path}: the name {name}" for name in names)
    for part in [*docstrings(tree), *comments(text), *messages(tree)]:
      if banned(part):
        yield f"{path}: {banned(part)} in {part[:80]!r}"


if __name__ == "__main__":
  folders = [Path(word) for word in sys.argv[1:] if not word.startswith("--")] or [PACKAGE]
  if "--list" in sys.argv:
    print("\n".join(problems(folders[0])))
  print(report(folders[0]))
