r"""Published sets of checked mathematics problems: the files, their revisions, their columns.

A set is named in `config.data`, as in `config.data.math500 = "math500"`. Its file is read from the
folder `config.data.dir`, where a user placed it, and otherwise downloaded to there. A file that was
placed may also have columns of its own: "problem" and "answer", both texts. An "id" of its own is
not read, because a problem's half follows its text alone.
"""

import hashlib
import os
import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from s2d_jax.data import jsonl, tables
from s2d_jax.errors import InputError
from s2d_jax.rewards import math as math_reward

Row = Mapping[str, Any]
_HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror
_SECONDS = 60  # without a byte before a download is given up

# The instruction around each problem of DAPO-Math-17k asks for "Answer:", and we ask for a box.
_DAPO_WRAPPER = re.compile(
    r"\A\s*Solve the following math problem step by step\. The last line of your response should "
    r"be of the form Answer: \$?Answer \(without quotes\) where \$?Answer is the answer to the "
    r"problem\.\s*|\s*Remember to put your answer on its own line after \"Answer:\"\.\s*\Z")
# GSM8K's solutions hold the calculator's input, as in 48/2 = <<48/2=24>>24.
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# An AIME's answer is an integer from 0 to 999; one source writes 336^\circ.
_AIME_ANSWER = re.compile(r"\s*\$?\s*(\d{1,3})(?:\.0)?\s*(?:\^\{?\\circ\}?)?\s*\$?\s*")


def _dapo(row: Row) -> dict[str, str | None]:
  """DAPO-Math-17k: "prompt" is a text or a chat, and the answer is reward_model's ground_truth."""
  prompt = row["prompt"]
  if not isinstance(prompt, str):
    (prompt,) = [message["content"] for message in prompt if message["role"] == "user"]
  answer = jsonl.answer_text(row["reward_model"]["ground_truth"])
  return {"problem": _DAPO_WRAPPER.sub("", prompt).strip(),
          "answer": answer if answer is None else answer.strip()}


def _math_train(row: Row) -> dict[str, str]:
  """MATH: the answer is in the last box of the solution, of which some have several."""
  answer = jsonl.answer_text(row.get("answer"))
  if answer is None:
    answer = math_reward.last_boxed(row["solution"]) or ""
  return {"problem": row["problem"], "answer": answer.strip(), "solution": row["solution"],
          **_subject(row)}


def _subject(row: Row) -> dict[str, str]:
  """{"subject"} of a row that names one, such as "Algebra": MATH has it under "type"."""
  found = row.get("subject", row.get("type"))
  return {"subject": found} if isinstance(found, str) else {}


def _with_answer(row: Row) -> dict[str, str]:
  """MATH-500: the columns "problem", "answer" and "solution"."""
  return {"problem": row["problem"], "answer": jsonl.answer_text(row["answer"]),
          "solution": row["solution"], **_subject(row)}


def _aime(row: Row) -> dict[str, str]:
  """AIME: the column "answer", because a box of the solution may hold something else."""
  found = _AIME_ANSWER.fullmatch(str(row["answer"]))
  if found is None:
    raise ValueError(f"{row['answer']!r} is not an integer from 0 to 999")
  return {"problem": row["problem"], "answer": str(int(found[1]))}


def _gsm8k(row: Row) -> dict[str, str]:
  """GSM8K: "answer" is the working, and the answer stands behind its last ####."""
  if not isinstance(row["answer"], str):
    raise ValueError(f"its answer is {row['answer']!r}, not a text")
  working, marker, answer = row["answer"].rpartition("####")
  if not marker:
    raise ValueError("its answer has no ####")
  answer = answer.strip().replace(",", "")
  solution = f"{_CALCULATOR.sub('', working).strip()}\n\\boxed{{{answer}}}"
  return {"problem": row["question"], "answer": answer, "solution": solution}


class Source(NamedTuple):
  """A published file of problems."""
  repository: str            # of Hugging Face's data sets
  revision: str
  file: str
  sha256: str
  rows: int
  columns: tuple[str, ...]   # that `convert` reads
  # a row -> problem, answer, and where it has them solution and subject
  convert: Callable[[Row], dict[str, str | None]]

  @property
  def url(self) -> str:
    """The address of the file at its revision."""
    hub = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    return f"{hub}/datasets/{self.repository}/resolve/{self.revision}/{self.file}"


# DAPO's upload repeats each problem a hundred times; this file has the 17,398 distinct ones. Of
# MATH's 7,500 rows one repeats a problem.
SOURCES = {
    "dapo_math_17k": Source(
        "YouJiacheng/DAPO-Math-17k-dedup", "6e26a33abdabd3e6aaa1d742326b790758f7dbc5",
        "distinct-prompts-with-rewards.parquet",
        "c65f47247b9b13cb62321462243c2d1fe8d4ede2d800644a7dda61fea76d4286", 17_398,
        ("prompt", "reward_model"), _dapo),
    "math_train": Source(
        "DigitalLearningGmbH/MATH-lighteval", "0530c78699ea5e8eb5530600900e1f328b48acad",
        "data/train-00000-of-00001.parquet",
        "eca6e667f4305dd5e5ba09b4fd55e7f3174a0fbe361cdfd4c44758b593a76933", 7_500,
        ("problem", "solution"), _math_train),
    "math500": Source(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", 500,
        ("problem", "answer", "solution"), _with_answer),
    "aime24": Source(
        "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        "data/train-00000-of-00001.parquet",
        "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf", 30,
        ("problem", "answer"), _aime),
    "aime25": Source(
        "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test.jsonl",
        "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331", 30,
        ("problem", "answer"), _aime),
    "gsm8k_train": Source(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866",
        "main/train-00000-of-00001.parquet",
        "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d", 7_473,
        ("question", "answer"), _gsm8k),
    "gsm8k": Source(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866",
        "main/test-00000-of-00001.parquet",
        "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59", 1_319,
        ("question", "answer"), _gsm8k),
}


def placed(name: str, folder: str | os.PathLike) -> list[Path]:
  """The files of a published set that are in a folder."""
  names = (f"{name}.jsonl", f"{name}.parquet")
  return [path for path in (Path(folder).expanduser() / name for name in names) if path.exists()]


def locate(name: str, folder: str | os.PathLike) -> Path:
  """The file of a published set in a folder: placed there by a user, or downloaded now.

  Raises:
    InputError: two files are there, or none is and the download fails; says what to place where.
  """
  source = SOURCES[name]
  target = Path(folder).expanduser() / (name + Path(source.file).suffix)
  found = placed(name, folder)
  if len(found) > 1:
    raise InputError(f"{found[0]} and {found[1]} both exist: keep one of them.")
  if found:
    return found[0]
  try:
    _download(source, target)
  except (OSError, ValueError) as error:
    reason = getattr(error, "reason", error)
    raise InputError(
        f"{target} is not there and could not be downloaded ({reason}): place the file of {name} "
        f"there, from {source.url} (revision {source.revision[:7]}, {source.rows:,} rows, columns "
        f"{', '.join(source.columns)}), or JSON lines of problem and answer as {name}.jsonl."
        ) from error
  return target


def _download(source: Source, target: Path) -> None:
  """Fetches a source's file; the target appears whole and with the published bytes, or not."""
  if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
    raise ValueError("HF_HUB_OFFLINE is set")
  target.parent.mkdir(parents=True, exist_ok=True)
  logging.warning("downloading %s to %s", source.url, target)
  with urllib.request.urlopen(source.url, timeout=_SECONDS) as reply:
    data = reply.read()
  digest = hashlib.sha256(data).hexdigest()
  if digest != source.sha256:
    raise ValueError(f"{source.url} has SHA-256 {digest[:12]}, not {source.sha256[:12]}")
  # Another process may download it too: each writes a file of its own, and both are whole.
  partial = target.with_name(f".{target.name}.{os.getpid()}")
  partial.write_bytes(data)
  partial.replace(target)


def rows(name: str, path: Path) -> list[dict[str, Any]]:
  """The distinct problems of a file of a published set, in order, each with an id.

  A row with other columns than the source's may be in our own: "problem" and "answer". Every id is
  a hash of the problem's text: halves follow it, and are equal whatever the file's columns. Rows
  that repeat a problem or have no answer are left out, with a warning that counts them.

  Raises:
    InputError: a row has neither the source's columns nor ours, or no row has an answer; names the
      file, and the row and its columns.
  """
  source = SOURCES[name]
  found: dict[str, dict[str, Any]] = {}
  counts = {"repeat a problem": 0, "repeat a problem with another answer": 0, "have no answer": 0}
  for row_name, row in tables.objects(path, ("id", "problem", "answer", "solution", "subject",
                                             "type", *source.columns)):
    new = _converted(source, row_name, row)
    first = found.setdefault(new["problem"], new)
    if not new["answer"]:
      counts["have no answer"] += 1
    elif first is not new:
      counts["repeat a problem"] += 1
      counts["repeat a problem with another answer"] += first["answer"] != new["answer"]
  for words, count in counts.items():
    if count:
      logging.warning("%s: %d rows %s and are left out", path, count, words)
  # After the loop, so that a repetition of a row without an answer is found as one.
  answered = [row for row in found.values() if row["answer"]]
  if not answered:
    raise InputError(f"{path} has no problem with an answer: download {source.url} again.")
  return answered


def _converted(source: Source, row_name: str, row: Row) -> dict[str, Any]:
  """A row's id, problem, answer and perhaps solution."""
  if not set(source.columns) <= row.keys():
    try:
      new = jsonl.row(row_name, dict(row))
      return new | {"id": jsonl.text_id(new["problem"])}
    except InputError as error:
      raise InputError(f"{error} Or take the columns of {source.repository}: "
                       f"{', '.join(source.columns)}.") from error
  try:
    new = source.convert(row)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(f"{row_name} is not a row of {source.repository} ({error}): its columns are "
                     f"{', '.join(source.columns)}.") from error
  for key, text in new.items():
    if not isinstance(text, str) or key == "problem" and not text:
      raise InputError(f"{row_name} has no text under {key}: download {source.url} again.")
  return {"id": jsonl.text_id(new["problem"]), **new}
