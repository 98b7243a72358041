"""`s2d-jax eval`: the scores of a shipped model are those that its samples give by hand."""

import argparse
import contextlib
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import arithmetic
from s2d_jax import chat, command, evals, evaluate, sampler, tasks
from s2d_jax.errors import InputError
from s2d_jax.models import hf
from s2d_jax.rewards import math as math_reward
from s2d_jax.sampler import __main__ as sample
from tests import test_chat


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


@pytest.mark.medium
def test_greedy_scores_are_the_share_of_right_answers(data, capsys, tmp_path):
  # Of one sample avg@1 and pass@1 are one number: the share of 256 problems, a multiple of 1/256.
  teacher = arithmetic.get_config().teacher
  out = tmp_path / "scores.json"
  evaluate.main(["--model", teacher, "--task=arithmetic", f"--data={data}", "--sets=validation",
                 "--k=1", "--temperature=0", "--max-tokens=32", f"--out={out}",
                 f"--compilation-cache={tmp_path / 'programs'}"])
  # Its programs are stored as a run's are, in the folder of this kind of CPU.
  assert len(list(tmp_path.glob("programs/cpu-*/jit_decode*"))) > 0
  first, *lines = capsys.readouterr().out.splitlines()
  assert first.split() == ["validation", "problems", "256"]
  found = [re.fullmatch(r"(\S+) +(\S+) +(\S+) \[(\S+), (\S+)\]", line).groups() for line in lines]
  assert {row[0] for row in found} == {"validation"}
  assert [row[1] for row in found] == ["avg@1", "pass@1", "truncated", "format",
                                     "response_length"]
  *found, _, _, _ = found
  (value,) = {float(row[2]) for row in found}
  assert 0.5 < value <= 1 and abs(256 * value - round(256 * value)) < 0.13
  assert all(float(low) <= value <= float(high) for *_, low, high in found)
  # The file has the same scores, and the samples from which they follow.
  stored = json.loads(out.read_text())
  assert stored["flags"]["model"] == teacher and stored["flags"]["k"] == 1
  result = stored["sets"]["validation"]
  correct_PG = np.array(result["samples"]["sampled"]["correct_PG"])
  assert correct_PG.shape == (256, 1) and abs(correct_PG.mean() - value) < 0.0005
  assert result["scores"]["avg@1"][0] == pytest.approx(correct_PG.mean(), abs=1e-7)
  assert list(stored["sets"]) == ["validation"]


def test_arithmetic_is_read_where_a_run_reads_it(monkeypatch):
  assert tasks.FOLDERS["arithmetic"] == arithmetic.get_config().data.dir
  folders = []
  monkeypatch.setitem(tasks.TASKS, "arithmetic", lambda config: folders.append(config.data.dir))
  with pytest.raises(AttributeError):  # no task came back
    evaluate.main(["--model=m", "--task=arithmetic", "--sets=validation"])
  assert folders == [arithmetic.get_config().data.dir]


@pytest.mark.parametrize("flags, said", [
    (["--k=0"], "--k is 0: set it to a whole number of at least 1."),
    (["--max-tokens=0"], "--max-tokens is 0: set it to a whole number"),
    (["--batch=0"], "--batch is 0: set it to a whole number"),
    (["--temperature=-1"], "--temperature is -1.0: choose 0 (greedy), or 0.0001 or more."),
    (["--temperature=0", "--k=4"], "--k is 4 and --temperature 0 gives the same answer 4 times: "
                                   "set --k 1, or a temperature above 0."),
    (["--temperature=nan"], "--temperature is nan: choose 0 (greedy), or 0.0001 or more."),
    (["--top-p=2"], "--top-p is 2.0: choose it above 0, up to 1 (off)."),
    (["--seed=-1"], "--seed is -1: set it to a whole number"),
    (["--cache-gib=-1"], "--cache-gib is -1.0: choose a number above 0, or 0 for what the device "),
    (["--top-k=-1"], "--top-k is -1: choose 0 (off) or more."),
    (["--compilation-cache=/dev/null/x"], "--compilation-cache is '/dev/null/x': name a folder "
                                       "that can be written, or choose 'auto', or '' to store no "),
    (["--cache-gib=1e-9", "--max-tokens=32"], "--cache-gib is 1e-09, and one row of"),
    (["--task=math"], "data/validation.jsonl is not a file"),
    (["--max-tokens=99999"], "lower --max-tokens."),
    (["--sets=math500,,a"], "--sets is 'math500,,a': write names with one comma between them, "),
    (["--task=chess"], "argument --task: invalid choice: 'chess'"),
])
def test_a_wrong_line_is_one_sentence(data, capsys, monkeypatch, tmp_path, flags, said):
  monkeypatch.chdir(tmp_path)
  line = ["--model", arithmetic.get_config().student, "--task=arithmetic", "--sets=validation"]
  data_flag = [] if "--task=math" in flags else [f"--data={data}"]
  with pytest.raises(SystemExit) as error:
    command.call(evaluate.main, [*line, *data_flag, *flags])
  (sentence,) = capsys.readouterr().err.splitlines()
  assert error.value.code == 2 and sentence.startswith("s2d_jax: ") and said in sentence


# Chained additions, as the shipped models learned them.
ROWS = [{"id": i, "problem": text, "answer": f"{answer:02}"} for i, (text, answer) in enumerate(
    [("12+34", 46), ("50+7+8", 65), ("99+1", 0), ("3+4+5", 12), ("20+20", 40), ("8+9", 17)])]


@pytest.fixture
def small(monkeypatch):
  make_small(monkeypatch)


def make_small(monkeypatch):
  """The task arithmetic has six problems in each of the sets a and b; b's answers are wrong."""
  spoilt = [row | {"answer": "x"} for row in ROWS]
  def task(config):
    shipped = tasks.arithmetic(config)
    return shipped._replace(source={"a": ROWS, "b": spoilt}.__getitem__)
  monkeypatch.setitem(tasks.TASKS, "arithmetic", task)


def scored(tmp_path, *flags, out="scores.json", sets="a"):
  """The stored result of a call on the shipped teacher: three samples of each problem."""
  evaluate.main(["--model", arithmetic.get_config().teacher, "--task=arithmetic", f"--sets={sets}",
                 "--k=3", "--max-tokens=24", "--batch=2",
                 # Shared by the tests of a session.
                 f"--compilation-cache={tmp_path.parent / 'programs'}",
                 f"--out={tmp_path / out}", *flags])
  return json.loads((tmp_path / out).read_text())["sets"]


def lines(path):
  return {(row["id"], row["sample"]): row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The folder of one call on both sets, and its result."""
  folder = tmp_path_factory.mktemp("undisturbed")
  with pytest.MonkeyPatch.context() as monkeypatch:
    make_small(monkeypatch)
    return folder, scored(folder, sets="a,b")


@pytest.mark.medium
def test_every_sample_is_a_line_and_gives_the_scores(undisturbed):
  folder, result = undisturbed
  for name in ("a", "b"):
    rows = lines(folder / f"scores-{name}.jsonl")
    assert rows.keys() == {(i, g) for i in range(6) for g in range(3)}
    answers = [row["answer"] if name == "a" else "x" for row in ROWS]
    # By hand: the text behind the last "=" is the answer.
    right = [[int(rows[i, g]["response"].rpartition("=")[2] == answers[i]) for g in range(3)]
             for i in range(6)]
    samples = result[name]["samples"]["sampled"]
    assert samples["correct_PG"] == right
    assert samples["length_PG"] == [[len(rows[i, g]["tokens"]) for g in range(3)] for i in range(6)]
    cut = [[int(rows[i, g]["finish"] == "length") for g in range(3)] for i in range(6)]
    assert samples["truncated_PG"] == cut
    scores = result[name]["scores"]
    assert scores["avg@3"][0] == pytest.approx(np.mean(right))
    assert scores["pass@3"][0] == pytest.approx(np.mean(np.max(right, axis=1)))
    assert scores["truncated"][0] == pytest.approx(np.mean(cut))
    assert scores["format"][0] == pytest.approx(np.mean(np.array(samples["answer_PG"]) >= 0))
  assert result["a"]["scores"]["avg@3"][0] > 0 == result["b"]["scores"]["avg@3"][0]


def test_all_that_determines_a_score_is_stored_with_it(undisturbed):
  _, result = undisturbed
  a, b = result["a"]["settings"], result["b"]["settings"]
  teacher = arithmetic.get_config().teacher
  assert a["tokenizer"] == chat.Chat(teacher).fingerprint() and a["model"] == hf.identity(teacher)
  assert a["sampling"]["temperature"] == 1 and a["sampling"]["max_tokens"] == 24
  assert a["checker"]["reward"] == ["s2d_jax.rewards.arithmetic", "reward", 1]
  assert a["set"]["count"] == 6 and a["set"]["problems"] != b["set"]["problems"]
  assert evals.unlike(a, b) == []


class Stopped(Exception):
  """Raised where a kill would stop the process."""


@pytest.mark.medium
@pytest.mark.parametrize("rows, cut", [(0, False), (1, True), (7, False), (17, True), (18, False)])
def test_a_stopped_evaluation_continues(small, undisturbed, monkeypatch, tmp_path, rows, cut):
  written = []
  whole = sample.line
  def line(*args):
    if len(written) == rows:
      raise Stopped
    written.append(whole(*args))
    return written[-1]
  path = tmp_path / "scores-a.jsonl"
  with monkeypatch.context() as patch, contextlib.suppress(Stopped):
    patch.setattr(sample, "line", line)
    scored(tmp_path)
  before = path.read_bytes()
  assert before.count(b"\n") == rows
  if cut:  # the last line was not written whole
    path.write_bytes(before[:-9])
  sampled = []
  def counted(self, params, requests, *args, **kwargs):
    sampled.extend(requests)
    return sample_rows(self, params, requests, *args, **kwargs)
  sample_rows = sampler.Sampler.sample_rows
  monkeypatch.setattr(sampler.Sampler, "sample_rows", counted)
  (tmp_path / "scores.json").unlink(missing_ok=True)  # of 18 rows the scores were written too
  result = scored(tmp_path)
  assert len(sampled) == 18 - (rows - cut)
  assert path.read_bytes().startswith(before[: before[:-9].rfind(b"\n") + 1 if cut else None])
  folder, whole_result = undisturbed
  assert result == {"a": whole_result["a"]}
  assert {key: row["tokens"] for key, row in lines(path).items()} == {
      key: row["tokens"] for key, row in lines(folder / "scores-a.jsonl").items()}


@pytest.mark.medium
def test_a_finished_set_is_not_scored_again(small, undisturbed, monkeypatch, tmp_path, capsys):
  folder, result = undisturbed
  shutil.copy(folder / "scores.json", tmp_path)
  monkeypatch.setattr(hf, "load", None)
  assert scored(tmp_path, sets="a,b") == result
  assert "avg@3" in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [
    (["--temperature=0.5"], "sampling (--temperature 1.0 there, 0.5 here)"),
    (["--top-p=0.9"], "sampling (--top-p 1.0 there, 0.9 here)"),
    (["--top-k=3", "--k=2"], "sampling (--k 3 there, 2 here; --top-k 0 there, 3 here)"),
    (["--min-p=0.1"], "sampling (--min-p 0.0 there, 0.1 here)"),
    (["--max-tokens=20"], "sampling (--max-tokens 24 there, 20 here)"),
    (["--seed=1"], "seed"), (["--dtype=bfloat16"], "dtype"),
    (["--model", arithmetic.get_config().student], "model"),
    (["--model", arithmetic.get_config().student, "--seed=1"], "model and seed"),
])
def test_unlike_scores_do_not_share_a_file(small, undisturbed, tmp_path, flags, named):
  folder, result = undisturbed
  (tmp_path / "scores.json").write_text(json.dumps({"sets": {"a": result["a"]}}))
  sentence = re.escape(f"has scores of a with another {named}, to which")
  with pytest.raises(InputError, match=sentence):
    scored(tmp_path, *flags, sets="b")


def test_scores_of_another_checker_are_unlike(undisturbed):
  settings = undisturbed[1]["a"]["settings"]
  for change in ({"checker": settings["checker"] | {"packages": {"math-verify": "0.8"}}},
                 {"checker": settings["checker"] | {"reward": ["x", "reward", 2]}},
                 {"tokenizer": "another template"}):
    assert evals.unlike(settings, settings | change) == list(change)
  assert evals.unlike(settings, {}) == sorted(settings.keys() - {"set"})


@pytest.mark.medium
def test_another_check_reads_the_samples_again(small, undisturbed, monkeypatch, tmp_path):
  folder, result = undisturbed
  for file in folder.glob("scores-a.jsonl*"):
    shutil.copy(file, tmp_path)
  task = tasks.TASKS["arithmetic"]
  monkeypatch.setitem(tasks.TASKS, "arithmetic",
                      lambda config: task(config)._replace(reward=lambda problem, text: 1.0))
  monkeypatch.setattr(sampler.Sampler, "sample_rows", None)
  found = scored(tmp_path)
  # All six are right: the exact interval of a rate, by hand 0.025^(1/6).
  assert found["a"]["scores"]["avg@3"] == pytest.approx([1, 0.025 ** (1 / 6), 1])
  assert evals.unlike(found["a"]["settings"], result["a"]["settings"]) == ["checker"]


@pytest.mark.parametrize("line, reason", [
    ('{"id": 0, "prompt": "%s", "sample": 5}', "is not a sample"),
    ('{"id": 0, "prompt": "%s", "sample": 5, "tokens": "7", "finish": "stop"}', "is not a sample"),
    ('{"id": 0, "prompt": "%s", "sample": 5, "tokens": [7], "finish": "none"}', "is not a sample"),
    ('{"id": 0, "prompt": "%s", "sample": 5, "tokens": [.5], "finish": "stop"}', "is not"),
    ('{"id": 0, "prompt": "%s", "sample": 5, "tokens": null, "finish": "stop"}', "is not a sample"),
    ('{"id": 0, "prompt": "00000000", "sample": 5}', "has samples of another prompt with the id 0"),
    ("{}", "is not a sample"), ("[", "is not"),
    *(('{"id": 0, "prompt": "%s", "sample": 5, "finish": "stop", "tokens": ' + tokens + "}",
       "line 19 is not a sample: take the line out") for tokens in (
           "[true]", "[-1]", "[24]", "[9999999999]", "[]", "[" + "7," * 24 + "7]", "{}", "[[7]]")),
    ('{"id": 0, "prompt": "%s", "sample": 0, "tokens": [7], "finish": "stop"}', "line 19 has samp"),
    ("\x00", "is not a sample"), ("", "is not a sample"),
])
def test_a_wrong_line_of_a_file_of_samples_is_named(small, undisturbed, monkeypatch, tmp_path, line,
                                                    reason):
  folder, _ = undisturbed
  monkeypatch.setattr(hf, "load", None)  # refused before
  for file in folder.glob("scores-a.jsonl*"):
    shutil.copy(file, tmp_path)
  path = tmp_path / "scores-a.jsonl"
  first = next(iter(lines(path).values()))
  with open(path, "a") as file:
    file.write((line % first["prompt"] if "%s" in line else line) + "\n")
  with pytest.raises(InputError, match=reason):
    scored(tmp_path)


@pytest.fixture
def occupied(tmp_path):
  """A folder with a file, a folder where each output would be, and a long name."""
  (tmp_path / "file").write_text("1")
  for name in ("folder", "samples-a.jsonl", "lock-a.jsonl.settings.json"):
    (tmp_path / name).mkdir()
  return tmp_path


@pytest.mark.parametrize("out, reason", [
    ("", "cannot be written (Is a directory)"),
    ("folder", "folder cannot be written (Is a directory): choose another --out."),
    ("file/x.json", "file/x.json cannot be written (Not a directory): choose another --out."),
    ("file/a/b/x.json", "cannot be written (Not a directory): choose another --out."),
    ("x" * 300 + ".json", "cannot be written (File name too long): choose another --out."),
    ("/proc/x.json", "/proc/x.json cannot be written"), ("/proc/a/x.json", "cannot be written"),
    ("/dev/null/x.json", "/dev/null/x.json cannot be written (Not a directory)"),
    ("gs://bucket/x.json", "--out is 'gs://bucket/x.json', and samples and scores are written to"),
    ("samples.json", "samples-a.jsonl cannot be written (Is a directory): choose another --out."),
    ("lock.json", "lock-a.jsonl.settings.json cannot be written (Is a directory)"),
])
def test_a_place_that_cannot_be_written_is_refused(small, occupied, monkeypatch, capsys, out,
                                                   reason):
  monkeypatch.setattr(hf, "load", None)
  before = sorted(occupied.rglob("*"))
  path = out if "://" in out or out.startswith("/") else occupied / out
  with pytest.raises(SystemExit):
    command.call(evaluate.main, ["--model", arithmetic.get_config().teacher, "--task=arithmetic",
                                 "--sets=a", "--k=3", "--max-tokens=24", f"--out={path}"])
  (sentence,) = capsys.readouterr().err.splitlines()
  assert reason in sentence and sorted(occupied.rglob("*")) == before


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '{"sets": null}', '{"sets": []}', '{"sets": {"a": 3}}',
    '{"sets": {"a": {"scores": {}}}}', '{"sets": {"a": {"settings": {}}}}',
    '{"sets": {"a": {"settings": {}, "scores": []}}}',
    '{"sets": {"a": {"settings": {}, "scores": {"avg@3": 0.5}}}}',
    '{"sets": {"a": {"settings": {}, "scores": {"avg@3": [0.5, 0.1]}}}}',
    '{"sets": {"a": {"settings": {}, "scores": {"avg@3": [0.5, 0.1, "1"]}}}}', b"\xff", b"PAR1",
])
def test_a_file_that_holds_no_scores_is_refused(small, monkeypatch, tmp_path, text):
  monkeypatch.setattr(hf, "load", None)
  path = tmp_path / "scores.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(InputError, match=f"^{path} ") as error:
    scored(tmp_path)
  assert str(error.value).endswith(".")
  assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize("text", ["{", "[]", b"\xff\xfe", b"\x80", '{"seed": NaN}'])
def test_damaged_settings_of_samples_are_refused(small, undisturbed, monkeypatch, tmp_path, text):
  folder, _ = undisturbed
  for file in folder.glob("scores-a.jsonl*"):
    shutil.copy(file, tmp_path)
  monkeypatch.setattr(hf, "load", None)
  path = tmp_path / "scores-a.jsonl.settings.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(InputError, match=f"^{path} "):
    scored(tmp_path)


def flags(**changes):
  """The flags that `read_sets` reads."""
  return argparse.Namespace(**{"task": "math", "sets": "", "data": "data", "checker": "string",
                               "list_order": None} | changes)


def test_a_set_may_be_a_file(tmp_path):
  path = tmp_path / "mine.jsonl"
  path.write_text(json.dumps({"problem": "1+1", "answer": "2", "id": 4}) + "\n")
  (tmp_path / "other.jsonl").write_text(path.read_text())
  _, sets = evaluate.read_sets(flags(sets=f"new={path},other", data=str(tmp_path)))
  assert {name: list(one.problems) for name, one in sets.items()} == {"new": [4], "other": [4]}
  assert sets["new"].problems[4]["answer"] == "2"


@pytest.mark.parametrize("sets", ["", ",", "a,", "a,a", "a/b", "=x.jsonl", "a,b,a=x.jsonl"])
def test_wrong_names_of_sets_are_refused(sets):
  with pytest.raises(InputError, match="--sets is "):
    evaluate.read_sets(flags(sets=sets))


def rows_file(folder, name, answers, ids=None):
  path = folder / f"{name}.jsonl"
  path.write_text("".join(json.dumps(
      {"problem": f"p{i}", "answer": answer} | ({} if ids is None else {"id": ids[i]})) + "\n"
                          for i, answer in enumerate(answers)))
  return path


@pytest.mark.parametrize("answers, named", [
    (["5", "\\boxed{5}"], "the id 1 of the set mine (1 in all)"),
    (["She has 5.\n#### 5", "#### 5", "7"], "the ids 0, 1 of the set mine (2 in all)"),
    (["Answer: 5"], "the id 0 of the set mine (1 in all)"),
    (["N/A", "See solution"], "the ids 0, 1"),
    (["(5"] * 12, "the ids 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 others of the set mine (12 in all)")])
@pytest.mark.parametrize("checker", ["string", "verify"])
def test_answers_that_no_response_matches_are_refused_before_sampling(
    monkeypatch, tmp_path, answers, named, checker):
  monkeypatch.setattr(sampler, "read_folder", None)
  path = rows_file(tmp_path, "mine", answers, range(len(answers)))
  with pytest.raises(InputError) as error:
    evaluate.main(["--model=m", f"--sets=mine={path}", f"--checker={checker}",
                   f"--out={tmp_path / 'scores.json'}"])
  said = str(error.value)
  assert said.startswith("no response matches the answer of ") and named in said
  assert "write the answer alone" in said
  assert [file.name for file in tmp_path.iterdir()] == ["mine.jsonl"]


def test_every_row_of_a_placed_set_counts_whatever_its_ids(tmp_path):
  rows_file(tmp_path, "math500", ["5"] * 10, [i % 3 for i in range(10)])
  _, sets = evaluate.read_sets(flags(sets="math500", data=str(tmp_path)))
  assert len(sets["math500"].problems) == 10


def test_repeated_ids_of_a_set_are_refused(monkeypatch):
  again = [*ROWS, ROWS[2], ROWS[4] | {"problem": "other"}, ROWS[4]]
  monkeypatch.setitem(tasks.TASKS, "arithmetic", lambda config: tasks.arithmetic(
      config)._replace(source=lambda split: again))
  with pytest.raises(InputError, match=r"^the set a has the ids 2, 4 for two problems or more: "):
    evaluate.read_sets(flags(task="arithmetic", sets="a", data="x", checker=None))


def test_the_line_of_a_set_says_whether_it_is_the_published_one(tmp_path):
  path = rows_file(tmp_path, "math500", ["5"] * 10)
  _, sets = evaluate.read_sets(flags(sets=f"math500,mine={path}", data=str(tmp_path)))
  origin = sets["math500"].origin
  assert evaluate.origin_line({"count": 10, "origin": origin}) == (
      f"  10 of {path}, which is not the published file of math500 (500 rows)")
  assert evaluate.origin_line({"count": 500, "origin": origin | {"is_published": True}}) == (
      " 500 of the published set")
  for other in (None, sets["mine"].origin):
    assert evaluate.origin_line({"count": 10, "origin": other}) == "  10"


@pytest.mark.parametrize("line, said", [
    (["--checker=string", "--task=arithmetic"], "--checker is not read by the task arithmetic"),
    (["--list-order=any", "--task=arithmetic"], "--list-order is not read by the task arithmetic"),
    (["--checker=none"], "argument --checker: invalid choice: 'none'"),
    (["--list-order=none"], "argument --list-order: invalid choice: 'none'"),
    ([], "--checker is 'verify' and math-verify is not installed: pip install -e '.[math]', or "
         "set --checker to 'string'.")])
def test_a_wrong_checker_names_the_flag(monkeypatch, capsys, tmp_path, line, said):
  monkeypatch.setattr(math_reward, "INSTALLED", False)
  with pytest.raises(SystemExit):
    command.call(evaluate.main, ["--model=m", "--sets=a", f"--data={tmp_path}", *line])
  (sentence,) = capsys.readouterr().err.splitlines()
  assert said in sentence and "config." not in sentence


def test_the_flags_of_the_check_are_those_of_a_config(tmp_path):
  path = rows_file(tmp_path, "mine", ["1,2"])
  found = {}
  for checker, order in itertools.product((None, "string", "verify"), (None, "any", "fixed")):
    task, _ = evaluate.read_sets(flags(sets=f"mine={path}", checker=checker, list_order=order))
    config = {key: value for key, value in (("checker", checker), ("list_order", order)) if value}
    assert task.checker() == tasks.math(ConfigDict({"data": {}, **config})).checker()
    found[checker, order] = task.checker()["reward"]
  assert found[None, None] == found["verify", "any"]  # the defaults
  # A score of another check is unlike, because this record is among its settings.
  assert len({str(found[key]) for key in itertools.product(("string", "verify"),
                                                          ("any", "fixed"))}) == 4


@pytest.mark.parametrize("before, arguments, origin, warned", [
    (test_chat.THINKING, {}, {"set": "math500"}, True),
    (test_chat.THINKING, {"enable_thinking": True}, {"set": "math500"}, False),
    (test_chat.THINKING, {}, None, False), ("", {}, {"set": "math500"}, False)])
def test_a_template_that_thinks_by_default_is_warned_of(capsys, tmp_path, before, arguments, origin,
                                                        warned):
  tokenizer = test_chat.opened(test_chat.written(tmp_path / "model"), before, **arguments)
  sets = {"mine": evaluate.ProblemSet({}, None), "b": evaluate.ProblemSet({}, origin)}
  evaluate._warn_of_thinking(sets, tokenizer)
  printed = capsys.readouterr().out
  assert len(printed.splitlines()) == warned
  assert not warned or printed.startswith("b ") and "--template enable_thinking=false" in printed


@pytest.mark.parametrize("share, warned", [(0.5, False), (0.51, True)])
def test_scores_of_truncated_samples_are_warned_of(capsys, share, warned):
  result = {"scores": {"truncated": [share] * 3}, "settings": {"set": {"count": 3}}}
  evaluate.print_result("a", result, 1024)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["a", "problems", "3"]
  assert ("warning" in lines[-1] and "raise --max-tokens" in lines[-1]) == warned


@pytest.mark.parametrize("share, warned", [(0.0, True), (0.09, True), (0.1, False), (1.0, False)])
def test_scores_of_samples_without_answers_are_warned_of(capsys, share, warned):
  result = {"scores": {"format": [share] * 3}, "settings": {"set": {"count": 3}}}
  evaluate.print_result("a", result, 1024)
  found = capsys.readouterr().out
  sentence = (f"{100 * (1 - share):.0f} % of the samples have no answer that can be read, such as "
              "one in \\boxed{}, and count as wrong")
  assert (sentence in found) == warned
