"""transformers in PyTorch on the tokens of a file: a forward pass or an update per line it reads.

  python -m benchmarks.peers.pytorch FOLDER TOKENS.npz float32 eager|compile

Started by `benchmarks.step`, which writes "forward" or "train" and reads seconds, loss and peak
memory as JSON. The settings are PyTorch's own for speed: SDPA attention, fused AdamW; weights and
moments are float32, as ours, and bfloat16 is autocast.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers


def peak_bytes(device: str) -> int:
  """The most memory this process has held, on the device or else on the host."""
  if device == "cuda":
    return torch.cuda.max_memory_allocated()
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)


def main(folder: str, tokens: str, dtype: str, mode: str) -> None:
  """Answers each line of standard input; `mode` is "eager" or "compile"."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="sdpa").to(device)
  narrow = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
  with np.load(tokens) as arrays:
    inputs, targets = (torch.tensor(arrays[name]).long().to(device)
                       for name in ("inputs", "targets"))
  norms = [p for p in model.parameters() if p.ndim < 2]  # not decayed, as ours
  optimizer = torch.optim.AdamW(
      [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
       {"params": norms, "weight_decay": 0.0}], lr=1e-4, fused=True)

  def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with narrow:
      logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

  if mode == "compile":
    loss = torch.compile(loss)

  def forward() -> float:
    with torch.no_grad():
      return loss(inputs, targets).item()

  def train() -> float:
    value = loss(inputs, targets)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()

  print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__,
                    "threads": torch.get_num_threads()}), flush=True)
  tasks: dict[str, Callable[[], float]] = {"forward": forward, "train": train}
  for line in sys.stdin:
    start = time.perf_counter()
    value = tasks[line.strip()]()
    if device == "cuda":
      torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start, "loss": value,
                      "peak_bytes": peak_bytes(device)}), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
