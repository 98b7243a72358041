"""TRL's GRPOTrainer: one step per line it reads, from the weights in a folder.

  PYTHON benchmarks/peers/trl_grpo.py FOLDER WORK.json

Run by `benchmarks.grpo` with the Python of an environment that has TRL and nothing of ours. One
training runs all the time and waits for a line before each of its steps, whose seconds, tokens and
entropy it answers with. Text is ids: its tokenizer knows a word for each, and an end that the
model, whose vocabulary is one smaller, never draws.
"""

import contextlib
import json
import statistics
import sys
import time

import datasets
import tokenizers
import torch
import transformers
import trl


def tokenizer(vocab_size):
  """The id `i` is the word "i"; the end and the padding lie beyond the model's vocabulary."""
  words = {str(i): i for i in range(vocab_size)} | {"end": vocab_size}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="end"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, eos_token="end", pad_token="end", padding_side="left")


class Answers(transformers.TrainerCallback):
  """Waits for a line before each step and answers after it."""

  def __init__(self, out):
    self.out, self.tokens, self.trainer = out, 0, None

  def say(self, what):
    print(json.dumps(what), file=self.out, flush=True)

  def reward(self, completion_ids, **_):
    """The number of even ids of each answer."""
    self.tokens = sum(map(len, completion_ids))
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]

  def on_step_begin(self, args, state, control, **_):
    if not sys.stdin.readline():
      raise EOFError
    self.start = time.perf_counter()

  def on_step_end(self, args, state, control, **_):
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    seconds = time.perf_counter() - self.start
    self.say({"seconds": seconds, "tokens": self.tokens,
              "entropy": statistics.mean(
                  self.trainer._metrics["train"]["entropy"][-args.gradient_accumulation_steps:])})


def main(folder, path):
  """Answers each line until there are no more."""
  with open(path, encoding="utf-8") as file:
    work = json.load(file)
  answers, rows = Answers(sys.stdout), len(work["prompts"]) * work["samples"]
  with contextlib.redirect_stdout(sys.stderr):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers.trainer = trl.GRPOTrainer(
        model, answers.reward, callbacks=[answers],
        processing_class=tokenizer(model.config.vocab_size),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [" ".join(map(str, ids)) for ids in work["prompts"]]}),
        args=trl.GRPOConfig(
            output_dir=f"{folder}-trl", per_device_train_batch_size=rows // work["microbatches"],
            gradient_accumulation_steps=work["microbatches"],
            num_generations=work["samples"], max_completion_length=work["max_tokens"],
            max_steps=1000, learning_rate=work["lr"], lr_scheduler_type="constant", beta=0.0,
            activation_checkpointing=False,
            bf16=work["dtype"] == "bfloat16", report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available()))
    answers.say({"trl": trl.__version__, "torch": torch.__version__,
                 "transformers": transformers.__version__, "threads": torch.get_num_threads()})
    with contextlib.suppress(EOFError):
      answers.trainer.train()


if __name__ == "__main__":
  main(*sys.argv[1:])
