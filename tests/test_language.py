"""The package is written so that a stranger can read it: types, docstrings, comments, sentences.

Nothing here rewards dense code. How dense it is gets printed beside other projects' figures
(`python -m tests.language`). Conditional expressions and star-arguments may not become frequent;
a line's length is printed alone, because types make signatures longer.
"""

import ast
import statistics
from pathlib import Path

import pytest

from tests import language

MIN_COMMENT_SHARE = 0.04
MAX_README_WORDS = 900
MAX_README_SENTENCE, MEAN_README_SENTENCE = 30, 17  # words
MAX_DOCS_SENTENCE = 35  # words


def parsed() -> dict[str, ast.Module]:
  return {str(path.relative_to(language.ROOT)): ast.parse(path.read_text(encoding="utf-8"))
          for path in language.package_files()}


def not_empty(found: dict) -> dict:
  return {name: values for name, values in found.items() if values}


def pages() -> list[Path]:
  """Every page a user reads, but for the records of past changes and runs."""
  root = language.ROOT
  return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "launch" / "README.md",
          root / "benchmarks" / "README.md", root / "results" / "README.md"]


def long_sentences(text: str, limit: int) -> list[str]:
  return [sentence for sentence in language.sentences(text)
          if language.word_count(sentence) > limit]


def test_every_public_parameter_and_result_has_a_type():
  assert not_empty({name: language.unannotated(tree) for name, tree in parsed().items()}) == {}


def test_every_public_name_has_a_docstring():
  assert not_empty({name: language.undocumented(tree) for name, tree in parsed().items()}) == {}


def test_docstrings_and_comments_stand_alone():
  wrong = {}
  for path in language.package_files():
    text = path.read_text(encoding="utf-8")
    prose = [*language.docstrings(ast.parse(text)), *language.comments(text)]
    wrong[str(path.relative_to(language.ROOT))] = [
      (found, part[:80]) for part in prose if (found := language.banned(part))]
  assert not_empty(wrong) == {}


def test_comments_are_a_share_of_the_lines():
  texts = [path.read_text(encoding="utf-8") for path in language.package_files()]
  assert language.density(texts).comment_share >= MIN_COMMENT_SHARE


def test_the_readme_is_read_in_five_minutes():
  text = (language.ROOT / "README.md").read_text(encoding="utf-8")
  lengths = [language.word_count(sentence) for sentence in language.sentences(text)]
  assert language.word_count(text) <= MAX_README_WORDS
  assert long_sentences(text, MAX_README_SENTENCE) == []
  assert statistics.mean(lengths) <= MEAN_README_SENTENCE


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(language.ROOT)))
def test_sentences_of_the_docs_are_short(page):
  assert long_sentences(page.read_text(encoding="utf-8"), MAX_DOCS_SENTENCE) == []


def test_code_is_no_denser_than_it_was(capsys):
  with capsys.disabled():
    print("\n" + language.report(language.PACKAGE))
  texts = [path.read_text(encoding="utf-8") for path in language.package_files()]
  now, before = language.density(texts), language.REFERENCE["s2d_jax at ea78d3d"]
  assert now.ternaries <= before.ternaries
  assert now.star_arguments <= before.star_arguments


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
def test_a_missing_type_is_seen(source, missing):
  assert language.unannotated(ast.parse(source)) == missing


@pytest.mark.parametrize("source, missing", [
  ("def f(): pass", ["f"]), ("class A:\n  def g(self): pass", ["A.g", "A"]),
  ('def f():\n  """Returns 1."""', []), ("def _f(): pass", []),
])
def test_a_missing_docstring_is_seen(source, missing):
  assert language.undocumented(ast.parse(source)) == missing


@pytest.mark.parametrize("text, count", [
  ("The same of logits in any order.", 1),
  ("Reads a file. What a device runs is compiled.", 1),
  ("A block is nobody.", 1),
  ("A manifest that is none.", 1),
  ("The whole text where there is none.", 0),
  ("It has two doors.", 1),
  ("Returns the number of tokens of each row. Whatever the mesh, rows keep their order.", 0),
  ("Keeps what it is given, in the same order.", 0),
])
def test_a_banned_sentence_is_seen(text, count):
  assert len(language.banned(text)) == count


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


def test_a_long_sentence_is_seen():
  text = "Short. " + " ".join(["word"] * 36) + "."
  assert len(long_sentences(text, 35)) == 1


def test_density_counts():
  source = "x = 1 if y else 2\nf(*a)\na, b = 1, 2\n  \n"
  found = language.density([source])
  assert found.mean_line == pytest.approx((17 + 5 + 11) / 3)
  assert (found.ternaries, found.star_arguments, found.tuple_assignments) == (250, 250, 250)


def test_code_lines_leave_out_comments_and_docstrings():
  assert language.code_lines('"""Says.\n\nMore.\n"""\n\n# why\nx = 1\n') == 1
