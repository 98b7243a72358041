"""GRPO in one file: a model learns from rewards on groups of its own answers.

  python -m examples.grpo_loop [--steps=30] [--prompts=32]

In each step the model answers new problems, several times each. An answer's advantage is its
reward, less the mean of its group, over the group's standard deviation; one update raises the
probability of answers with positive advantage (https://arxiv.org/abs/2402.03300). There is no
recipe, no resume and no ledger here: `s2d_jax/loop.py` adds them. The default is the embedded
teacher, on chained addition modulo 100.

Letters at the end of a name are the axes of an array: P problems, G answers a problem, B = P·G
rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s2d_jax import objectives, optim, rollouts, training
from s2d_jax.chat import Chat
from s2d_jax.data.arithmetic import problems
from s2d_jax.losses.grpo import group_advantages
from s2d_jax.models import hf
from s2d_jax.rewards.arithmetic import reward
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import Sampler, Sampling

ASSETS = Path(__file__).parents[1] / "s2d_jax" / "assets" / "arithmetic"
PROMPT_TOKENS = 13   # of the longest problem, with the chat template around it
ANSWER_TOKENS = 21   # of the longest worked answer, with its end token


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(prog="python -m examples.grpo_loop")
  parser.add_argument("--model", default=ASSETS / "teacher", help="a Hugging Face folder")
  parser.add_argument("--steps", type=int, default=30, help="updates")
  parser.add_argument("--prompts", type=int, default=32, help="problems a step")
  parser.add_argument("--samples", type=int, default=8, help="answers a problem")
  parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[float]:
  """Trains, prints a line a step, and returns the mean reward of each step."""
  args = parse(argv)
  model, params = hf.load(args.model)
  chat = Chat(args.model)
  rows = problems.splits()["labelled"]
  sampling = Sampling(ANSWER_TOKENS, chat.eos_ids, samples_per_prompt=args.samples)
  # Everything is compiled here, once; the steps below only run it.
  sampler = Sampler(model, sampling, batch=args.prompts, prompt_tokens=PROMPT_TOKENS)
  state, update = training.make(model, params, objectives.GRPO, optim.adamw(args.lr))
  rewards = []
  for step in range(args.steps):
    chosen = [rows[i % len(rows)] for i in range(step * args.prompts, (step + 1) * args.prompts)]
    prompts = [Prompt(row["id"], tuple(chat.render([{"role": "user", "content": row["problem"]}])))
               for row in chosen]
    # The seed names the step, so a second run draws the same samples.
    rollout, _ = sampler(state.params, prompts, seed=(0, step))
    # The rows of a rollout are a problem's answers side by side, in the order of the prompts.
    reward_B = [reward(chosen[b // args.samples], chat.decode(rollout.response(b)))
                for b in range(args.prompts * args.samples)]
    advantage_PG = group_advantages(np.reshape(reward_B, (args.prompts, args.samples)))
    advantage_B = np.asarray(advantage_PG, np.float32).reshape(-1)
    state, metrics = update(state, None, rollouts.batch(rollout, advantage_B=advantage_B))
    rewards.append(float(np.mean(reward_B)))
    print(f"step {step:3d}  mean reward {rewards[-1]:.3f}  "
          f"entropy {float(metrics['entropy']):.3f} nats a token  "
          f"{rollout.response_length_B.mean():.1f} tokens an answer", flush=True)
  return rewards


if __name__ == "__main__":
  main()
