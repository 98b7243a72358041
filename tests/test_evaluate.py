"""`s2d-jax eval`: the scores of a shipped model are those that its samples give by hand."""

import json
import re

import numpy as np
import pytest

from configs import arithmetic
from s2d_jax import command, evaluate, tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


@pytest.mark.medium
def test_greedy_scores_are_the_share_of_right_answers(data, capsys, tmp_path):
  # Greedily every sample of a problem is the same, so avg@2, pass@2 and maj@2 are one number: the
  # share of 256 problems, a multiple of 1/256.
  teacher = arithmetic.get_config().teacher
  out = tmp_path / "scores.json"
  evaluate.main(["--model", teacher, "--task=arithmetic", f"--data={data}", "--sets=validation",
                 "--k=2", "--temperature=0", "--max-tokens=32", f"--out={out}",
                 f"--compilation-cache={tmp_path / 'programs'}"])
  # Its programs are stored as a run's are, in the folder of this kind of CPU.
  assert len(list(tmp_path.glob("programs/cpu-*/jit_decode*"))) > 0
  lines = capsys.readouterr().out.splitlines()
  found = [re.fullmatch(r"(\S+) +(\S+) +(\S+) \[(\S+), (\S+)\]", line).groups() for line in lines]
  assert {row[0] for row in found} == {"validation"}
  assert [row[1] for row in found] == ["avg@2", "pass@2", "maj@2", "truncated", "response_length"]
  *found, _, _ = found
  (value,) = {float(row[2]) for row in found}
  assert 0.5 < value <= 1 and abs(256 * value - round(256 * value)) < 0.13
  assert all(float(low) <= value <= float(high) for *_, low, high in found)
  # The file has the same scores, and the samples from which they follow.
  stored = json.loads(out.read_text())
  assert stored["flags"]["model"] == teacher and stored["flags"]["k"] == 2
  result = stored["sets"]["validation"]
  correct_PG = np.array(result["samples"]["sampled"]["correct_PG"])
  assert correct_PG.shape == (256, 2) and abs(correct_PG.mean() - value) < 0.0005
  assert result["scores"]["avg@2"][0] == pytest.approx(correct_PG.mean(), abs=1e-7)
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
    (["--temperature=-1"], "--temperature is -1.0: choose 0 (greedy) or more."),
    (["--temperature=nan"], "--temperature is nan: choose 0 (greedy) or more."),
    (["--top-p=2"], "--top-p is 2.0: choose it above 0, up to 1 (off)."),
    (["--seed=-1"], "--seed is -1: set it to a whole number"),
    (["--cache-gib=-1"], "--cache-gib is -1.0: choose a number above 0, or 0 for what the device "),
    (["--top-k=-1"], "--top-k is -1: choose 0 (off) or more."),
    (["--compilation-cache=/dev/null/x"], "--compilation-cache is '/dev/null/x': name a folder "
                                       "that can be written, or choose 'auto', or '' to store no "),
    (["--cache-gib=1e-9", "--max-tokens=32"], "--cache-gib is 1e-09, and one row of"),
    (["--task=math"], "data/validation.jsonl is not a file"),
    (["--max-tokens=99999"], "lower --max-tokens."),
    (["--sets=math500,,a"], "--sets is 'math500,,a': write names with one comma between them."),
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
