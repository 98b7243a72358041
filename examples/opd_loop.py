"""On-policy distillation in one file: a student learns from a teacher on the student's own samples.

  python -m examples.opd_loop [--steps=30] [--prompts=32]

In each step the student answers new problems, and one update lowers KL(student ‖ teacher) at every
token of the answers (https://arxiv.org/abs/2306.13649). No answer is checked. There is no recipe,
no resume and no ledger here: `s2d_jax/loop.py` adds them. The defaults are the embedded models, on
chained addition modulo 100; both folders may be others that share a tokenizer.

Letters at the end of a name are the axes of an array: B rows, T tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from s2d_jax import objectives, optim, rollouts, training
from s2d_jax.chat import Chat
from s2d_jax.data.arithmetic import problems
from s2d_jax.models import hf
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import Sampler, Sampling

ASSETS = Path(__file__).parents[1] / "s2d_jax" / "assets" / "arithmetic"
PROMPT_TOKENS = 13   # of the longest problem, with the chat template around it
ANSWER_TOKENS = 21   # of the longest worked answer, with its end token


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(prog="python -m examples.opd_loop")
  parser.add_argument("--teacher", default=ASSETS / "teacher", help="a Hugging Face folder")
  parser.add_argument("--student", default=ASSETS / "student", help="a Hugging Face folder")
  parser.add_argument("--steps", type=int, default=30, help="updates")
  parser.add_argument("--prompts", type=int, default=32, help="problems a step")
  parser.add_argument("--samples", type=int, default=4, help="answers a problem")
  parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
  return parser.parse_args(argv)


def prompt_batches(chat: Chat, size: int) -> list[list[Prompt]]:
  """The labelled problems as prompts of the chat template, in batches; their labels stay unread."""
  rows = problems.splits()["labelled"]
  prompts = [Prompt(row["id"], tuple(chat.render([{"role": "user", "content": row["problem"]}])))
             for row in rows]
  return [prompts[i: i + size] for i in range(0, len(prompts) - size + 1, size)]


def main(argv: Sequence[str] | None = None) -> list[float]:
  """Trains, prints a line a step, and returns the KL of each step, in nats a token."""
  args = parse(argv)
  teacher, teacher_params = hf.load(args.teacher)
  student, params = hf.load(args.student)
  chat = Chat(args.student)
  batches = prompt_batches(chat, args.prompts)
  sampling = Sampling(ANSWER_TOKENS, chat.eos_ids, samples_per_prompt=args.samples)
  # Everything is compiled here, once; the steps below only run it.
  sampler = Sampler(student, sampling, batch=args.prompts, prompt_tokens=PROMPT_TOKENS)
  state, update = training.make(student, params, objectives.REVERSE_KL, optim.adamw(args.lr),
                                guide=teacher)
  kls = []
  for step in range(args.steps):
    # The seed names the step, so a second run draws the same samples.
    rollout, _ = sampler(state.params, batches[step % len(batches)], seed=(0, step))
    state, metrics = update(state, teacher_params, rollouts.batch(rollout))
    kls.append(float(metrics["kl"]))
    print(f"step {step:3d}  KL to the teacher {kls[-1]:.4f} nats a token  "
          f"{rollout.response_length_B.mean():.1f} tokens an answer", flush=True)
  return kls


if __name__ == "__main__":
  main()
