"""A real language model, SmolLM2-135M-Instruct, against transformers: logits, answers, folders.

The environment's S2D_REAL_MODELS names the folder that has the model's, SmolLM2-135M-Instruct,
which hf download makes. Without it the tests are skipped.

In float32 both sides round: of 20 prompts the logits, which reach 41, differ by at most 1.54e-4.
Against transformers in float64 the root of the mean squared error is 1.64e-5 here and 1.59e-5 in
transformers' float32, the largest 1.70e-4 here and 1.21e-4 there. The log-probability of the
likeliest token differs by at most 3.5e-5. RoPE's frequencies from float64, a norm by square root
and jax_default_matmul_precision change none of these numbers; attention by `xla` makes the largest
1.81e-4.
"""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import chat, rollouts, sampler
from s2d_jax.data.word_problems import problems
from s2d_jax.models import hf

REAL = os.environ.get("S2D_REAL_MODELS", "")
FOLDER = str(pathlib.Path(REAL, "SmolLM2-135M-Instruct")) if REAL else ""
TORCH = importlib.util.find_spec("torch") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER, reason="S2D_REAL_MODELS does not name a folder that has SmolLM2-135M-Instruct "
                           "(hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir "
                           "$S2D_REAL_MODELS/SmolLM2-135M-Instruct)"),
    pytest.mark.skipif(not TORCH, reason="torch, which transformers needs to run it, is absent")]
T = 24  # tokens of a greedy continuation
TEXTS = ["What is the capital of France?", "Write a haiku about the sea.", "Why is the sky blue?",
         "Sort these numbers: 9, 2, 5.", "Translate 'good morning' to Spanish.",
         "Name three prime numbers.", "What does a compiler do?",
         "A train goes 60 km in 45 minutes. How fast is it?", "Löse: x² = 9.", "こんにちは"]


@pytest.fixture(scope="module")
def prompts():
  """20 prompts: ten questions of different kinds, and ten of the task's own problems."""
  questions = [*TEXTS, *(row["problem"] for row in problems.splits()["validation"][:10])]
  tokenizer = chat.Chat(FOLDER)
  return [tokenizer.render([{"role": "user", "content": text}]) for text in questions]


@pytest.fixture(scope="module")
def theirs():
  """The model of transformers, in float32."""
  import torch
  import transformers
  return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
  return hf.load(FOLDER)


def torch_logits(model, ids):
  import torch
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


def logits(model, params, rows):
  """Logits of prompts of several lengths, in one padded batch: list of [tokens, vocabulary]."""
  length = max(map(len, rows))
  ids = np.zeros((len(rows), length), np.int32)
  segments = np.zeros_like(ids)
  for b, row in enumerate(rows):
    ids[b, : len(row)] = row
    segments[b, : len(row)] = 1
  positions = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
  features, _ = jax.jit(model.apply)(params, ids, positions, segments)
  unembed = jax.jit(lambda x: jnp.einsum("TD,VD->TV", x, model.unembed(params)))
  return [np.asarray(unembed(features[b]))[: len(row)] for b, row in enumerate(rows)]


def test_the_prompts_are_those_of_transformers(prompts):
  import transformers
  tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
  for text, ids in zip(TEXTS, prompts, strict=False):
    expected = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                             add_generation_prompt=True, return_dict=True)
    assert ids == expected["input_ids"]


def test_logits_equal_theirs(prompts, theirs, ours, record_property):
  found = logits(*ours, prompts)
  worst = 0.0
  for ids, got in zip(prompts, found, strict=True):
    expected = torch_logits(theirs, ids)
    assert np.std(expected) > 0.5
    worst = max(worst, float(np.abs(got - expected).max()))
    # Both sides round by more than 1e-4 here and there, so the bound is 1e-5 of the largest logit.
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
  record_property("largest_difference", worst)
  print(f"largest difference of a logit: {worst:.1e}")


def log_softmax(logits_TV):
  shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
  return shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))


def test_log_probabilities_of_the_likeliest_tokens_equal_theirs(prompts, theirs, ours):
  for ids, got in zip(prompts, logits(*ours, prompts), strict=True):
    expected = torch_logits(theirs, ids).astype(np.float64)
    likeliest = expected.argmax(-1)
    np.testing.assert_array_equal(got.argmax(-1), likeliest)
    rows = np.arange(len(ids))
    np.testing.assert_allclose(log_softmax(got.astype(np.float64))[rows, likeliest],
                               log_softmax(expected)[rows, likeliest], atol=1e-4, rtol=0)


def test_logits_are_as_close_to_float64_as_theirs(prompts, theirs, ours):
  import torch
  import transformers
  exact = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64).eval()
  errors = {"ours": [], "theirs": []}
  for ids, got in zip(prompts, logits(*ours, prompts), strict=True):
    expected = torch_logits(exact, ids)
    errors["ours"].append(np.mean((got - expected) ** 2))
    errors["theirs"].append(np.mean((torch_logits(theirs, ids) - expected) ** 2))
  found = {side: float(np.sqrt(np.mean(squares))) for side, squares in errors.items()}
  print(f"root of the mean squared error against float64: {found}")
  assert found["ours"] < 1.1 * found["theirs"]


def test_greedy_continuations_equal_theirs(prompts, theirs, ours):
  import torch
  model, params = ours
  tokenizer = chat.Chat(FOLDER)
  greedy = sampler.Sampling(max_tokens=T, stop_ids=tokenizer.eos_ids, temperature=0.0)
  compiled = sampler.Sampler(model, greedy, len(prompts), max(map(len, prompts)))
  rows, _ = compiled(params, [rollouts.Prompt(i, tuple(p)) for i, p in enumerate(prompts)], (0,))
  for b, ids in enumerate(prompts):
    row = torch.tensor([ids])
    out = theirs.generate(row, attention_mask=torch.ones_like(row), do_sample=False,
                          max_new_tokens=T)[0, len(ids):].tolist()
    assert rows.response(b).tolist() == out, tokenizer.decode(ids)
  assert len(set(rows.response_length_B)) > 1


def test_a_saved_folder_reloads_there(prompts, theirs, ours, tmp_path):
  import torch
  import transformers
  model, params = ours
  folder = hf.save(tmp_path / "saved", model, params, source=FOLDER)
  again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  expected = theirs.state_dict()
  found = again.state_dict()
  assert found.keys() == expected.keys()
  assert all(torch.equal(found[name], expected[name]) for name in expected)
  assert pathlib.Path(folder, "chat_template.jinja").read_text() == pathlib.Path(
      FOLDER, "chat_template.jinja").read_text()
  np.testing.assert_array_equal(torch_logits(again, prompts[0]), torch_logits(theirs, prompts[0]))
