"""Where every weight and optimizer slot lives, held against a list that somebody read.

  python -m tests.models.test_layout   (writes the list anew, for reading)
"""

import json
import pathlib

import jax
import pytest

from configs import common
from s2d_jax import models, optim, sharding, update
from s2d_jax.models import layout

LIST = pathlib.Path(__file__).parent / "layout.json"
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
NAMES = ("qwen3-1.7b", "qwen3-8b", "llama-3.3-70b")


def spelled(where):
  """A NamedSharding as one word per axis: "-" for whole on every device."""
  names = [axis if isinstance(axis, str) else "+".join(axis) if axis else "-"
           for axis in where.spec]
  return " ".join(names)


def places(name, shape):
  """{path: layout} of a model's weights and of AdamW's slots on a mesh."""
  config, mesh = models.get(name).config, sharding.make_mesh(shape)
  shapes = models.shapes(config)
  params = sharding.laid_out(shapes, sharding.weight_shardings(mesh, models.axes(config), shapes))
  class Hp:
    pass
  hp = Hp()
  vars(hp).update(common.adamw(1e-6), steps=10)
  state = update.abstract(optim.make(hp, models.axes(config)), mesh, params)
  weights = {path: spelled(x.sharding) for path, x in layout.flat(params).items()}
  slots = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  twice = [spelled(x.sharding) for x in jax.tree.leaves(params)] * 2
  assert [spelled(x.sharding) for x in slots] == twice  # both of Adam's moments, as the weights
  return weights


def listed():
  return {name: {axis: places(name, shape) for axis, shape in MESHES.items()} for name in NAMES}


@pytest.mark.medium
def test_weights_and_slots_live_where_the_list_says():
  assert listed() == json.loads(LIST.read_text())


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  LIST.write_text(json.dumps(listed(), indent=1) + "\n")
