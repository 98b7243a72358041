"""Tunix's own sampler: one workload of a file per line it reads.

  PYTHON benchmarks/peers/tunix_sampler.py FOLDER WORKLOADS.json float32

Run by `benchmarks.sampler` with the Python of an environment that has Tunix and nothing of ours. A
line is {"workload": name, "seed": s}; the answer has seconds, lengths and tokens. A batch has as
many rows as the workload has slots, and ends with its longest row.
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
  """A tokenizer whose text is the ids, written in decimal."""

  def encode(self, text: str) -> list[int]:
    """The ids in a text."""
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    """The ids as a text."""
    return " ".join(map(str, ids))

  def bos_id(self) -> None:
    """There is no id that begins a text."""
    return None

  def eos_id(self) -> int:
    """The stop id of a workload that has none of its own."""
    return -1

  def pad_id(self) -> int:
    """The id of padding."""
    return -1


def load(folder: str, dtype: str) -> tuple[qwen3.Qwen3, qwen3.ModelConfig]:
  """Tunix's Qwen3 with the weights in the folder, and its config."""
  with open(f"{folder}/config.json", encoding="utf-8") as file:
    c = json.load(file)
  shape = qwen3.ModelConfig(
      num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"],
      hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"],
      head_dim=c["head_dim"], num_kv_heads=c["num_key_value_heads"], norm_eps=c["rms_norm_eps"],
      rope_theta=c["rope_parameters"]["rope_theta"], use_tied_embedding=c["tie_word_embeddings"],
      dtype=jax.numpy.dtype(dtype), param_dtype=jax.numpy.dtype(dtype))
  return params.create_model_from_safe_tensors(folder, shape, dtype=shape.dtype), shape


def main(folder: str, path: str, dtype: str) -> None:
  """Answers each line of standard input with the rows of a workload."""
  with open(path, encoding="utf-8") as file:
    workloads = json.load(file)
  model, shape = load(folder, dtype)
  samplers = {}

  def sample(name: str, seed: int) -> tuple[list[jax.Array], list[int]]:
    """The rows of a workload and their lengths."""
    workload = workloads[name]
    width = len(workload["prompts"][0])
    longest = workload["max_tokens"]
    if name not in samplers:  # it compiles the stop ids in, so each workload needs its own
      samplers[name] = sampler.Sampler(model, Ids(), sampler.CacheConfig(
          width + longest, shape.num_layers, shape.num_kv_heads, shape.head_dim))
    chance = {}  # greedy
    if workload["temperature"]:
      chance = {"temperature": workload["temperature"], "top_p": 1.0}
    texts = [Ids().decode(ids) for ids in workload["prompts"] for _ in range(workload["samples"])]
    rows = []
    for i in range(0, len(texts), workload["slots"]):
      batch = texts[i: i + workload["slots"]]
      rows += samplers[name](batch, longest, width, eos_tokens=workload["stop_ids"],
                             seed=seed * len(texts) + i, **chance).tokens
    # Tunix samples the stop id and leaves it out of its rows.
    return rows, [min(len(row) + 1, longest) for row in rows]

  print(json.dumps({"tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__}),
        flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    start = time.perf_counter()
    rows, lengths = sample(request["workload"], request["seed"])
    print(json.dumps({"seconds": time.perf_counter() - start, "lengths": lengths,
                      "tokens": [row.tolist() for row in rows]}), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
