"""A new objective, the alpha divergence, touches the table of stages and the config: two places."""

import pytest

from tests.newcomer.checkout import Checkout

# The new code itself: the loss and the record that declares its keys, at the end of objectives.py.
CODE = '''


def alpha_divergence(student_head, guide_head, batch, hp):
  """(1 − Σ q^α p^(1 − α)) / (α (1 − α)) of teacher q and student p, at each token."""
  def f(student_BTV, guide_BTV):
    log_p, log_q = tokens.log_softmax(student_BTV), tokens.log_softmax(guide_BTV)
    mass_BT = jnp.sum(jnp.exp(hp.alpha * log_q + (1 - hp.alpha) * log_p), axis=-1)
    return (1 - mass_BT) / (hp.alpha * (1 - hp.alpha)), {}
  total, _ = blockwise.divergence(f, student_head, guide_head, batch.weight_BT, hp.block)
  return {"loss": (total, jnp.sum(batch.count_BT))}


ALPHA = Objective(alpha_divergence, BLOCK_KEYS | {
    "alpha": Key(lambda alpha: 0 < alpha < 1, "choose it between 0 and 1")})
'''
# α = 1/2 against a sum by hand, with p = (1/2, 1/2) and q = (1/5, 4/5): 4 · (1 − √(1/10) − √(2/5)).
LOSS = """
import types
import jax.numpy as jnp
from s2d_jax import objectives
one = jnp.ones((1, 1))
heads = [(jnp.ones((1, 1, 1)), jnp.log(jnp.array(p))[:, None]) for p in ([.5, .5], [.2, .8])]
batch = types.SimpleNamespace(weight_BT=one, count_BT=one)
total, count = objectives.ALPHA(*heads, batch, types.SimpleNamespace(alpha=0.5, block=8))["loss"]
print(float(total / count))
"""
STAGES = "s2d_jax/recipe.py"
CONFIG = "configs/arithmetic.py"
ARM = "raw_bridge"


def add(checkout, in_the_table=True, in_the_config=True, code=CODE):
  checkout.append("s2d_jax/objectives.py", code)
  if in_the_table:
    checkout.edit(STAGES, '"teacher", objectives.REVERSE_KL)',
                  '"teacher", objectives.ALPHA)')
  if in_the_config:
    checkout.edit(CONFIG, "| common.reverse_kl(top_k=4)", '| {"alpha": 0.5}')


def test_two_places_are_touched(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout)
  checkout.check_plan(ARM, ["forward_kl", "reverse_kl"])
  computed = checkout.run(LOSS)
  assert float(computed.stdout) == pytest.approx(4 * (1 - 0.1**0.5 - 0.4**0.5), rel=1e-5)


@pytest.mark.parametrize("forgotten, said", [
    ({"in_the_config": False}, "config.stages.reverse_kl lacks the key 'alpha': add it"),
    ({"in_the_table": False}, "config.stages.reverse_kl lacks the key 'baseline': add it"),
    ({"code": CODE.replace('"alpha": Key(', '"alhpa": Key(')},
     "config.stages.reverse_kl lacks the key 'alhpa': add it"),
    ({"code": CODE.partition("ALPHA = ")[0] + "ALPHA = alpha_divergence\n"},
     "make it an objectives.Objective, which declares the config keys that it reads."),
])
def test_a_forgotten_place_is_an_error(tmp_path, forgotten, said):
  checkout = Checkout(tmp_path)
  add(checkout, **forgotten)
  checkout.check_refusal(ARM, said)
