"""TRL's distillation losses on the arrays of a file: one with gradients per line it reads.

  PYTHON benchmarks/peers/trl_losses.py ARRAYS.npz DTYPE

Run by `benchmarks.loss` with the Python of an environment that has TRL and nothing of ours. A line
is {"way": "trl" | "trl_chunked", "beta": b} as JSON: `generalized_jsd_loss` of the logits, or the
chunked divergence that never holds them all; beta is 0 for the forward KL and 1 for the reverse.
"""

import json
import sys
import time

import numpy as np
import torch
import trl
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


def main(path: str, dtype: str) -> None:
  """Answers each line of standard input with a loss and the norms of its gradients."""
  with np.load(path) as arrays:
    inputs = {name: torch.tensor(arrays[name]).to(getattr(torch, dtype)) for name in arrays}
  features = inputs["student"].requires_grad_()
  weight = inputs["student_weight"].requires_grad_()

  def loss(way: str, beta: float) -> torch.Tensor:
    if way == "trl":
      return GKDTrainer.generalized_jsd_loss(
          (features @ weight.T)[None], (inputs["guide"] @ inputs["guide_weight"].T)[None],
          beta=beta, reduction="sum")
    return ChunkedDivergenceFunction.apply(
        features, weight, None, inputs["guide"], inputs["guide_weight"], None, beta)[0].sum()

  print(json.dumps({"trl": trl.__version__, "torch": torch.__version__}), flush=True)
  for line in sys.stdin:
    features.grad = weight.grad = None
    start = time.perf_counter()
    value = loss(**json.loads(line))
    value.backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "loss": value.item(),
                      "gradients": [x.grad.double().norm().item() for x in (features, weight)]}),
          flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
