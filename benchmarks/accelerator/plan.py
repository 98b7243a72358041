"""The parts of the benchmark, in the order of their worth, with sizes and limits of seconds."""

from typing import Any, NamedTuple

Json = dict[str, Any]

# The rivals' processes and the allocator's own statistics need memory that JAX has not reserved.
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
RESERVED = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


class Part(NamedTuple):
  """One process."""
  name: str
  function: str  # in `parts`
  limit: int     # seconds after which it is stopped
  least: int     # seconds without which it is not started
  full: Json     # its sizes
  smoke: Json    # those of a test on a CPU
  environment: dict[str, str] = RESERVED
  cache: str = "shared"  # the folder of compiled programs, below that of the run
  cold: bool = False     # that folder is emptied first


SMALL = {"shape": "qwen3-smoke", "block": 8, "repeats": 2}
UPDATE = {"lora": 0, "block": 1024, "repeats": 5, "seconds": 12.0, "trace": 0}
DECODE = {"rows": (64, 1, 256, 16), "prompt_tokens": 64, "max_tokens": 128, "dispatch": 32,
          "repeats": 3, "seconds": 10.0, "trace": 0}
SMALL_DECODE = {"shape": "qwen3-smoke", "rows": (1, 4), "prompt_tokens": 4, "max_tokens": 12,
                "dispatch": 4, "repeats": 1}
# A step of some seconds: 64 answers of 512 tokens.
STEP = {"shape": "qwen3-1.7b", "guide": "", "prompts": 8, "samples": 8, "prompt_tokens": 256,
        "max_tokens": 512, "microbatches": 8, "block": 1024, "dtype": "bfloat16",
        "remat": "block", "attention": "auto", "lr": 1e-6, "repeats": 2, "trl": ""}
SMALL_STEP = {"shape": "qwen3-smoke", "prompts": 2, "samples": 2, "prompt_tokens": 4,
              "max_tokens": 8, "microbatches": 2, "block": 8, "dtype": "float32", "repeats": 1}

PARTS = (
    Part("rates", "rates", 60, 15, {"matrix": 8192, "mebibytes": 4096, "repeats": 30},
         {"matrix": 64, "mebibytes": 1, "repeats": 1}),
    Part("update 0.6B", "update", 75, 30,
         UPDATE | {"shape": "qwen3-0.6b", "batches": ((4, 2048), (1, 8192)), "trace": 1},
         SMALL | {"batches": ((2, 8),), "trace": 1}),
    Part("account", "account", 50, 25,
         {"shape": "qwen3-0.6b", "rows": 4, "tokens": 2048, "block": 1024},
         {"shape": "qwen3-smoke", "rows": 2, "tokens": 8, "block": 8}, GROWING),
    Part("decode 1.7B", "decode", 75, 30, DECODE | {"shape": "qwen3-1.7b", "trace": 64},
         SMALL_DECODE | {"trace": 4}),
    Part("loss", "loss", 60, 25,
         {"tokens": 8192, "width": 2048, "guide_width": 4096, "vocab": 151_936, "block": 1024,
          "repeats": 10, "seconds": 8.0},
         {"tokens": 16, "width": 8, "guide_width": 16, "vocab": 32, "block": 4, "repeats": 1}),
    Part("grpo 1.7B", "step", 110, 45, STEP, SMALL_STEP, cache="stage", cold=True),
    Part("grpo 1.7B cached", "step", 60, 25, STEP | {"repeats": 0},
         SMALL_STEP | {"repeats": 0}, cache="stage"),
    Part("update 1.7B", "update", 80, 30,
         UPDATE | {"shape": "qwen3-1.7b", "batches": ((1, 8192), (1, 18_432))},
         SMALL | {"batches": ((1, 8), (2, 8))}),
    Part("opd 1.7B from 8B", "step", 90, 40, STEP | {"guide": "qwen3-8b"},
         SMALL_STEP | {"guide": "qwen3-smoke"}, cache="stage"),
    Part("arithmetic tiny", "world", 180, 40, {"flags": ()},
         {"flags": ("--config.arms=untrained", "--plan")}, GROWING, cache="world", cold=True),
    Part("decode 8B", "decode", 90, 40, DECODE | {"shape": "qwen3-8b"}, SMALL_DECODE),
    Part("update 8B adapters", "update", 75, 35,
         UPDATE | {"shape": "qwen3-8b", "lora": 16, "batches": ((1, 8192),), "repeats": 3},
         SMALL | {"lora": 2, "batches": ((1, 8),)}),
    Part("rival updates 0.6B", "rival_updates", 90, 40,
         {"flags": ("--shape=qwen3-0.6b", "--dtype=bfloat16", "--remat=block", "--rows=4",
                    "--tokens=2048", "--block=1024", "--repeats=5", "--seconds=60",
                    "--tasks=train", "--peak=8192")},
         {"flags": ("--smoke", "--tasks=train", "--rivals=pytorch_eager")}, GROWING),
    Part("rival decoding 1.7B", "rival_decoding", 110, 45,
         {"flags": ("--decode=64", "--shape=qwen3-1.7b", "--dtype=bfloat16", "--max_tokens=128",
                    "--repeats=2", "--seconds=40", "--peak=8192", "--stream=4096",
                    "--rivals=transformers")},
         {"flags": ("--smoke", "--decode=2", "--rivals=transformers")}, GROWING),
)
