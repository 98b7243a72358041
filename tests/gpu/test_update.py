"""An update of Qwen3-1.7B on one card: the least time of its kernels, their bytes and its memory.

Rates are those that an H200 reached, as in `test_attention`.
"""

import jax
import pytest

from s2d_jax import objectives, sharding, training
from s2d_jax.preflight import costs, hlo, topologies
from tests.gpu.test_attention import RATES, T
from tests.gpu.test_preflight import an_update, lowered_update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="measured with jax 0.12")]

FORWARD = 'custom_call_target="__cudnn$fmhaSoftmax"'  # attention's forward kernel


def test_an_update_of_four_rows():
  # The layers are a loop, so all of them compile as fast as two.
  compiled = lowered_update("qwen3-1.7b", 4, 2048, remat="named").compile()
  text = compiled.as_text()
  found = hlo.kernels(text, unknown_trips=8)
  assert costs.least(found, RATES).seconds <= 0.165
  # Each product with weights once forward and twice backward, of 50,331,648 weights a layer.
  products = [kernel for kernel in found if kernel.flops and "fmha" not in kernel.opcode]
  assert hlo.total(products).flops == pytest.approx(
      6 * 8192 * (28 * 50_331_648 + 2048 * 151_936), rel=1e-3)
  # Without the policy, or with an optimizer that reads its updates again, these are 7 % more.
  assert hlo.total(kernel for kernel in found if not kernel.flops).bytes <= 207e9
  assert text.count(FORWARD) == 1
  assert costs.account(compiled).total <= 40e9


def test_an_update_of_a_long_row():
  few, many = (lowered_update("qwen3-1.7b", 1, T, remat="named", num_hidden_layers=layers
                              ).compile() for layers in (2, 4))
  assert few.as_text().count(FORWARD) == 1
  seconds = [costs.least(hlo.kernels(x.as_text(), unknown_trips=T // 1024), RATES).seconds
             for x in (few, many)]
  assert seconds[0] + 13 * (seconds[1] - seconds[0]) <= 0.500
  needs = [costs.account(x).total for x in (few, many)]
  assert needs[0] + 13 * (needs[1] - needs[0]) <= 50e9  # of the 78 GB that JAX takes of a card


def test_an_update_of_8b_fits_one_h200_in_two_parts():
  # Two microbatches of one row; 8,190,735,360 weights, of four bytes in each of their copies.
  weights = 4 * 8_190_735_360
  update = an_update("qwen3-8b", 2, T, "h200", microbatches=2)
  with jax.set_mesh(update.mesh):
    layout = training.shardings(update.state)
    totals = training.jit_totals(update.model, None, objectives.NEGATIVE_LOG_LIKELIHOOD, update.hp,
                                 layout)
    arguments = (update.state.params, None, None, update.batch)
    gradients = costs.account(totals.lower(*arguments).compile())
    grads, sums = jax.eval_shape(totals, *arguments)
    found = (sharding.laid_out(grads, layout.params),
             sharding.laid_out(sums, jax.tree.map(lambda _: layout.step, sums)))
    apply = training.jit_apply(update.optimizer, layout)
    applied = costs.account(apply.lower(update.state, found).compile())
    whole = costs.account(update.lowered().compile())
  limit = topologies.chip("h200").usable
  # Weights, the sum of gradients, and those of one microbatch with what it stores.
  assert 3 * weights < gradients.total < 3.25 * weights < limit
  # Weights, moments and the sum of gradients, and nothing beside them.
  assert applied.total == pytest.approx(4 * weights, rel=1e-3) and applied.total < limit
  # In one program: the moments beside the gradients.
  assert whole.total == pytest.approx(gradients.total + 2 * weights, rel=1e-2)
  assert whole.total > limit
