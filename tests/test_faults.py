"""The page of faults names tests that exist, and each of its lines has what it needs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "results" / "faults.md"


def cells():
  """The cells of each line of the tables, without their heads."""
  lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines()
           if line.startswith("|") and line not in ("| | input | at ea78d3d | now | test |",
                                                    "|---|---|---|---|---|")]
  return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_fault_has_a_line_with_before_after_and_a_test():
  names = [name for name, *_ in cells() if name]
  def numbered(letter, count):
    return [f"{letter}{number}" for number in range(1, count + 1)]
  assert names == [*numbered("F", 19), "N1", *numbered("D", 12), *numbered("S", 11),
                   *numbered("V", 7), *numbered("H", 2)]
  for row in cells():
    assert len(row) == 5 and all(row[1:]), row


def test_every_named_test_exists():
  for *_, tests in cells():
    file = ""
    for name in re.findall(r"`([^`]+)`", tests):
      path, _, function = name.partition("::")
      file = path or file
      assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), name
