"""TRL's GRPOTrainer: one step per line it reads, from the weights in a folder.

  PYTHON benchmarks/peers/trl_grpo.py FOLDER SETTINGS.json

Run by `benchmarks.grpo` with the Python of an environment that has TRL and nothing of ours. One
training runs all the time. It waits for a line before each step, and answers with the step's
seconds, tokens and entropy. A text is a list of ids: its tokenizer has a word for each id, and an
end word that the model never samples, because its vocabulary is one smaller.
"""

import contextlib
import json
import statistics
import sys
import time
from typing import Any, TextIO

import datasets
import tokenizers
import torch
import transformers
import trl


def tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
  """The id `i` is the word "i"; the end and the padding lie beyond the model's vocabulary."""
  words = {str(i): i for i in range(vocab_size)} | {"end": vocab_size}
  word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="end"))
  word_level.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=word_level, eos_token="end", pad_token="end", padding_side="left")


class Answers(transformers.TrainerCallback):
  """Waits for a line before each step and answers after it."""

  def __init__(self, out: TextIO) -> None:
    self.out = out
    self.tokens = 0
    self.trainer = None

  def answer(self, values: dict[str, Any]) -> None:
    """Writes a line of JSON."""
    print(json.dumps(values), file=self.out, flush=True)

  def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The number of even ids of each answer."""
    self.tokens = sum(map(len, completion_ids))
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]

  def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
    """Waits for a line; raises EOFError where there are no more."""
    if not sys.stdin.readline():
      raise EOFError
    self.start = time.perf_counter()

  def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
    """Answers with the step's seconds, tokens and entropy."""
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    seconds = time.perf_counter() - self.start
    entropies = self.trainer._metrics["train"]["entropy"][-args.gradient_accumulation_steps:]
    self.answer({"seconds": seconds, "tokens": self.tokens,
                 "entropy": statistics.mean(entropies)})


def main(folder: str, path: str) -> None:
  """Trains, one step for each line of standard input."""
  with open(path, encoding="utf-8") as file:
    settings = json.load(file)
  answers = Answers(sys.stdout)
  rows = len(settings["prompts"]) * settings["samples"]
  with contextlib.redirect_stdout(sys.stderr):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers.trainer = trl.GRPOTrainer(
        model, answers.reward, callbacks=[answers],
        processing_class=tokenizer(model.config.vocab_size),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [" ".join(map(str, ids)) for ids in settings["prompts"]]}),
        args=trl.GRPOConfig(
            output_dir=f"{folder}-trl",
            per_device_train_batch_size=rows // settings["microbatches"],
            gradient_accumulation_steps=settings["microbatches"],
            num_generations=settings["samples"], max_completion_length=settings["max_tokens"],
            max_steps=1000, learning_rate=settings["lr"], lr_scheduler_type="constant", beta=0.0,
            activation_checkpointing=False,
            bf16=settings["dtype"] == "bfloat16", report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available()))
    answers.answer({"trl": trl.__version__, "torch": torch.__version__,
                    "transformers": transformers.__version__, "threads": torch.get_num_threads()})
    with contextlib.suppress(EOFError):
      answers.trainer.train()


if __name__ == "__main__":
  main(*sys.argv[1:])
