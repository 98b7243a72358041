"""transformers' sampling in PyTorch: one workload of a file per line it reads.

  python -m benchmarks.peers.transformers_sampler FOLDER WORKLOADS.json float32 NAME

Started by `benchmarks.sampler`; NAME is `transformers`, its `generate` fed as many prompts at a
time as the slots hold, or `transformers_continuous`, its `generate_batch` with a paged cache of as
many rows. A line is {"workload": name, "seed": s}; the answer has seconds, lengths and tokens.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers

PAGE = 64  # tokens
Workload = dict[str, Any]  # the fields of benchmarks.sampler.Workload


def length(ids: np.ndarray, stop_ids: list[int]) -> int:
  """Number of tokens up to and including the first stop id."""
  ends = np.flatnonzero(np.isin(ids, stop_ids))
  return int(ends[0]) + 1 if len(ends) else len(ids)


def settings(workload: Workload) -> transformers.GenerationConfig:
  """Settings under which transformers samples from our distribution, without truncation."""
  chance = ({"do_sample": True, "temperature": workload["temperature"], "top_k": 0, "top_p": 1.0}
            if workload["temperature"] else {"do_sample": False})
  return transformers.GenerationConfig(
      max_new_tokens=workload["max_tokens"], num_return_sequences=workload["samples"],
      eos_token_id=workload["stop_ids"] or None, pad_token_id=0, **chance)


def generated(model: transformers.PreTrainedModel, workload: Workload) -> list[np.ndarray]:
  """New tokens of every row by `generate`, batch by batch."""
  at_once, width = max(1, workload["slots"] // workload["samples"]), len(workload["prompts"][0])
  prompts, rows = torch.tensor(workload["prompts"]).to(model.device), []
  with torch.inference_mode():
    for part in prompts.split(at_once):
      out = model.generate(part, attention_mask=torch.ones_like(part),
                           generation_config=settings(workload))
      rows += list(out[:, width:].cpu().numpy())
  return rows


def continuous(model: transformers.PreTrainedModel, workload: Workload) -> list[np.ndarray]:
  """New tokens of every row by `generate_batch`, through a paged cache."""
  pages = -(-(len(workload["prompts"][0]) + workload["max_tokens"]) // PAGE)
  cache = transformers.generation.configuration_utils.ContinuousBatchingConfig(
      page_size=PAGE, num_blocks=pages * workload["slots"],
      max_requests_per_batch=workload["slots"])
  done = model.generate_batch(workload["prompts"], generation_config=settings(workload),
                              continuous_batching_config=cache)
  if len(done) != len(workload["prompts"]) * workload["samples"]:
    raise RuntimeError("generate_batch has lost rows: its error is above.")
  return [np.array(one.generated_tokens) for one in done.values()]


def main(folder: str, path: str, dtype: str, name: str) -> None:
  """Answers each line of standard input with the rows of a workload."""
  with open(path, encoding="utf-8") as file:
    workloads = json.load(file)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()
  sample = {"transformers": generated, "transformers_continuous": continuous}[name]
  print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__,
                    "threads": torch.get_num_threads()}), flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    workload = workloads[request["workload"]]
    torch.manual_seed(request["seed"])
    start = time.perf_counter()
    rows = sample(model, workload)
    seconds = time.perf_counter() - start
    lengths = [length(row, workload["stop_ids"]) for row in rows]
    print(json.dumps({"seconds": seconds, "lengths": lengths,
                      "tokens": [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]}),
          flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
