"""Problems are left out by entries of split and id, given or in a file."""

import pytest

from s2d_jax.data import leave_out
from s2d_jax.errors import InputError

SPLITS = {"labelled": [{"id": 1}, {"id": 2}], "test": [{"id": 1}, {"id": 3}]}


@pytest.mark.parametrize("text, remain", [
    ("", ([1, 2], [1, 3])), ("labelled:1", ([2], [1, 3])), ("labelled:1,test:3", ([2], [1])),
    (" test:1 , test:3 ,", ([1, 2], [])), ("test:3,test:3", ([1, 2], [1])),
    ("aime24:7,labelled:2", ([1], [1, 3]))])  # a split that this run does not read
def test_a_problem_is_left_out_of_its_split_alone(text, remain, tmp_path):
  data = {"dir": "d", "labelled": "l", "test": "t", "aime24": "aime24", "leave_out": text}
  found = leave_out.remaining(SPLITS, data)
  assert tuple([row["id"] for row in found[split]] for split in SPLITS) == remain
  path = tmp_path / "left_out"
  # As other programs write it: a byte-order mark, and lines that end in CRLF.
  path.write_bytes(b"\xef\xbb\xbf" + text.replace(",", "\r\n").encode())
  assert leave_out.remaining(SPLITS, data | {"leave_out": str(path)}) == found


def test_without_the_key_nothing_is_left_out():
  assert leave_out.remaining(SPLITS, {"dir": "d"}) == SPLITS


@pytest.mark.parametrize("text, said", [
    ("17", "is '17': give entries such as labelled:17,test:5, or a file"),
    ("labelled:1,test", "is 'labelled:1,test': give entries"),
    ("labelled:-1", "is 'labelled:-1': give entries"),
    ("nowhere.txt", "is 'nowhere.txt': give entries"),
    ("labelled:12", "names labelled:12, and labelled has no such id: remove the entry."),
    ("tset:1", "names the split 'tset': choose from labelled, test."),
    ("dir:1", "names the split 'dir': choose from labelled, test."),
])
def test_a_bad_value_is_refused(text, said):
  with pytest.raises(InputError, match=said) as error:
    leave_out.remaining(SPLITS, {"dir": "d", "leave_out": text})
  assert str(error.value).startswith("config.data.leave_out ")


@pytest.mark.parametrize("content, said", [
    (b"labelled:1\n2\n", r"line 2 has '2': write a split, a colon and an id, as in labelled:17."),
    (b"labelled:1\nlabelled:9\n", "labelled:9, and labelled has no such id"),
    (b"labelled:1,labelled:2\n", "line 1 has 'labelled:1,labelled:2': write a split"),
    (b"\xff\xfel\x00", "is not a text in UTF-8: write one entry a line"),
    (b"\x1f\x8b\x08\x00", "is not a text in UTF-8")])
def test_a_bad_file_is_refused_by_line(content, said, tmp_path):
  path = tmp_path / "left_out.txt"
  path.write_bytes(content)
  with pytest.raises(InputError, match=said):
    leave_out.remaining(SPLITS, {"dir": "d", "leave_out": str(path)})


def test_the_remedy_extends_the_value(tmp_path):
  added = [("labelled", 5), ("test", 6), ("labelled", 5)]
  assert leave_out.remedy("", added) == "set config.data.leave_out=labelled:5,test:6"
  assert leave_out.remedy("test:1", added) == "set config.data.leave_out=test:1,labelled:5,test:6"
  path = tmp_path / "left_out.txt"
  path.write_text("test:1")
  assert leave_out.remedy(str(path), added) == f"add to {path} the lines labelled:5,test:6"
  many = [("labelled", number) for number in range(1002)]
  assert leave_out.remedy("", many).endswith("labelled:999,and 2 more")
