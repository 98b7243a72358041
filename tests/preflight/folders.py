"""Folders of published models, as preflight needs them: config.json and a tokenizer alone."""

import json
import pathlib
import shutil

from configs import arithmetic
from s2d_jax import models


def published(where, names, **changes):
  """Makes where/NAME for each name, such as "Qwen3-8B" or "Llama-3.3-70B-Instruct".

  Args:
    changes: entries of config.json that differ from the published ones, such as num_hidden_layers.
  """
  for name in names:
    folder = pathlib.Path(where, name)
    shutil.copytree(arithmetic.get_config().teacher, folder,
                    ignore=shutil.ignore_patterns("*.safetensors"))
    shape = models.PUBLISHED[name.lower().removesuffix("-instruct")] | changes
    (folder / "config.json").write_text(json.dumps(shape))
    # As Qwen3's does, the template reads the argument that the config gives it.
    with open(folder / "chat_template.jinja", "a") as template:
      template.write("{%- if enable_thinking is defined %}{% endif -%}")
  return where
