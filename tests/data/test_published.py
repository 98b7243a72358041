"""Published sets: each source's columns and their traps, downloads, and files that were placed."""

import http.server
import json
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from s2d_jax.data import jsonl, published, sources
from s2d_jax.errors import InputError

DAPO = ("Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{}\n\nRemember to put your answer on its own line after "Answer:".')


def parquet(folder, name, rows):
  path = folder / f"{name}.parquet"
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


def lines(folder, name, rows):
  path = folder / f"{name}.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read(folder, name):
  return [{key: row[key] for key in row if key != "id"}
          for row in sources.read(name, "labelled", folder)]


def dapo_row(text, answer, index=0):
  return {"data_source": "math_dapo", "prompt": [{"content": DAPO.format(text), "role": "user"}],
          "ability": "MATH",
          "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH"},
          "extra_info": {"index": str(index)}}


def test_dapo_loses_its_wrapper_and_its_repetitions(tmp_path, caplog):
  # The upload repeats each problem about a hundred times, a few of them with two answers.
  rows = [dapo_row("What is $1+1$?", "2"), dapo_row("Find $x$ with $2x=68$.\nAnswer fully.", "34")]
  parquet(tmp_path, "dapo_math_17k", [*rows, *rows, dapo_row("What is $1+1$?", "3")])
  assert read(tmp_path, "dapo_math_17k") == [
      {"problem": "What is $1+1$?", "answer": "2"},
      {"problem": "Find $x$ with $2x=68$.\nAnswer fully.", "answer": "34"}]
  assert "3 rows repeat a problem and are left out" in caplog.text
  assert "1 rows repeat a problem with another answer" in caplog.text


def test_dapos_prompt_may_be_a_text_and_its_answer_an_integer(tmp_path):
  lines(tmp_path, "dapo_math_17k", [
      {"prompt": DAPO.format("1+1?"), "reward_model": {"ground_truth": 2}},
      {"prompt": "Without the wrapper?", "reward_model": {"ground_truth": " 5 "}}])
  assert read(tmp_path, "dapo_math_17k") == [{"problem": "1+1?", "answer": "2"},
                                             {"problem": "Without the wrapper?", "answer": "5"}]


@pytest.mark.parametrize("answer", [None, 2.5, True, ["2"], {"value": "2"}])
def test_dapos_answer_is_a_text_or_an_integer(tmp_path, answer):
  rows = [{"prompt": "1+1?", "reward_model": {"ground_truth": "2"}},
          {"prompt": "1+2?", "reward_model": {"ground_truth": answer}}]
  path = lines(tmp_path, "dapo_math_17k", rows)
  with pytest.raises(InputError, match="line 2 has no text under answer: download http.* again."):
    read(tmp_path, "dapo_math_17k")
  path.unlink()
  parquet(tmp_path, "dapo_math_17k", rows[1:])
  with pytest.raises(InputError, match="row 1 has no text under answer: download http.* again."):
    read(tmp_path, "dapo_math_17k")


@pytest.mark.parametrize("name, text", [
    ("math500", ""), ("aime24", "\n\n"),
    # Rows without an answer are left out, and here all of them.
    ("math_train", '{"problem": "A?", "solution": "no box"}\n')])
def test_a_file_without_problems_is_refused(tmp_path, name, text):
  (tmp_path / f"{name}.jsonl").write_text(text)
  said = rf"{name}\.jsonl has no problem with an answer: download http.* again\.$"
  with pytest.raises(InputError, match=said):
    read(tmp_path, name)
  with pytest.raises(InputError, match=said):
    published.rows(name, tmp_path / f"{name}.jsonl")
  assert not list(tmp_path.rglob("*.array_record*"))


@pytest.mark.parametrize("row, said", [
    ({"prompt": [], "reward_model": {"ground_truth": "2"}}, "row 1 is not a row of YouJiacheng"),
    ({"prompt": "1+1?", "reward_model": {"style": "rule"}}, "row 1 is not a row of YouJiacheng"),
    ({"question": "1+1?", "answer": "2"},
     'row 1 has no text under "problem".*prompt, reward_model'),
])
def test_a_row_of_other_columns_is_refused(tmp_path, row, said):
  parquet(tmp_path, "dapo_math_17k", [row])
  with pytest.raises(InputError, match=said):
    read(tmp_path, "dapo_math_17k")


def test_maths_answer_is_in_the_last_of_several_boxes(tmp_path):
  two = r"Each die shows \boxed{6}, so the sum is $\boxed{\frac{1}{2}}$."
  parquet(tmp_path, "math_train", [
      {"problem": "A?", "level": "Level 5", "type": "Algebra", "solution": two},
      {"problem": "A?", "level": "Level 5", "type": "Algebra", "solution": two},
      {"problem": "B?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{}$."}])
  assert read(tmp_path, "math_train") == [
      {"problem": "A?", "answer": r"\frac{1}{2}", "solution": two, "subject": "Algebra"}]


def test_math_500_has_a_column_for_the_answer(tmp_path):
  lines(tmp_path, "math500", [
      {"problem": "A?", "solution": r"First \boxed{3}, then \boxed{4}.", "answer": r"\sqrt{4}",
       "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"}])
  assert read(tmp_path, "math500") == [
      {"problem": "A?", "answer": r"\sqrt{4}", "solution": r"First \boxed{3}, then \boxed{4}.",
       "subject": "Algebra"}]


def test_a_placed_file_may_have_further_columns(tmp_path):
  lines(tmp_path, "math500", [{"problem": "A?", "answer": "4", "subject": "Algebra", "by": "me"}])
  assert read(tmp_path, "math500") == [{"problem": "A?", "answer": "4", "subject": "Algebra"}]


def test_aime_takes_the_answer_and_not_a_box_of_the_solution(tmp_path):
  # In 5 of 30 rows of HuggingFaceH4/aime_2024 the first box is not the answer.
  parquet(tmp_path, "aime24", [
      {"id": 60, "problem": "A?", "solution": r"$\boxed{73}$ minutes, so \boxed{204}.",
       "answer": "204", "url": "https://artofproblemsolving.com", "year": "2024"},
      {"id": 67, "problem": "B?", "solution": "none", "answer": "025", "url": "", "year": "2024"}])
  assert [row["answer"] for row in read(tmp_path, "aime24")] == ["204", "25"]
  assert [row["id"] for row in sources.read("aime24", "aime24", tmp_path)] == [
      jsonl.text_id("A?"), jsonl.text_id("B?")]


@pytest.mark.parametrize("answer, value", [
    ("336^\\circ", "336"), ("336^{\\circ}", "336"), (70, "70"), ("$70$", "70"), ("70.0", "70")])
def test_an_aimes_answer_is_an_integer(tmp_path, answer, value):
  # math-ai/aime25 has its ids as texts.
  lines(tmp_path, "aime25", [{"problem": "A?", "answer": answer, "id": "0"}])
  assert read(tmp_path, "aime25") == [{"problem": "A?", "answer": value}]


@pytest.mark.parametrize("answer", ["\\frac12", "1000", "-1", "", True, None, 2.5, "12 or 13"])
def test_an_aimes_other_answers_are_refused(tmp_path, answer):
  lines(tmp_path, "aime25", [{"problem": "A?", "answer": answer}])
  with pytest.raises(InputError, match=r"aime25\.jsonl line 1 .*(0 to 999|problem, answer)"):
    read(tmp_path, "aime25")


def test_gsm8ks_answer_is_behind_the_last_mark(tmp_path):
  working = "Half is 48/2 = <<48/2=24>>24.\nAll are 48*24=<<48*24=1152>>1152.\n#### 1,152"
  parquet(tmp_path, "gsm8k", [{"question": "How many?", "answer": working}])
  assert read(tmp_path, "gsm8k") == [
      {"problem": "How many?", "answer": "1152",
       "solution": "Half is 48/2 = 24.\nAll are 48*24=1152.\n\\boxed{1152}"}]
  parquet(tmp_path, "gsm8k_train", [{"question": "How many?", "answer": "42"}])
  with pytest.raises(InputError, match=r"row 1 is not a row of openai/gsm8k \(its answer has no #"):
    read(tmp_path, "gsm8k_train")
  lines(tmp_path, "gsm8k_train", [{"question": "How many?", "answer": 42}])
  (tmp_path / "gsm8k_train.parquet").unlink()
  with pytest.raises(InputError, match=r"line 1 is not a row .* \(its answer is 42, not a text\)"):
    read(tmp_path, "gsm8k_train")


@pytest.mark.parametrize("name", published.SOURCES)
def test_a_file_that_was_placed_may_have_our_own_columns(tmp_path, name):
  lines(tmp_path, name, [{"problem": "1+1?", "answer": "2"}, {"problem": "2+1?", "answer": 3}])
  assert read(tmp_path, name) == [{"problem": "1+1?", "answer": "2"},
                                  {"problem": "2+1?", "answer": "3"}]


@pytest.mark.parametrize("prepared", [True, False])
def test_ids_are_of_the_text_whatever_the_columns(tmp_path, monkeypatch, prepared):
  # Halves follow the ids, and an id of the file would depend on who wrote it.
  if not prepared:
    monkeypatch.setattr(sources.os, "access", lambda *_: False)
  found = []
  for number, rows in enumerate([
      [{"prompt": DAPO.format(text), "reward_model": {"ground_truth": "2"}} for text in "AB"],
      [{"id": i, "problem": text, "answer": "2"} for i, text in enumerate("AB")],
      [{"id": 7, "problem": text, "answer": 2} for text in "AB"],
      [{"problem": text, "answer": "2"} for text in "AB"]]):
    (tmp_path / str(number)).mkdir()
    lines(tmp_path / str(number), "dapo_math_17k", rows)
    found.append([row["id"] for row in sources.read("dapo_math_17k", "x", tmp_path / str(number))])
  assert found == [[jsonl.text_id("A"), jsonl.text_id("B")]] * 4


def test_another_content_is_prepared_anew(tmp_path):
  lines(tmp_path, "gsm8k", [{"problem": "1+1?", "answer": "2"}])
  assert len(read(tmp_path, "gsm8k")) == len(read(tmp_path, "gsm8k")) == 1
  assert len(list(tmp_path.rglob("*.array_record*"))) == 1
  lines(tmp_path, "gsm8k", [{"problem": "1+2?", "answer": "3"}])
  assert read(tmp_path, "gsm8k") == [{"problem": "1+2?", "answer": "3"}]


def test_a_read_only_folder_is_read_without_preparing(tmp_path, monkeypatch):
  lines(tmp_path, "gsm8k", [{"problem": "1+1?", "answer": "2"}])
  monkeypatch.setattr(sources.os, "access", lambda *_: False)
  assert read(tmp_path, "gsm8k") == [{"problem": "1+1?", "answer": "2"}]
  assert [path.name for path in tmp_path.iterdir()] == ["gsm8k.jsonl"]


def test_a_set_may_lie_elsewhere_and_not_twice(tmp_path):
  path = lines(tmp_path, "elsewhere", [{"problem": "A?", "answer": "025", "id": "0"}])
  problems = sources.read(f"aime25:{path}", "aime25")
  assert [row["answer"] for row in problems] == ["25"]
  assert problems.origin["set"] == "aime25" and not problems.origin["is_published"]
  with pytest.raises(InputError, match="nowhere.jsonl is not a file: place the file of aime25"):
    sources.read("aime25:nowhere.jsonl", "aime25")
  lines(tmp_path, "aime25", [{"problem": "A?", "answer": "1"}])
  parquet(tmp_path, "aime25", [{"problem": "A?", "answer": "1"}])
  with pytest.raises(InputError, match=r"aime25\.jsonl and .*aime25\.parquet both exist: keep one"):
    read(tmp_path, "aime25")


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A local server in the place of the hub: (the folder it serves, the paths it was asked for)."""
  folder = tmp_path / "hub"
  requests = []

  class Hub(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=folder)

    def log_message(self, *_):
      requests.append(self.path)

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
  yield folder, requests
  server.shutdown()
  server.server_close()


def test_an_absent_file_is_downloaded_once_and_checked(hub, tmp_path, monkeypatch):
  folder, requests = hub
  source = published.SOURCES["aime25"]
  path = folder / "datasets" / source.repository / "resolve" / source.revision
  path.mkdir(parents=True)
  served = lines(path, "test", [{"problem": "A?", "answer": "70", "id": "0"}])
  with pytest.raises(InputError, match=r"aime25\.jsonl is not there and could not be downloaded "
                                       r"\(.* has SHA-256 .*, not b4e273c02d3e\)"):
    sources.read("aime25", "aime25", tmp_path / "data")
  assert not list((tmp_path / "data").iterdir())
  monkeypatch.setitem(published.SOURCES, "aime25",
                      source._replace(sha256=sources.sha256(served), rows=1))
  problems = sources.read("aime25", "aime25", tmp_path / "data")
  assert [row["answer"] for row in problems] == ["70"] and problems.origin["is_published"]
  assert problems.origin["revision"] == source.revision
  served.unlink()
  assert sources.read("aime25", "aime25", tmp_path / "data") == problems
  assert len(requests) == 2


@pytest.mark.parametrize("name", published.SOURCES)
def test_without_a_network_the_message_says_which_file_to_place(tmp_path, monkeypatch, name):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  source = published.SOURCES[name]
  with pytest.raises(InputError) as error:
    sources.read(name, name, tmp_path)
  said = str(error.value)
  assert said.startswith(f"{tmp_path / name}{Path(source.file).suffix} is not there")
  for part in (source.url, source.revision[:7], f"{source.rows:,} rows", ", ".join(source.columns),
               f"{name}.jsonl"):
    assert part in said
  assert "resolve/" + source.revision in source.url


def test_a_hub_that_does_not_answer_is_an_error_of_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  with pytest.raises(InputError, match=r"could not be downloaded \(.*refused\): place the file"):
    sources.read("math500", "math500", tmp_path)
  assert sources.count("math500", "math500", str(tmp_path)) == 500
  assert sources.count("dapo_math_17k", "labelled", str(tmp_path)) == 17_398
  for absent in ("nowhere.jsonl", "math500:nowhere.jsonl", "x:y.jsonl"):
    assert sources.count(absent, "x") is None
  lines(tmp_path, "math500", [{"problem": "1+1?", "answer": "2"}])
  assert sources.count("math500", "math500", str(tmp_path)) == 1


def test_the_files_are_those_that_others_pinned():
  # Revisions, sizes and checksums as an independent reproduction and other users of the files
  # recorded them; the numbers of rows are also those of the sets' own papers.
  table = {name: (source.revision[:7], source.sha256[:8], source.rows)
           for name, source in published.SOURCES.items()}
  assert table == {
      "dapo_math_17k": ("6e26a33", "c65f4724", 17_398),
      "math_train": ("0530c78", "eca6e667", 7_500),
      "math500": ("6e4ed1a", "35dc4108", 500), "aime24": ("2fe88a2", "26139847", 30),
      "aime25": ("563bb84", "b4e273c0", 30), "gsm8k_train": ("740312a", "ea82612e", 7_473),
      "gsm8k": ("740312a", "ee7b8da9", 1_319)}
