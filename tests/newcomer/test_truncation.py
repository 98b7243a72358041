"""A new truncation, top-nσ, touches the config's block of sampling keys alone: one place.

Its own code is a field, a key and a line of `truncate`, together in sampler/sampling.py.
"""

from tests.newcomer.checkout import Checkout

SAMPLING = "s2d_jax/sampler/sampling.py"
COMMON = "configs/common.py"
FIELD = ("  stop_strings: tuple[str, ...] = ()\n",
         "  stop_strings: tuple[str, ...] = ()\n  top_sigma: float = 0.0\n")
KEY = ('      "min_tokens": keys.at_least(0, neutral=0),\n',
       '      "min_tokens": keys.at_least(0, neutral=0),\n'
       '      "top_sigma": Key(lambda n: n >= 0, "choose 0 (off) or more", neutral=0.0),\n')
# Top-nσ (https://arxiv.org/abs/2411.07641) keeps logits within n standard deviations of the top.
CODE = ("  if sampling.min_p > 0:\n",
        "  if sampling.top_sigma > 0:\n"
        "    low_B1 = (jnp.max(logits_BV, axis=-1, keepdims=True)\n"
        "              - sampling.top_sigma * jnp.std(logits_BV, axis=-1, keepdims=True))\n"
        "    logits_BV = jnp.where(logits_BV < low_B1, -jnp.inf, logits_BV)\n"
        "  if sampling.min_p > 0:\n")
SET = 'config.stages.reverse_kl.sampling.top_sigma = 1.5'
# Logits 4, 2, 0, 0: mean 1.5, σ = √2.75 = 1.66, so 1.5σ below the top is 1.51.
TRUNCATED = """
import jax.numpy as jnp
from s2d_jax.sampler.sampling import Sampling, truncate
sampling = Sampling(max_tokens=4, top_sigma=1.5)
print(jnp.isfinite(truncate(jnp.array([[4.0, 2.0, 0.0, 0.0]]), sampling)).tolist())
print(sampling.plain(), sampling._replace(top_sigma=0.0).plain())
"""


def add(checkout: Checkout, in_the_config: bool = True, key: bool = True) -> None:
  for old, new in (FIELD, *([KEY] if key else []), CODE):
    checkout.edit(SAMPLING, old, new, is_new_code=True)
  if in_the_config:
    checkout.edit(COMMON, "    min_tokens=0,", "    top_sigma=0.0,\n    min_tokens=0,")


def test_one_place_is_touched(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout)
  # The new code is in three pieces: the field, its key, and the line of `truncate`.
  assert (checkout.touched, checkout.new_code) == ([COMMON], [SAMPLING] * 3)
  checkout.check_plan("raw_bridge", ["forward_kl", "reverse_kl"], SET)
  ran = checkout.run(TRUNCATED)
  # A sample that is truncated is never taken for one of the model's own distribution.
  assert ran.stdout.splitlines() == ["[[True, True, False, False]]", "False True"], ran.stderr


def test_a_forgotten_place_is_an_error(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout, in_the_config=False)
  checkout.check_refusal("raw_bridge", "sampling lacks the key 'top_sigma': add it")


def test_a_forgotten_key_is_an_error(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout, key=False)
  checkout.check_refusal("raw_bridge", "the key 'top_sigma', which nothing reads")
  assert "KeyError: 'top_sigma'" in checkout.run(TRUNCATED).stderr
