"""transformers' sampling in PyTorch: one of the works of a file per line it reads.

  python -m benchmarks.peers.transformers_sampler FOLDER WORKS.json float32 NAME

Started by `benchmarks.sampler`; NAME is `transformers`, its `generate` fed as many prompts at a
time as the slots hold, or `transformers_continuous`, its `generate_batch` with a paged cache of as
many rows. A line is {"work": name, "seed": s}; the answer has seconds, lengths and tokens.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers

PAGE = 64  # tokens


def length(ids, stop_ids):
  """Tokens up to the first stop id, which counts."""
  ends = np.flatnonzero(np.isin(ids, stop_ids))
  return int(ends[0]) + 1 if len(ends) else len(ids)


def settings(work):
  """The same distribution as ours: nothing is cut off from it."""
  chance = ({"do_sample": True, "temperature": work["temperature"], "top_k": 0, "top_p": 1.0}
            if work["temperature"] else {"do_sample": False})
  return transformers.GenerationConfig(
      max_new_tokens=work["max_tokens"], num_return_sequences=work["samples"],
      eos_token_id=work["stop_ids"] or None, pad_token_id=0, **chance)


def generated(model, work):
  """Rows of new tokens, batch by batch."""
  at_once, width = max(1, work["slots"] // work["samples"]), len(work["prompts"][0])
  prompts, rows = torch.tensor(work["prompts"]).to(model.device), []
  with torch.inference_mode():
    for part in prompts.split(at_once):
      out = model.generate(part, attention_mask=torch.ones_like(part),
                           generation_config=settings(work))
      rows += list(out[:, width:].cpu().numpy())
  return rows


def continuous(model, work):
  """The same rows through a paged cache."""
  pages = -(-(len(work["prompts"][0]) + work["max_tokens"]) // PAGE)
  cache = transformers.generation.configuration_utils.ContinuousBatchingConfig(
      page_size=PAGE, num_blocks=pages * work["slots"], max_requests_per_batch=work["slots"])
  done = model.generate_batch(work["prompts"], generation_config=settings(work),
                              continuous_batching_config=cache)
  if len(done) != len(work["prompts"]) * work["samples"]:
    raise RuntimeError("generate_batch has lost rows: its error is above.")
  return [np.array(one.generated_tokens) for one in done.values()]


def main(folder, path, dtype, name):
  """Answers each line until there are no more."""
  with open(path, encoding="utf-8") as file:
    works = json.load(file)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()
  draw = {"transformers": generated, "transformers_continuous": continuous}[name]
  print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__,
                    "threads": torch.get_num_threads()}), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    work = works[asked["work"]]
    torch.manual_seed(asked["seed"])
    start = time.perf_counter()
    rows = draw(model, work)
    seconds = time.perf_counter() - start
    lengths = [length(row, work["stop_ids"]) for row in rows]
    print(json.dumps({"seconds": seconds, "lengths": lengths,
                      "tokens": [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]}),
          flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
