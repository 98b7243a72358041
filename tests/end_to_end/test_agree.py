"""Processes that are about to run different programs say so in time, and do not wait for ever."""

import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys, time
import jax
from s2d_jax import sharding
process, port, *turns = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
sharding.AGREE_SECONDS = 4
try:
  for text in turns:
    if text == "dead":
      time.sleep(8)
    sharding.agree("sampler", text)
  print("agreed", len(turns))
except RuntimeError as error:
  print("refused:", error)
time.sleep(6 if process == "0" else 0)  # process 0 serves the other
"""


def said(*turns):
  """What each of two processes says that compare these texts, one list a process."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  both = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(i), port, *own], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
          for i, own in enumerate(turns)]
  return [process.communicate(timeout=120)[0].strip() for process in both]


@pytest.mark.medium
def test_what_is_the_same_goes_on():
  assert said(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == ["agreed 4"] * 2


@pytest.mark.medium
def test_what_differs_is_named():
  for own, other, text in zip((0, 1), (1, 0), said(["a", "b"], ["a", "x"]), strict=True):
    assert text == (f"refused: processes {own} and {other} differ in turn 1 of the sampler: they "
                    "must run one program on the same data; start again from the checkpoint.")


@pytest.mark.medium
def test_who_does_not_come_is_named():
  here, _ = said(["a", "b"], ["a", "dead", "b"])
  assert here.startswith("refused: process 1 has not come to turn 1 of the sampler within 4 s")
