"""The parts of the benchmark in their order, with sizes, limits and the seconds that they take.

`expected` is what a part takes on an H200 with 16 cores, and comments say where it comes from.
`results/accelerator-nvidia-h200.json` has the seconds of each part in a process of its own, of its
compilation and of its repeats. Four rules scale those:

- A part that goes on in a process saves its start: 6.4 s (8B adapters: 13.5 until ready, of which
  7.1 for weights).
- k programs compile side by side in 1 + 0.48 (k - 1) times the seconds of one (decoding of 1.7B:
  11.0 alone, as ours beside its rival, and 26.9 for four).
- An update's time is a number for each token and one for each pair of tokens (0.6B: 112.5 ms for
  4 x 2,048 tokens and 164 for 8,192; 1.7B: 285 for 8,192 and 779 for 18,432).
- Least times are read from programs' texts after all that needs the device. Four programs of 8B's
  decoding took 5.3 s (60.8 less 41.6 until ready and 13.9 of calls), so those of 1.7B, of 28 layers
  instead of 36, took 4.1.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from s2d_jax import chips

Json = dict[str, Any]

SECONDS = 480      # of the whole command
INSTALLATION = 40  # that pip is expected to take (20 of processor time); none where all is there
PIP = 90           # after which it is stopped, which leaves less for the last parts
END = 5            # kept for the table and the end of the last process


def reserved(environment: Mapping[str, str]) -> dict[str, str]:
  """The variable of the share of a GPU that JAX takes: `chips.GPU_SHARE`, or the user's own."""
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  # JAX refuses an environment that has both of its names.
  if "XLA_CLIENT_MEM_FRACTION" in environment:
    return {}
  return {name: environment.get(name, str(chips.GPU_SHARE))}


# The rivals' processes and the allocator's own statistics need memory that JAX has not reserved.
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
RESERVED = reserved(os.environ)


class Part(NamedTuple):
  """One subject.

  It goes on in the process of the part before it where `environment` and `cache` are the same.
  """
  name: str
  function: str    # in `parts`
  expected: float  # seconds on an H200, as this module's text explains
  limit: int       # seconds after which it is stopped
  least: int       # seconds until its first result, without which it is not started
  full: Json       # its sizes
  smoke: Json      # those of a test on a CPU
  environment: dict[str, str] = RESERVED
  cache: str = "shared"  # the folder of compiled programs, below that of the run
  cold: bool = False     # that folder is emptied first
  fresh: bool = False    # in a new process, whose start it measures
  always: bool = False   # also when other parts are named
  named: bool = False    # only when it is named


LENGTHS = ((4, 2048), (1, 8192), (1, 16_384))  # rows and tokens of the updates
SMALL = {"shape": "qwen3-smoke", "block": 8, "repeats": 2}
UPDATE = {"lora": 0, "block": 1024, "batches": LENGTHS, "repeats": 3, "seconds": 12.0, "trace": 0}
DECODE = {"rows": (64, 1, 256, 16), "prompt_tokens": 64, "max_tokens": 128, "dispatch": 32,
          "repeats": 1, "seconds": 10.0, "trace": 0}
SMALL_DECODE = {"shape": "qwen3-smoke", "rows": (1, 4), "prompt_tokens": 4, "max_tokens": 12,
                "dispatch": 4, "repeats": 1}
# A step of some seconds: 64 answers of 512 tokens.
STEP = {"shape": "qwen3-1.7b", "guide": "", "prompts": 8, "samples": 8, "prompt_tokens": 256,
        "max_tokens": 512, "microbatches": 8, "block": 1024, "dtype": "bfloat16",
        "remat": "block", "attention": "auto", "lr": 1e-6, "repeats": 1, "trl": ""}
SMALL_STEP = {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "prompt_tokens": 4,
              "max_tokens": 8, "microbatches": 2, "block": 8, "dtype": "float32", "repeats": 1}

PARTS = (
    # 17.2 as the first process of a machine (8.9 on a warm one), and 10 repeats of 70 ms.
    Part("rates", "rates", 18, 60, 15, {"matrix": 8192, "mebibytes": 4096, "repeats": 10},
         {"matrix": 64, "mebibytes": 1, "repeats": 1}, always=True),
    # Weights 5.1, three programs 13.9 (two: 10.5), 5 runs of 113 + 164 + 466 ms, trace 2.
    Part("update 0.6B", "update", 25, 60, 20, UPDATE | {"shape": "qwen3-0.6b", "trace": 1},
         SMALL | {"batches": ((2, 8),), "trace": 1}),
    # 54.2 with three repeats, less its start, 4.1 of reading and two repeats of 1.6.
    Part("decode 1.7B", "decode", 41, 75, 30, DECODE | {"shape": "qwen3-1.7b", "trace": 64},
         SMALL_DECODE | {"trace": 4}),
    # Weights 5.7, three programs 20.8 (two: 15.7), 5 runs of 248 + 285 + 668 ms, 1 for all else.
    Part("update 1.7B", "update", 34, 70, 25, UPDATE | {"shape": "qwen3-1.7b"},
         SMALL | {"batches": ((2, 8), (1, 8))}),
    # 26.2 less its start.
    Part("loss", "loss", 20, 50, 15,
         {"tokens": 8192, "width": 2048, "guide_width": 4096, "vocab": 151_936, "block": 1024,
          "repeats": 10, "seconds": 8.0},
         {"tokens": 16, "width": 8, "guide_width": 16, "vocab": 32, "block": 4, "repeats": 1}),
    # 60.8 with three repeats, less its start, 5.3 of reading and two repeats of 3.5.
    Part("decode 8B", "decode", 43, 80, 35, DECODE | {"shape": "qwen3-8b"}, SMALL_DECODE),
    # Weights 7.1, three programs 20.0 (one: 10.2), 3 runs of 736 + 807 + 1,805 ms, 2 for all else.
    Part("update 8B adapters", "update", 40, 75, 25,
         UPDATE | {"shape": "qwen3-8b", "lora": 16, "repeats": 1},
         SMALL | {"lora": 2, "batches": ((1, 8),)}),
    # 51.6 with two repeats, less one of 3.1.
    Part("grpo 1.7B", "step", 49, 90, 45, STEP, SMALL_STEP, cache="stage", cold=True),
    # 15.6.
    Part("grpo 1.7B cached", "step", 16, 45, 15, STEP | {"repeats": 0},
         SMALL_STEP | {"repeats": 0}, cache="stage", fresh=True),
    # 41.5 with two repeats, less its start and one repeat of 4.3.
    Part("opd 1.7B from 8B", "step", 31, 75, 30, STEP | {"guide": "qwen3-8b"},
         SMALL_STEP | {"guide": "qwen3-smoke"}, cache="stage"),
    # 10.3: its program is stored by then.
    Part("account", "account", 11, 40, 10,
         {"shape": "qwen3-0.6b", "rows": 4, "tokens": 2048, "block": 1024},
         {"shape": "qwen3-smoke", "rows": 2, "tokens": 8, "block": 8}, GROWING),
    # The learner with its stored program 3.9 (account, less its start) and weights of 1.7B 5.7. By
    # estimate 9 for the two folders and 14 until the rivals are ready. Then ours 1.4, eager 4,
    # decoding 1.4 and 17.2 (11.1 and two repeats of 3.05), torch.compile 25 for 28 layers (3.5 for
    # four on two cores, results/step-cpu.json), and its runs 1.
    Part("rivals", "rivals", 83, 120, 40,
         {"update_shape": "qwen3-0.6b", "update_rows": 4, "update_tokens": 2048, "block": 1024,
          "decode_shape": "qwen3-1.7b", "decode_rows": 64, "prompt_tokens": 64, "max_tokens": 128,
          "dispatch": 32, "updates": ("pytorch_eager", "pytorch_compiled"), "repeats": 1,
          "seconds": 50.0},
         {"update_shape": "qwen3-smoke", "update_rows": 2, "update_tokens": 8, "block": 8,
          "decode_shape": "qwen3-smoke", "decode_rows": 4, "prompt_tokens": 4, "max_tokens": 12,
          "dispatch": 4, "updates": ("pytorch_eager",)}, GROWING),
    # 25 on one core for 19 programs (5.3 for four of 8B, as above), four processes and their start.
    Part("least times", "least_times", 12, 60, 5, {"processes": 4}, {"processes": 0}, GROWING,
         always=True),
    Part("arithmetic tiny", "world", 100, 180, 40, {"flags": ()},
         {"flags": ("--config.arms=untrained", "--plan")}, GROWING, named=True),
)


def chosen(names: str) -> list[Part]:
  """The parts of a run; `names` has commas between, and is empty for all that fit its seconds."""
  if not names:
    return [part for part in PARTS if not part.named]
  return [part for part in PARTS if part.always or part.name in names.split(",")]
