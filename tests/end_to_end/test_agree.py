"""Processes that are about to run different programs say so in time, and do not wait for ever."""

import os
import socket

import pytest

from tests import interpreter

SCRIPT = """
import sys, time
import jax
from s2d_jax import hosts, sharding
process, port, seconds, *texts = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
hosts.AGREE_SECONDS = int(seconds)
try:
  if texts[0] == "sample":  # two samplers on one mesh, each with the prompts it was given
    from s2d_jax import models, rollouts, sampler
    model = models.get({"model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "head_dim": 4,
                        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
                        "tie_word_embeddings": True, "max_position_embeddings": 64})
    mesh = sharding.make_mesh((1, 2, 1))
    with jax.set_mesh(mesh):
      where = sharding.weight_shardings(
          mesh, models.axes(model.config), models.shapes(model.config))
      params = jax.jit(model.init, out_shardings=where)(jax.random.key(0))
      sampling = sampler.Sampling(4, samples_per_prompt=2, temperature=float(texts[2]))
      compiled = sampler.Sampler(model, sampling, batch=1, prompt_tokens=2)
      rows, _ = compiled(params, [rollouts.Prompt(int(texts[1]), (1, 2))], (0,))
      texts = [str(rows.response_length_B.sum())]
    print("drew", *texts)
    texts = []
  if texts[0] == "start":
    rate, microbatches = texts[1:]
    hosts.check_start({"stages.sft.optim": {"lr": float(rate)},
                       "stages.sft.microbatches": int(microbatches), "revision": "abc"})
    texts = []
  for text in texts:
    if text == "dead":
      time.sleep(20)
    hosts.agree("sampler", text)
  print("agreed", len(texts))
except (RuntimeError, ValueError) as error:
  print("refused:", error)
time.sleep(6 if process == "0" else 0)  # process 0 serves the other
"""


def outputs(*texts, seconds=60):
  """The output of two processes that compare texts, one list of texts a process."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  both = [interpreter.start("-c", SCRIPT, i, port, seconds, *text, env=environment)
          for i, text in enumerate(texts)]
  return [process.wait(120).stdout.strip() for process in both]


@pytest.mark.medium
def test_equal_texts_pass():
  assert outputs(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == ["agreed 4"] * 2


@pytest.mark.medium
def test_a_different_text_is_refused_by_name():
  for process, other, text in zip((0, 1), (1, 0), outputs(["a", "b"], ["a", "x"]), strict=True):
    assert text == (f"refused: processes {process} and {other} differ in round 1 of the sampler: "
                    "they must run one program on the same data; start again from the checkpoint.")


@pytest.mark.medium
def test_an_absent_process_is_named():
  here, _ = outputs(["a", "b"], ["a", "dead", "b"], seconds=10)
  assert here.startswith("refused: process 1 has not reached round 1 of the sampler within 10 s")


@pytest.mark.medium
def test_samplers_of_other_prompts_or_settings_do_not_start():
  one = ["sample", "5", "1.0"]
  assert all("drew 8" in text for text in outputs(one, one))
  for other in (["sample", "6", "1.0"], ["sample", "5", "0.9"]):
    for text in outputs(one, other):
      assert "differ in round 0 of the sampler" in text and "drew" not in text


@pytest.mark.medium
@pytest.mark.parametrize("other, said", [
    (("0.1", "2"), "stages.sft.microbatches = 1 and process 1 has 2"),
    (("0.2", "1"), "stages.sft.optim = {'lr': 0.1} and process 1 has {'lr': 0.2}")])
def test_processes_that_were_started_differently_name_the_difference(other, said):
  first, second = outputs(["start", "0.1", "1"], ["start", *other])
  assert first == (f"refused: process 0 has {said}: start all processes with one command, code and "
                   "data.")
  assert second.startswith("refused: process 1 has stages.sft.") and "process 0 has" in second


@pytest.mark.medium
def test_processes_that_were_started_alike_go_on():
  assert outputs(["start", "0.1", "1"], ["start", "0.1", "1"]) == ["agreed 0"] * 2
