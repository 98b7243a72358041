"""The first seconds of a run, and what the parent of a process of several prints."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

from s2d_jax import hosts, supervisor

ROOT = pathlib.Path(__file__).parents[1]
# As the processes of jax 0.10.2 print it where process 0 was killed, behind a progress bar.
BAR = b"\rcold_grpo:   3%|2         | 5/200 [00:01<00:40,  4.81it/s]"
ABORT = b"""\
E1129 06:51:51.077598   23676 coordination_service_agent.cc:289] Polled an error from coordination \
service (this can be an error from this or another task).
F1129 06:51:51.077690   23676 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors.
Additional GRPC error information from remote target coordination_service:
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}
*** Check failure stack trace: ***
    @     0x7f4e51020634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
    @     0x7f4e584a71f5  (unknown)
"""
# An error of another part of a library keeps its message.
OTHER = b"F1129 06:51:51.077690   23676 buffer.cc:12] Check failed: a == b\n"
TRACE = b"*** Check failure stack trace: ***\n    @     0x7f4e51020634  absl::Flush()\n"
LINES = b"E is a word\n  @ home\n*** a title ***\nan E1129 06:51 in a line\n"


def test_the_retry_code_is_that_of_the_run():
  assert supervisor.RETRY == hosts.RETRY


@pytest.mark.parametrize("printed, expected", [
    (BAR + ABORT + b"s2d_jax: a sentence.\n", BAR + b"s2d_jax: a sentence.\n"),
    (b"a line\n" + ABORT, b"a line\n"), (OTHER + TRACE + b"end", OTHER + b"end"),
    (LINES, LINES), (b"E", b"E"), (BAR + b" E1129 06:51", BAR + b" E1129 06:51"),
    (BAR + ABORT[:200], BAR), (b"\r\n\n\r" + BAR, b"\r\n\n\r" + BAR)])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_abort_of_jax_is_left_out_and_all_else_printed(printed, expected, size):
  errors = supervisor.Filter()
  parts = [errors.feed(printed[i:i + size]) for i in range(0, len(printed), size)]
  assert b"".join(parts) + errors.end() == expected
  fatal = ABORT[:ABORT.index(b"\nAdditional")] in printed
  assert errors.message == ("Terminating process because the JAX distributed service detected "
                            "fatal errors." if fatal else "")


@pytest.mark.parametrize("part", [BAR, b"no end of a line", b"Epoch 3", b"  indented", b"**"])
def test_a_part_of_a_line_is_printed_at_once(part):
  errors = supervisor.Filter()
  if part == b"**":  # as a trace begins: it waits until the next byte says what it is
    assert errors.feed(part) == b"" and errors.feed(b"bold") == b"**bold"
  else:
    assert errors.feed(part) == part


def python(*words, **settings):
  """`python WORDS`, under way."""
  return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **settings)


@pytest.fixture
def slow_jax(tmp_path):
  """(environment where the import of JAX lasts a minute, the folder with a file of each such)."""
  (tmp_path / "jax").mkdir()
  (tmp_path / "imports").mkdir()
  (tmp_path / "jax" / "__init__.py").write_text(
      "import os, pathlib, time\n"
      f"pathlib.Path({str(tmp_path)!r}, 'imports', str(os.getpid())).write_text('')\n"
      "time.sleep(60)\n")
  return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, tmp_path / "imports"


CONSOLE = ("-c", "from s2d_jax import cli; cli.main()")


@pytest.mark.parametrize("words, number, code, sentence", [
    (("-m", "s2d_jax.main"), signal.SIGTERM, 75, "SIGTERM: nothing is unsaved, and the same"),
    (("-m", "s2d_jax.main"), signal.SIGINT, 75, "SIGINT: nothing is unsaved, and the same"),
    (("-m", "s2d_jax.main", "--distributed"), signal.SIGTERM, 75, "SIGTERM: nothing is unsaved"),
    ((*CONSOLE, "run"), signal.SIGINT, 75, "SIGINT: nothing is unsaved, and the same command"),
    ((*CONSOLE, "run", "--distributed"), signal.SIGHUP, 75, "SIGHUP: nothing is unsaved, and"),
    ((*CONSOLE, "doctor"), signal.SIGINT, 130, "stopped by Ctrl-C. What was saved holds"),
])
def test_a_signal_during_the_imports_is_a_sentence(words, number, code, sentence, slow_jax):
  env, imports = slow_jax
  process = python(*words, env=env)
  try:
    deadline = time.monotonic() + 60
    while not list(imports.iterdir()) and time.monotonic() < deadline:
      time.sleep(0.02)
    (worker,) = imports.iterdir()  # a parent imports no JAX
    assert (int(worker.name) == process.pid) == ("--distributed" not in words)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=30)
  finally:
    process.kill()
  (line,) = errors.splitlines()
  assert process.returncode == code and line.startswith(f"s2d_jax: {sentence}") and printed == ""


def test_a_signal_before_the_child_can_act_on_it_is_not_lost(slow_jax):
  env, _ = slow_jax
  # The signal comes when the child has just been started.
  program = ("import os, signal, subprocess, sys\nfrom s2d_jax import supervisor\n"
             "start = subprocess.Popen\n"
             "def popen(*words, **settings):\n"
             "  child = start(*words, **settings)\n"
             "  os.kill(os.getpid(), signal.SIGTERM)\n"
             "  return child\n"
             "subprocess.Popen = popen\nsupervisor.begin(['--distributed'])")
  process = python("-c", program, env=env)
  try:
    _, errors = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 75, errors
  assert errors.startswith("s2d_jax: SIGTERM: nothing is unsaved") and errors.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["-u"], ["-X", "utf8", "-W", "ignore", "-u"]])
@pytest.mark.parametrize("words", [["-c", "PROGRAM"], ["FILE", "run"], ["-m", "program"]])
def test_a_child_has_the_flags_of_the_interpreter(flags, words, tmp_path):
  program = ("import json, sys\nfrom s2d_jax import supervisor\n"
             "print(json.dumps(supervisor.command_line(sys.argv[-2:])))")
  (tmp_path / "program.py").write_text(program)
  words = [{"PROGRAM": program, "FILE": str(tmp_path / "program.py")}.get(w, w) for w in words]
  process = python(*flags, *words, "--distributed", "--x=a b",
                   env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
  printed, errors = process.communicate(timeout=30)
  assert json.loads(printed or "null") == [
      sys.executable, *flags, "-m", "s2d_jax.main", "--distributed", "--x=a b"], errors


SUPERVISED = ("-c", "import sys\nfrom s2d_jax import supervisor\n"
              "sys.exit(supervisor.run([sys.executable, '-c', *sys.argv[1:]]))")
PARENT = ("import os\nfrom s2d_jax import supervisor\n"
          "print(supervisor.parent() == os.getppid(), 'S2D_JAX_SUPERVISOR' in os.environ)\n")


def test_only_the_child_itself_has_a_parent():
  inner = f"{PARENT}supervisor.tell(1, 'a:1')"
  outer = f"{PARENT}import subprocess, sys\nsubprocess.run([sys.executable, '-uc', {inner!r}])"
  printed, errors = python("-u", *SUPERVISED, outer, env=os.environ | {"PYTHONUNBUFFERED": "1"}
                           ).communicate(timeout=30)
  assert (printed, errors) == ("True False\nFalse False\n", "")


def test_a_program_between_the_parent_and_this_process_is_no_parent():
  # As a shell that runs the command: the parent is one further up.
  inner = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {PARENT!r}])"
  printed, errors = python(*SUPERVISED, inner).communicate(timeout=30)
  assert (printed, errors) == ("False False\n", "")


def test_a_terminal_stays_one_for_the_child():
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (30, 77))
  program = ("import sys, termios\nprint(sys.stderr.isatty(), *termios.tcgetwinsize(2), end='', "
             "file=sys.stderr)")
  process = subprocess.Popen([sys.executable, *SUPERVISED, program], cwd=ROOT, stderr=theirs)
  os.close(theirs)
  assert process.wait(30) == 0
  assert os.read(ours, 1000) == b"True 30 77"
  os.close(ours)
