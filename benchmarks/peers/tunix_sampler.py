"""Tunix's own sampler: one of the works of a file per line it reads.

  PYTHON benchmarks/peers/tunix_sampler.py FOLDER WORKS.json float32

Run by `benchmarks.sampler` with the Python of an environment that has Tunix and nothing of ours. A
line is {"work": name, "seed": s}; the answer has seconds, lengths and tokens. A batch has as many
rows as the work has slots, and ends with its longest row.
"""

import importlib.metadata
import json
import sys
import time

import jax
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params


class Ids:
  """A tokenizer whose text is the ids."""

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return " ".join(map(str, ids))

  def bos_id(self):
    return None

  def eos_id(self):
    return -1  # where a work has no stop ids

  def pad_id(self):
    return -1


def load(folder, dtype):
  """Its Qwen3 with the weights in the folder, and their shape."""
  with open(f"{folder}/config.json", encoding="utf-8") as file:
    c = json.load(file)
  shape = qwen3.ModelConfig(
      num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"],
      hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"],
      head_dim=c["head_dim"], num_kv_heads=c["num_key_value_heads"], norm_eps=c["rms_norm_eps"],
      rope_theta=c["rope_parameters"]["rope_theta"], use_tied_embedding=c["tie_word_embeddings"],
      dtype=jax.numpy.dtype(dtype), param_dtype=jax.numpy.dtype(dtype))
  return params.create_model_from_safe_tensors(folder, shape, dtype=shape.dtype), shape


def main(folder, path, dtype):
  """Answers each line until there are no more."""
  with open(path, encoding="utf-8") as file:
    works = json.load(file)
  model, shape = load(folder, dtype)
  draws = {}

  def drawn(name, seed):
    work = works[name]
    width, longest = len(work["prompts"][0]), work["max_tokens"]
    if name not in draws:  # it compiles the stop ids in, so each work needs its own
      draws[name] = sampler.Sampler(model, Ids(), sampler.CacheConfig(
          width + longest, shape.num_layers, shape.num_kv_heads, shape.head_dim))
    chance = {"temperature": work["temperature"], "top_p": 1.0} if work["temperature"] else {}
    texts = [Ids().decode(ids) for ids in work["prompts"] for _ in range(work["samples"])]
    rows = []
    for i in range(0, len(texts), work["slots"]):
      rows += draws[name](texts[i: i + work["slots"]], longest, width, eos_tokens=work["stop_ids"],
                          seed=seed * len(texts) + i, **chance).tokens
    # The stop id is drawn and left out.
    return rows, [min(len(row) + 1, longest) for row in rows]

  print(json.dumps({"tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__}),
        flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    start = time.perf_counter()
    rows, lengths = drawn(asked["work"], asked["seed"])
    print(json.dumps({"seconds": time.perf_counter() - start, "lengths": lengths,
                      "tokens": [row.tolist() for row in rows]}), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
