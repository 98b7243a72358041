"""JSON of others: each fault of a text gives one sentence with the file's name and the remedy."""

import gzip
import json

import pytest

from s2d_jax import json_objects
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Fields

REFUSED = {
    "Latin-1": ('{"name": "Montréal"}'.encode("latin-1"), "is not UTF-8 .*0xe9 at offset 15.*save"),
    "UTF-8 cut": ('{"a": "é'.encode()[:-1], "is not UTF-8 .*0xc3"),
    "UTF-16 with a mark": ('{"a": 1}'.encode("utf-16"), "is UTF-16, not JSON: save it as UTF-8"),
    "UTF-16 without": ('{"a": 1}'.encode("utf-16-le"), "has zero bytes.*save it as UTF-8"),
    "UTF-16, high byte first": ('{"a": 1}'.encode("utf-16-be"), "has zero bytes"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "is UTF-32, not JSON: save it as UTF-8"),
    "a byte-order mark": (b'\xef\xbb\xbf{"a": 1}', "byte-order mark.*save it without the mark"),
    "gzip": (gzip.compress(b'{"a": 1}'), "is compressed with gzip, not JSON: decompress it"),
    "zip": (b"PK\x03\x04....", "is a zip archive, not JSON: unpack it"),
    "xz": (b"\xfd7zXZ\x00....", "is compressed with xz"),
    "parquet": (b"PAR1\x15\x04\x15", "is a parquet file, not JSON: "),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html>", "is a page of HTML.*download the file itself"),
    "nothing": (b"", "is empty"),
    "blanks": (b" \n", "is empty"),
    "100,000 lists": (b'{"a": ' + b"[" * 100_000, "is nested too deeply: use at most 100 levels"),
    "500 lists": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "is nested too deeply"),
    "500 objects": (b'{"a":' * 500 + b"1" + b"}" * 500, "is nested too deeply"),
    "5,000 digits": (b'{"a": ' + b"7" * 5_000 + b"}", "an integer of 5000 digits"),
    "a negative of 400 digits": (b'{"a": -' + b"7" * 400 + b"}", "an integer of 401 digits"),
    "1e999": (b'{"a": 1e999}', "'1e999', which is beyond a float64"),
    "-1e999": (b'{"a": [-1e999]}', "'-1e999', which is beyond a float64"),
    "a surrogate": (rb'{"a": "x\ud800y"}', r"half a surrogate pair .\\ud800."),
    "a low surrogate": (rb'{"a": "\uDC00"}', "half a surrogate pair"),
    "a key with one": (rb'{"\ud83d": 1}', "half a surrogate pair"),
    "a pair in the wrong order": (rb'{"a": "\ude00\ud83d"}', "half a surrogate pair"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice in one object"),
    "an inner key twice": (b'[{"b": {"a": 1, "a": 2}}]', "has the key 'a' twice in one object"),
    "NaN": (b'{"a": NaN}', "has NaN, which JSON lacks"),
    "Infinity": (b'{"a": Infinity}', "has Infinity, which JSON lacks"),
    "-Infinity": (b'{"a": [-Infinity]}', "has -Infinity, which JSON lacks"),
    "null": (b"null", "is not a JSON object: download it again"),
    "a list": (b"[1]", "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "cut short": (b'{"a": 1', "is not JSON .*line 1 column"),
    "two objects": (b'{"a": 1} {"a": 2}', "is not JSON .Extra data"),
    "a comma too many": (b'{"a": 1,}', "is not JSON"),
    "a Python dict": (b"{'a': None}", "is not JSON"),
    "a raw line break": (b'{"a": "x\ny"}', "is not JSON .Invalid control character"),
}


@pytest.mark.parametrize("data, sentence", REFUSED.values(), ids=REFUSED)
def test_a_fault_of_a_text_is_a_sentence_with_the_name(data, sentence):
  with pytest.raises(InputError, match=sentence) as error:
    json_objects.parse("data.jsonl line 3", data)
  assert str(error.value).startswith("data.jsonl line 3 ")
  assert len(str(error.value)) < 300


def test_half_a_pair_in_an_argument_is_refused():
  with pytest.raises(InputError, match="half a surrogate pair"):
    json_objects.parse("--template", '{"a": "\udce9"}')


def test_valid_texts_are_read():
  tree = {"a": [1, -2.5, True, None, "é😀"], "b": {"c": {}}, "": "\u0000", "n": 10**299}
  for text in (json.dumps(tree), json.dumps(tree, ensure_ascii=False)):
    assert json_objects.parse("x", text.encode()) == tree
    assert json_objects.parse("x", text) == tree
  # Many brackets side by side are not deep.
  wide = {"a": [[{"b": []}]] * 1_000}
  assert json_objects.parse("x", json.dumps(wide).encode()) == wide
  deep = b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"
  assert json_objects.parse("x", deep) == json.loads(deep)


def test_a_value_may_be_no_object():
  assert json_objects.value("x", b"[1, 2]") == [1, 2]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / "folder.json").mkdir()
  with pytest.raises(InputError, match="folder.json cannot be read .*: finish its download"):
    json_objects.read(tmp_path / "folder.json", "finish its download")
  with pytest.raises(InputError, match="absent.json cannot be read .No such file"):
    json_objects.read(tmp_path / "absent.json")
  (tmp_path / "x.json").write_bytes(b'{"a": 1}')
  assert json_objects.read(tmp_path / "x.json") == {"a": 1}


FIELDS = Fields("config.json", {
    "int": 3, "float": 2.5, "whole": 2.0, "true": True, "text": "7", "null": None, "list": [1],
    "object": {"a": 1}, "large": 10**299, "small": -1})


def test_fields_are_read_by_type():
  assert FIELDS.integer("int") == 3
  assert FIELDS.number("int", 0, 9) == 3.0 and isinstance(FIELDS.number("int", 0, 9), float)
  assert FIELDS.number("float", 0, 9) == 2.5
  assert FIELDS.boolean("true") is True
  assert FIELDS.text("text") == "7"
  assert FIELDS.list("list") == [1]
  assert FIELDS.object("object") == {"a": 1}
  assert FIELDS.integer("null", default=5) == 5
  assert FIELDS.integer("absent", default=None) is None


@pytest.mark.parametrize("read, sentence", [
    (lambda: FIELDS.integer("absent"), "config.json has no 'absent': take the file that came with"),
    (lambda: FIELDS.integer("null"), "config.json has null under 'null'"),
    (lambda: FIELDS.integer("float"), "has 2.5 under 'float': make it an integer from 1 to"),
    (lambda: FIELDS.integer("whole"), "has 2.0 under 'whole'"),
    (lambda: FIELDS.integer("true"), "has True under 'true'"),
    (lambda: FIELDS.integer("text"), "has '7' under 'text'"),
    (lambda: FIELDS.integer("small", default=4), "has -1 under 'small'"),
    (lambda: FIELDS.integer("large"), r"has 10{70,80} \.\.\. under 'large'"),
    (lambda: FIELDS.number("text", 0, 9), "make it a number from 0 to 9"),
    (lambda: FIELDS.number("true", 0, 9), "has True under 'true'"),
    (lambda: FIELDS.number("large", 0, 1e30), "under 'large'"),
    (lambda: FIELDS.number("small", 0, 9), "has -1 under 'small'"),
    (lambda: FIELDS.boolean("int"), "has 3 under 'int': make it true or false"),
    (lambda: FIELDS.boolean("text"), "make it true or false"),
    (lambda: FIELDS.text("int"), "make it a text"),
    (lambda: FIELDS.object("list"), "make it an object"),
    (lambda: FIELDS.list("object"), "make it a list")])
def test_a_value_of_another_type_or_range_is_a_sentence(read, sentence):
  with pytest.raises(InputError, match=sentence):
    read()
