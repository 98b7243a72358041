"""Whole files, one writer, complete checkpoints or none."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from s2d_jax import checkpoint, files, hosts, sharding


def state(value, mesh):
  return {"w": sharding.put(np.full((8, 4), value, np.float32),
                            sharding.weight_sharding(mesh, ("embed", "mlp"), (8, 4)))}


def test_saved_on_one_mesh_restored_on_another(tmp_path):
  one, many = sharding.make_mesh((1, 1, 1)), sharding.make_mesh((2, 2, 2))
  steps = checkpoint.Checkpoints(tmp_path)
  assert steps.latest() is None
  for step in (2, 4, 6):
    steps.save(step, state(step, one))
  assert steps.latest() == 6
  got = steps.load(sharding.abstract(state(0, many)))
  steps.close()
  np.testing.assert_array_equal(got["w"], np.full((8, 4), 6, np.float32))
  assert got["w"].sharding == state(0, many)["w"].sharding
  kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert kept == ["4", "6"]
  checkpoint.save_final(tmp_path, state(9, one))
  checkpoint.save_final(tmp_path, state(9, one))  # done again after a kill: replaced
  checkpoint.drop_steps(tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["final"]
  final = checkpoint.load_final(tmp_path, sharding.abstract(state(0, many)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 9, np.float32))


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  mesh = sharding.make_mesh((1, 1, 1))
  steps = checkpoint.Checkpoints("runs/stage")
  steps.save(1, state(3, mesh))
  steps.close()
  checkpoint.save_final("runs/stage", state(4, mesh))
  final = checkpoint.load_final("runs/stage", sharding.abstract(state(0, mesh)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 4, np.float32))
  assert sorted(p.name for p in (tmp_path / "runs/stage/checkpoints").iterdir()) == ["1", "final"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "deep" / "x.json"
  files.write_json(path, {"b": 1, "a": [2]})
  assert path.read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
  with pytest.raises(ValueError):
    files.write_json(path, {"a": float("nan")})
  assert files.read_json(path) == {"a": [2], "b": 1}
  assert [p.name for p in path.parent.iterdir()] == ["x.json"]  # no temporary is left


def test_a_second_writer_is_refused_and_a_dead_one_replaced(tmp_path, capsys):
  path = tmp_path / "writer.lock"
  sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  other = {"host": socket.gethostname(), "pid": sleeper.pid, "beat": time.time() - 5}
  path.write_text(json.dumps(other))
  try:
    with pytest.raises(ValueError, match=rf"process {sleeper.pid} .*delete .*writer.lock"):
      with files.only_writer(tmp_path):
        pass
  finally:
    sleeper.kill()
    sleeper.wait()
  with files.only_writer(tmp_path) as (beat, left):
    assert left == other["beat"]
    assert files.read_json(path)["pid"] == os.getpid()
    beat()
  assert "taking over" in capsys.readouterr().out
  assert not path.exists()


def test_another_host_is_believed_for_an_hour(tmp_path):
  path = tmp_path / "writer.lock"
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 600}))
  with pytest.raises(ValueError, match="elsewhere"):
    with files.only_writer(tmp_path):
      pass
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 4000}))
  with files.only_writer(tmp_path):
    pass


def test_a_failure_leaves_the_lock_and_an_orderly_stop_does_not(tmp_path):
  with pytest.raises(FloatingPointError):
    with files.only_writer(tmp_path):
      raise FloatingPointError
  assert (tmp_path / "writer.lock").exists()
  with pytest.raises(SystemExit):
    with files.only_writer(tmp_path):
      raise SystemExit(75)
  assert not (tmp_path / "writer.lock").exists()


def test_leader_and_barrier_alone():
  assert jax.process_count() == 1 and hosts.leader()
  hosts.barrier("nobody to wait for")
