"""Signals and lost processes, each in processes of a small program that does nothing else."""

import os
import pathlib
import re
import signal
import socket
import time

import pytest

from tests import interpreter

# A run without models: about twenty calls of `stop` a second.
PROGRAM = """
import os, pathlib, sys, time
from s2d_jax import supervisor
supervisor.begin([])
import jax
from s2d_jax import command, hosts, stops

process, count, port, kind, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
jax.config.update("jax_platforms", "cpu")
stops.LOST_SECONDS = 4.0
stops._GRACE_SECONDS = 2.0
stops.START_SECONDS = 6.0
if count > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  initialize = jax.distributed.initialize
  jax.distributed.initialize = lambda **seconds: initialize(
      f"localhost:{port}", count, process, **seconds)

def ready():
  pathlib.Path(folder, f"ready-{process}").write_text(str(os.getpid()))

if kind == "hears nothing":
  stops.Watch._hear = lambda self: {}

def work(argv):
  if kind == "joins":
    ready()
  with stops.watch(command.outcome, joins=count > 1), stops.requests() as stop:
    if kind == "starts":
      ready()
      time.sleep(60)  # as a compilation, which a signal handler of Python does not end
    if kind == "one compiles" and process == 1:
      ready()
      time.sleep(60)
    if kind == "one saves last":
      hosts.gather("last step", 0)
      with stops.deferred():
        ready()
        time.sleep(4 if process == 0 else 0)  # nothing calls `stop` again
      hosts.gather("exported", 0)
    with stops.deferred():
      for step in range(1200):
        if stop():
          print("saved", step)
          raise SystemExit(75)
        if step == 5:
          ready()
        if kind == "one compiles":
          ready()
          hosts.agree("program", "text")  # waits for the process that compiles
        if step == 10 and kind == "out of memory":
          raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")
        if step == 10 and kind == f"{process} fails":
          raise ValueError("a fault of the code")
        # They do not run in step.
        time.sleep(60 if step == 10 and kind == "hangs" else 0.05 + 0.02 * process)

command.call(work, [])
"""

# It runs the program in a child.
SUPERVISED = """
import sys
from s2d_jax import supervisor
sys.exit(supervisor.run([sys.executable, "-c", *sys.argv[1:]]))
"""


@pytest.fixture
def begin(tmp_path):
  """begin(count, kind): starts the processes of a run; returns them once each works."""
  started = []

  def begin(count, kind, missing=(), supervised=False):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    processes = [p for p in range(count) if p not in missing]
    program = ("-c", SUPERVISED, PROGRAM) if supervised else ("-c", PROGRAM)
    started.extend(interpreter.start(*program, p, count, port, kind, tmp_path) for p in processes)
    deadline = time.monotonic() + 60
    # Where one is missing, the others work on nothing yet.
    while (kind == "joins" or not missing) and time.monotonic() < deadline and any(
        not (tmp_path / f"ready-{p}").exists() for p in processes):
      time.sleep(0.02)
    return list(started)

  yield begin
  for process in started:
    process.close()


def send(process, number):
  os.kill(process.process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_saves_and_the_run_can_go_on(begin, number):
  (process,) = begin(1, "steps")
  send(process, number)
  done = process.wait(60)
  assert done.returncode == 75 and "saved" in done.stdout
  assert f"{number.name} came to process 0" in done.stderr and "A second signal" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_second_signal_exits_at_once(begin):
  (process,) = begin(1, "hangs")
  time.sleep(1)
  send(process, signal.SIGTERM)
  time.sleep(1.5)
  assert process.process.exitcode is None  # it waits for a moment to save
  send(process, signal.SIGTERM)
  done = process.wait(30)
  assert done.returncode == 128 + signal.SIGTERM
  assert "without saving" in done.stderr


def test_a_signal_where_nothing_is_unsaved_does_not_wait_for_the_main_thread(begin):
  (process,) = begin(1, "starts")
  send(process, signal.SIGTERM)
  done = process.wait(30)
  assert done.returncode == 75 and "the same command goes on" in done.stderr


def test_a_signal_that_comes_again_after_the_save_changes_no_code(begin):
  (process,) = begin(1, "steps")
  for _ in range(40):
    send(process, signal.SIGTERM)
    time.sleep(0.02)
    if process.process.exitcode is not None:
      break
  done = process.wait(60)
  assert done.returncode == 75 and "saved" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_processes_join_exits_at_once(begin, number):
  (process,) = begin(2, "joins", missing=(1,))
  time.sleep(1)
  send(process, number)
  start = time.monotonic()
  assert process.wait(30).returncode == 75 and time.monotonic() - start < 5


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_second_signal_to_one_of_several_exits_at_once(begin, signalled):
  processes = begin(2, "hangs")
  send(processes[signalled], signal.SIGTERM)
  time.sleep(2)
  send(processes[signalled], signal.SIGTERM)
  start = time.monotonic()
  done = processes[signalled].wait(30)
  assert done.returncode == 143 and time.monotonic() - start < 3
  assert "without saving" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one compiles", "one saves last"])
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_processes_at_different_places_ends_all_with_the_retry_code(
    begin, kind, signalled):
  processes = begin(2, kind)
  time.sleep(0.5)
  send(processes[signalled], signal.SIGTERM)
  start = time.monotonic()
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [75, 75], [d.stderr for d in done]
  assert time.monotonic() - start < 30
  assert all("Check failure" not in d.stderr and "Traceback" not in d.stderr for d in done)


@pytest.mark.slow
def test_a_frozen_coordinator_ends_the_others_with_its_name(begin):
  processes = begin(2, "steps")
  time.sleep(2)
  send(processes[0], signal.SIGSTOP)  # as a host without power: no connection is closed
  done = processes[1].wait(60)
  assert done.returncode == 75
  assert f"process 0 on {socket.gethostname()} has not answered for 4 s" in done.stderr


@pytest.mark.slow
def test_an_error_of_jax_that_is_not_of_a_connection_ends_all_soon(begin):
  processes = begin(2, "out of memory")
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [1, 1]
  assert all("RESOURCE_EXHAUSTED" in d.stderr and "ended" in d.stderr for d in done)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_all_at_one_call(begin, signalled):
  processes = begin(3, "steps")
  send(processes[signalled], signal.SIGTERM)
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [75, 75, 75], [d.stderr for d in done]
  (step,) = {d.stdout for d in done}
  assert step.startswith("saved")
  assert all(f"came to process {signalled} on {socket.gethostname()}" in d.stderr for d in done)


@pytest.mark.slow
def test_signals_to_all_processes_are_one_stop(begin):
  processes = begin(3, "steps")
  # The last one hears of the first one's before it gets a signal.
  for process in processes[1:]:
    send(process, signal.SIGTERM)
    send(process, signal.SIGTERM)
  time.sleep(1.5)
  send(processes[0], signal.SIGTERM)
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [75, 75, 75], [d.stderr for d in done]
  assert len({d.stdout for d in done}) == 1 and "saved" in done[0].stdout


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_its_name(begin):
  processes = begin(3, "steps")
  send(processes[1], signal.SIGKILL)
  start = time.monotonic()
  done = [processes[p].wait(90) for p in (0, 2)]
  assert time.monotonic() - start < 60  # four seconds of silence; JAX alone takes 100
  assert [d.returncode for d in done] == [75, 75]
  for d in done:
    assert f"process 1 on {socket.gethostname()} has been silent for 4 s" in d.stderr
    assert "Check failure" not in d.stderr


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_others_with_its_reason(begin, failing):
  processes = begin(2, f"{failing} fails")
  done = [process.wait(90) for process in processes]
  assert [d.returncode for d in done] == [1, 1], [d.stderr for d in done]
  assert "an unexpected ValueError" in done[failing].stderr
  assert f"process {failing} on" in done[1 - failing].stderr
  assert "a fault of the code" in done[1 - failing].stderr


@pytest.mark.slow
def test_processes_that_are_not_all_started_end_with_a_sentence(begin):
  for process in begin(3, "steps", missing=(1,)):
    done = process.wait(90)
    assert done.returncode == 1
    assert "not all processes were started within 6 s" in done.stderr


def child(tmp_path, process):
  """The number of the process that works, where another one supervises it."""
  return int((tmp_path / f"ready-{process}").read_text())


def runs(process):
  """Whether a process of this number runs."""
  # One that has ended may stay listed, without a command line, until its parent takes note.
  try:
    return pathlib.Path(f"/proc/{process}/cmdline").read_bytes() != b""
  except OSError:
    return False


@pytest.mark.slow
def test_a_killed_process_0_is_named_by_the_parents_of_the_others(begin, tmp_path):
  processes = begin(2, "steps", supervised=True)
  time.sleep(3)  # until each has heard of the other
  os.kill(child(tmp_path, 0), signal.SIGKILL)
  start = time.monotonic()
  done = [process.wait(60) for process in processes]
  assert time.monotonic() - start < 20
  assert [d.returncode for d in done] == [128 + signal.SIGKILL, 75], [d.stderr for d in done]
  host = socket.gethostname()
  assert f"process 0 on {host} was ended by SIGKILL, as by the system where" in done[0].stderr
  assert f"process 1 on {host} was aborted, because process 0 on {host} is gone" in done[1].stderr
  for d in done:
    assert not re.search(r"Check failure|^ +@|client\.h|coordination_service_agent", d.stderr, re.M)


@pytest.mark.slow
def test_a_killed_process_0_is_named_before_it_was_heard(begin, tmp_path):
  processes = begin(2, "hears nothing", supervised=True)
  os.kill(child(tmp_path, 0), signal.SIGKILL)
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [128 + signal.SIGKILL, 75], [d.stderr for d in done]
  # By the host of the address, because its name is not known yet.
  assert "process 1 on" in done[1].stderr and "process 0 on localhost is gone" in done[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_parent_saves_in_all_processes(begin, number):
  processes = begin(2, "steps", supervised=True)
  send(processes[1], number)
  done = [process.wait(60) for process in processes]
  assert [d.returncode for d in done] == [75, 75], [d.stderr for d in done]
  assert all("saved" in d.stdout for d in done)


@pytest.mark.slow
def test_a_process_ends_where_its_parent_was_killed(begin, tmp_path):
  (process,) = begin(1, "hangs", supervised=True)
  send(process, signal.SIGKILL)
  process.wait(30)
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline and runs(child(tmp_path, 0)):
    time.sleep(0.2)
  assert not runs(child(tmp_path, 0))


@pytest.mark.slow
def test_an_abort_is_a_fault_where_process_0_lives(begin, tmp_path):
  processes = begin(2, "steps", supervised=True)
  time.sleep(3)
  os.kill(child(tmp_path, 1), signal.SIGABRT)
  done = [process.wait(60) for process in processes]
  assert done[1].returncode == 128 + signal.SIGABRT
  assert "process 1 on" in done[1].stderr and "was ended by SIGABRT" in done[1].stderr
  assert done[0].returncode == 75 and "has been silent" in done[0].stderr
