"""Where every weight and optimizer slot lives, held against a list that somebody read.

  python -m tests.models.test_layout   (writes the list anew, for reading)
"""

import dataclasses
import json
import pathlib
import types

import jax
import optax
import pytest

from configs import common
from s2d_jax import models, optim, sharding, training
from s2d_jax.models import layout

LIST = pathlib.Path(__file__).parent / "layout.json"
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
MODELS = {name: models.get(name).config for name in ("qwen3-1.7b", "qwen3-8b", "llama-3.3-70b")}
# Fewer key heads than eight devices: whole on each.
MODELS["qwen3-1.7b with 4 key heads"] = dataclasses.replace(MODELS["qwen3-1.7b"], kv_heads=4)
MODELS["qwen3-1.7b with adapters"] = dataclasses.replace(
    MODELS["qwen3-1.7b"], lora=models.Lora(16, 32.0, models.config.ADAPTED))


def spelled(where):
  """A NamedSharding as one word per axis: "-" for whole on every device."""
  def word(axes):
    split = axes if isinstance(axes, tuple) else filter(None, [axes])
    return "+".join(name for name in split if where.mesh.shape[name] > 1) or "-"
  return " ".join(map(word, where.spec))


def layouts(config, shape):
  """{path: layout} of what is trained of a model, of its frozen rest and of AdamW's two moments."""
  mesh = sharding.make_mesh(shape)
  shapes = models.shapes(config)
  params = sharding.laid_out(shapes, sharding.weight_shardings(mesh, models.axes(config), shapes))
  trained, frozen = (params, {}) if config.lora is None else models.split(config, params)
  hp = types.SimpleNamespace(**common.adamw(lr=1e-6))
  state = training.abstract(optim.make(hp, 10, models.trained(config)), mesh, trained)
  moments = {name: optax.tree.get(state.opt_state, name) for name in ("mu", "nu")}
  return {f"{kind}{path}": spelled(x.sharding)
          for kind, tree in (("", trained), ("frozen ", frozen), ("mu ", moments["mu"]),
                             ("nu ", moments["nu"]))
          for path, x in layout.flat(tree).items()}


def listed():
  return {name: {axis: layouts(config, shape) for axis, shape in MESHES.items()}
          for name, config in MODELS.items()}


@pytest.mark.medium
def test_layouts_of_weights_and_slots_equal_the_list():
  assert listed() == json.loads(LIST.read_text())


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  LIST.write_text(json.dumps(listed(), indent=1) + "\n")
