"""Checkpoints are complete or absent, and load on another mesh."""

import numpy as np

from s2d_jax import checkpoint, sharding


def state(value, mesh):
  return {"w": sharding.put(np.full((8, 4), value, np.float32),
                            sharding.weight_sharding(mesh, ("embed", "mlp"), (8, 4)))}


def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
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
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert steps == ["4", "6"]
  checkpoint.save_final(tmp_path, state(9, one))
  checkpoint.save_final(tmp_path, state(9, one))  # done again after a kill: replaced
  checkpoint.drop_steps(tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["final"]
  final = checkpoint.load_final(tmp_path, sharding.abstract(state(0, many)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 9, np.float32))


def test_a_relative_folder_is_accepted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  mesh = sharding.make_mesh((1, 1, 1))
  steps = checkpoint.Checkpoints("runs/stage")
  steps.save(1, state(3, mesh))
  steps.close()
  checkpoint.save_final("runs/stage", state(4, mesh))
  final = checkpoint.load_final("runs/stage", sharding.abstract(state(0, mesh)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 4, np.float32))
  assert sorted(p.name for p in (tmp_path / "runs/stage/checkpoints").iterdir()) == ["1", "final"]
