"""The package is written for a new reader: types, docstrings, comments, names, sentences.

Nothing here rewards dense code. How dense it is gets printed beside other projects' figures
(`python -m tests.language`). Conditional expressions and star-arguments may not become frequent;
a line's length is printed alone, because types make signatures longer.
"""

import ast
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests import language

MIN_COMMENT_SHARE = 0.04
MAX_README_WORDS = 900
MAX_README_SENTENCE, MEAN_README_SENTENCE = 30, 17  # words
MAX_DOCS_SENTENCE = 35  # words


ROOT = language.ROOT


def sources(*folders: str) -> list[Path]:
  """The Python files below folders of the checkout."""
  return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
  return str(path.relative_to(ROOT))


CODE = sources("s2d_jax", "configs", "examples", "benchmarks", "results", "tests")
TYPED = sources("s2d_jax", "benchmarks", "examples", "configs", "results")


def found_by(measure: Callable[[ast.Module], list], files: Iterable[Path]) -> dict[str, list]:
  """{path: what a measure finds in the file}, where it finds anything."""
  found = {name_of(path): measure(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
  return {name: values for name, values in found.items() if values}


def pages() -> list[Path]:
  """Every page a user reads, but for the records of past changes and runs."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
          *(ROOT / folder / "README.md" for folder in (
              "launch", "benchmarks", "benchmarks/peers", "results"))]


def long_sentences(text: str, limit: int) -> list[str]:
  return [sentence for sentence in language.sentences(text)
          if language.word_count(sentence) > limit]


def slow_to_read(text: str) -> list[str]:
  """The limits of the README that a text breaks."""
  lengths = [language.word_count(sentence) for sentence in language.sentences(text)]
  broken = {"words": language.word_count(text) > MAX_README_WORDS,
            "a sentence": long_sentences(text, MAX_README_SENTENCE) != [],
            "mean sentence": statistics.mean(lengths) > MEAN_README_SENTENCE}
  return [name for name, is_broken in broken.items() if is_broken]


def dense(texts: list[str]) -> list[str]:
  """The limits of comments and density that source texts break."""
  now = language.density(texts)
  before = language.REFERENCE["s2d_jax at ea78d3d"]
  broken = {"comments": now.comment_share < MIN_COMMENT_SHARE,
            "ternaries": now.ternaries > before.ternaries,
            "star-arguments": now.star_arguments > before.star_arguments}
  return [name for name, is_broken in broken.items() if is_broken]


def test_every_public_parameter_and_result_has_a_type():
  assert found_by(language.unannotated, TYPED) == {}


def test_every_public_name_has_a_docstring():
  assert found_by(language.undocumented, TYPED) == {}


# Any JSON value, any value of a config, any text, or, for a Role, a model whose file this one may
# not import.
VAGUE = {
    "s2d_jax/roles.py": ["Role.model"],
    "s2d_jax/files.py": ["plain(value)", "plain -> ?", "write_json(value)", "read_json -> ?"],
    "s2d_jax/json_objects.py": ["value -> ?", "shown(found)"],
    "s2d_jax/keys.py": ["check_values(values)", "check_value(value)", "Key.neutral", "Key.default"],
    "s2d_jax/checksums.py": ["digest(value)"],
    "s2d_jax/hosts.py": ["gather(value)"],
    "s2d_jax/report.py": ["escaped(text)"]}


def test_types_say_something():
  assert found_by(language.vague, language.package_files()) == VAGUE


def test_a_type_that_says_nothing_is_found():
  source = "def f(x: Any, y: Callable, *, z: int) -> object: ...\nclass A:\n  x: Any\n  y: str\n"
  assert language.vague(ast.parse(source)) == ["f(x)", "f(y)", "f -> ?", "A.x"]


def test_names_are_the_fields_words():
  found = {name_of(path): language.banned_names(ast.parse(path.read_text(encoding="utf-8")),
                                                name_of(path)) for path in CODE}
  assert {name: names for name, names in found.items() if names} == {}


def test_docstrings_and_comments_stand_alone():
  found = {}
  for path in CODE:
    text = path.read_text(encoding="utf-8")
    parts = [*language.docstrings(ast.parse(text)), *language.comments(text)]
    found[name_of(path)] = [
      (words, part[:80]) for part in parts if (words := language.banned(part))]
  # These two hold the banned words as examples.
  del found["tests/language.py"], found["tests/test_language.py"]
  assert {name: parts for name, parts in found.items() if parts} == {}


def test_messages_are_plain():
  def wrong(tree: ast.Module) -> list:
    return [(words, text[:80]) for text in language.messages(tree)
            if (words := language.banned(text))]
  assert found_by(wrong, [path for path in CODE if not name_of(path).startswith("tests")]) == {}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_pages_are_plain(page):
  assert language.banned(language.prose(page.read_text(encoding="utf-8"))) == []


def test_the_changelog_is_plain():
  text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  assert language.banned(language.prose(text)) == []


def test_comments_are_a_share_of_the_lines():
  texts = [path.read_text(encoding="utf-8") for path in language.package_files()]
  assert dense(texts) == []


def test_the_readme_is_read_in_five_minutes():
  assert slow_to_read((ROOT / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_sentences_of_the_docs_are_short(page):
  assert long_sentences(page.read_text(encoding="utf-8"), MAX_DOCS_SENTENCE) == []


def test_code_is_no_denser_than_it_was(capsys):
  with capsys.disabled():
    print("\n" + language.report(language.PACKAGE))
  texts = [path.read_text(encoding="utf-8") for path in language.package_files()]
  assert dense(texts) == []


# Controls: each measure sees what it is there to see.

@pytest.mark.parametrize("source, missing", [
  ("def f(x): pass", ["f(x)", "f -> ?"]),
  ("def f(x: int): pass", ["f -> ?"]),
  ("def f(*xs, **named) -> int: pass", ["f(xs)", "f(named)"]),
  ("class A:\n  def __init__(self, x): pass", ["A.__init__(x)"]),
  ("class A:\n  def __call__(self, x: int): pass", ["A.__call__ -> ?"]),
  ("def _f(x): pass", []),
  ("def f(x: int) -> int:\n  def g(y): pass", []),
])
def test_a_missing_type_is_found(source, missing):
  assert language.unannotated(ast.parse(source)) == missing


@pytest.mark.parametrize("source, missing", [
  ("def f(): pass", ["f"]), ("class A:\n  def g(self): pass", ["A.g", "A"]),
  ('def f():\n  """Returns 1."""', []), ("def _f(): pass", []),
])
def test_a_missing_docstring_is_found(source, missing):
  assert language.undocumented(ast.parse(source)) == missing


@pytest.mark.parametrize("text, count", [
  ("The same of logits in any order.", 1),
  ("Reads a file. What a device runs is compiled.", 1),
  ("A block is nobody.", 1),
  ("A tensor of so many tokens.", 1),
  ("Two models that cannot be told apart.", 1),
  ("An array is no cache, and there is no file.", 1),
  ("A wrong answer is punished and judged by a talk.", 3),
  ("Prompts that weigh nothing. A crowd in a room. The whole draw.", 4),
  ("It is no longer than a row, of which there are none. It is None.", 0),
  ("As many tokens as fit. The same seed. Who reads it?", 3),
  ("A manifest that is none.", 1),
  ("The whole text where there is none.", 0),
  ("It has two doors.", 1),
  ("Returns the number of tokens of each row. Whatever the mesh, rows keep their order.", 0),
  ("Keeps what it is given, in the same order.", 0),
])
def test_a_banned_sentence_is_found(text, count):
  assert len(language.banned(text)) == count


@pytest.mark.parametrize("source, names", [
  ("def punish(x): made = x", ["punish", "made"]),
  ("def f(x, *, weigh=1): return lambda how: x", ["weigh", "how"]),
  ("class Told:\n  seen: int\n  def __init__(self): self.room = 1", ["Told", "seen", "room"]),
  ("def test_a_stranger_is_seen(): pass", ["test_a_stranger_is_seen"]),
  ("class SampleRoom: pass\nkeptRooms_BT = 1", ["SampleRoom", "keptRooms_BT"]),
  ("draw, gap, _given = 1, 2, 3", ["draw", "gap", "_given"]),
  # Longer names and axes say which; a method of another class, and text, are not our names.
  ("given_solutions, sampler_gap, gap_BT, showed, weight = 1, 2, 3, 4, 5", []),
  ("other.seen = 'told how'", []),
])
def test_a_private_word_in_a_name_is_found(source, names):
  assert language.banned_names(ast.parse(source)) == names


def test_a_module_has_a_name_and_the_fields_own_words_stay():
  assert language.banned_names(ast.parse(""), "s2d_jax/rooms.py") == ["rooms"]
  tree = ast.parse("def bootstrap(draws): pass")
  assert language.banned_names(tree, "s2d_jax/stats.py") == []
  assert language.banned_names(tree, "s2d_jax/loop.py") == ["draws"]


@pytest.mark.parametrize("source, texts", [
  ('raise ValueError(f"{x} is no file: give " "one.")', [" is no file: give one."]),
  ('fail("nobody reads it")', ["nobody reads it"]),
  ('parser.error(f"a {kind} crowd")', ["a   crowd"]),
  ('print("nobody")', []),
])
def test_messages_are_read(source, texts):
  assert language.messages(ast.parse(source)) == texts


def test_pages_are_read_without_code():
  markdown = "# Strangers `rooms`\n\nTwo `doors`, a house.\n\n```\nrooms\n```\n| a crowd |\n"
  assert "doors" not in language.prose(markdown) and "rooms" not in language.prose(markdown)
  # The heading's, the sentence's and the table's.
  assert len(language.banned(language.prose(markdown))) == 3


def test_a_comment_is_counted_where_it_has_a_line_of_its_own():
  source = "# why\nx = 1  # units\ny = '# no'\n"
  assert language.comment_lines(source) == 1
  assert language.comments(source) == ["why", "units"]
  assert language.density([source]).comment_share == pytest.approx(1 / 3)


def test_sentences_are_split():
  markdown = ("# A title\n\nOne is here. Two `a b. C d` ends? Three:\n\n```sh\nmake run. Now\n```\n"
              "| a table | of words. Here |\n\n- an item\n- [another one](x.md) here\n")
  assert language.sentences(markdown) == [
    "One is here.", "Two Code ends?", "Three:", "an item", "another one here"]
  assert language.word_count("Two words - here, 3 more.") == 5


def test_a_long_sentence_is_found():
  text = "Short. " + " ".join(["word"] * 36) + "."
  assert len(long_sentences(text, 35)) == 1


@pytest.mark.parametrize("text, broken", [
  ("Three words here. " * 300, []),
  ("Three words here. " * 301, ["words"]),
  ("word " * 30 + "word. Short. Short.", ["a sentence"]),
  (("word " * 17 + "word. ") * 2, ["mean sentence"]),
  (("word " * 16 + "word. ").capitalize() * 2, []),
])
def test_a_readme_beyond_a_limit_is_found(text, broken):
  assert slow_to_read(text.replace(". w", ". W")) == broken


@pytest.mark.parametrize("line, count, comments, broken", [
  ("x = 1", 0, 40, []), ("x = 1", 0, 39, ["comments"]),
  ("x = 1 if y else 2", 18, 40, []), ("x = 1 if y else 2", 19, 40, ["ternaries"]),
  ("f(*a)", 17, 40, []), ("f(*a)", 18, 40, ["star-arguments"]),
])
def test_code_beyond_a_limit_is_found(line, count, comments, broken):
  lines = [line] * count + ["# why"] * comments
  assert dense(["\n".join([*lines, *["x = 1"] * (1000 - len(lines))])]) == broken


def test_density_counts():
  source = "x = 1 if y else 2\nf(*a)\na, b = 1, 2\n  \n"
  found = language.density([source])
  assert found.mean_line == pytest.approx((17 + 5 + 11) / 3)
  assert (found.ternaries, found.star_arguments, found.tuple_assignments) == (250, 250, 0.5)


def test_code_lines_leave_out_comments_and_docstrings():
  assert language.code_lines('"""Says.\n\nMore.\n"""\n\n# why\nx = 1\n') == 1
