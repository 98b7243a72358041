"""Coordination of processes, on one; tests/end_to_end has several."""

import os
import signal
import types

import jax
import numpy as np

from s2d_jax import hosts
from tests import interpreter


def test_a_single_process_is_the_leader_and_needs_no_barrier():
  assert jax.process_count() == 1 and hosts.leader()
  hosts.barrier("a barrier of one process")
  own_B = np.arange(3.0)
  assert hosts.sum_over_hosts(own_B) is own_B
  hosts.agree("sampler", "text")


def test_distributed_without_a_cluster_is_one_sentence():
  done = interpreter.run("-c", "from s2d_jax import command, hosts\n"
                         "command.call(lambda argv: hosts.join(5), [])", env={"PATH": "/bin"})
  assert done.returncode == 2 and done.stderr == (
      "s2d_jax: --distributed finds no cluster on this machine: leave it out where one process "
      "does all the work, or start all processes by a launcher, such as launch/slurm.sh.\n")


def test_the_memory_of_a_device_is_the_least_of_all_processes(monkeypatch):
  assert hosts.device_memory() is None  # a CPU does not say
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5 * 2**30 + 7})
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert hosts.device_memory() == 5 * 2**30  # in whole MiB
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts, "sum_over_hosts", lambda own_P: own_P + np.array([0, 4096]))
  assert hosts.device_memory() == 4 * 2**30


def test_a_stop_signal_is_reported_and_the_former_handler_restored():
  before = signal.getsignal(signal.SIGTERM)
  with hosts.stop_signal() as stop:
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop()
  assert signal.getsignal(signal.SIGTERM) == before
