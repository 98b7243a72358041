"""Messages between eight cards: beside which products, and how many a token in decoding."""

import jax
import pytest

from s2d_jax import models, sharding
from s2d_jax.preflight import costs, hlo, overlap, topologies
from s2d_jax.sampler import capacity, programs
from s2d_jax.sampler.sampling import Sampling
from tests.gpu.test_preflight import lowered_update

pytestmark = pytest.mark.gpu

TOKENS = 32  # of one dispatch


# Trips of the loop over layers are two layers each, and two trips are as good as all.
LAYERS = 4
# A layer's 192,937,984 weights in bfloat16, of which a card sends its eighth to seven others.
GATHERED = 2 * 192_937_984 * 7 / 8


@pytest.mark.parametrize("remat, times, gathered", [
    # Forward, again where the block is recomputed, and for the gradients of most inputs.
    ("block", (2, 3), 0.89),
    # Forward and for the gradients of inputs.
    ("named", (1.9, 2.2), 0.75)])
def test_messages_are_sent_while_products_run(remat, times, gathered):
  text = lowered_update("qwen3-8b", 8, 4096, "h100:8", remat, num_hidden_layers=LAYERS
                        ).compile().as_text()
  layers = [one for one in overlap.messages(text) if one.looped]
  gathers = [one for one in layers if one.opcode == "all-gather"]
  low, high = times
  assert low * LAYERS * GATHERED < sum(one.bytes for one in gathers) < high * LAYERS * GATHERED
  # With one layer in a trip these are 0.87, 0.54 and 0.48. Keys, values and queries of a trip's
  # first layer are waited for: nothing can run before.
  assert overlap.share(gathers) > gathered
  sums = [one for one in layers if one.opcode == "reduce-scatter"]
  # Gradients are float32.
  assert sum(one.bytes for one in sums) == pytest.approx(2 * LAYERS * GATHERED, rel=1e-3)
  assert overlap.share(sums) > 0.8


def test_words_are_looked_up_without_gathering_their_table():
  text = lowered_update("qwen3-8b", 8, 4096, "h100:8", num_hidden_layers=LAYERS
                        ).compile().as_text()
  found = [one for one in overlap.messages(text) if not one.looped]
  # Of 151,936 × 4,096 numbers a card sends its eighth to seven others.
  table = 151_936 * 4096 * 7 / 8
  gathers = [one.bytes for one in found if one.opcode == "all-gather"]
  # Of the unembedding in bfloat16. The table of words would be as large in float32.
  assert max(gathers) == 2 * table
  # The unembedding and its gradient in float32, features of 4,096 tokens and their gradients in
  # bfloat16, and little else: ids, and gradients of norms.
  features = 2 * 4096 * 4096 * 7 / 8
  assert sum(one.bytes for one in found) < 1.001 * ((2 + 4) * table + 2 * features)


def test_features_between_layers_are_split_over_cards_that_split_heads():
  # A row of 16,383 tokens, which is padded to a multiple of the eight cards.
  width, features = 16_383, 2 * 16_384 * 4096
  temporaries, found = {}, []
  for layers in (2, 4):
    compiled = lowered_update("qwen3-8b", 1, width, "h100:8", mesh=(1, 1, 8),
                              num_hidden_layers=layers).compile()
    temporaries[layers] = costs.account(compiled).temporaries
    found.append([one for one in overlap.messages(compiled.as_text()) if one.looped])
  # Of each layer a card stores its eighth of the input and of the gradient in float32. Whole
  # inputs would be seven eighths of 134 MB more.
  layer = (features + 4 * 192_946_432) / 8
  assert temporaries[4] - temporaries[2] < 1.05 * 2 * layer
  # Two gathers and two sums of a layer forward, and backward; two gathers and a sum where the block
  # is recomputed. An all-reduce of features would send as much as one of each.
  assert not [one for one in found[0] if one.opcode == "all-reduce" and one.bytes > features]
  sent = [sum(one.bytes for one in messages if one.opcode in ("all-gather", "reduce-scatter"))
          for messages in found]
  assert sent[1] - sent[0] == pytest.approx(2 * (6 + 5) * features * 7 / 8, rel=0.01)


def in_each_step(mesh_shape, rows=64, layers=2):
  """The messages of one token of 64 rows on eight cards, {opcode: count}, and their bytes."""
  mesh = sharding.make_mesh(mesh_shape, topologies.devices("h100:8"))
  model = models.get(models.PUBLISHED["qwen3-8b"] | {"num_hidden_layers": layers},
                     dtype="bfloat16")
  shards = mesh_shape[0] * mesh_shape[1]
  shapes = capacity.Shapes((rows,), (2048,), 1024, 512, prompts=shards, shards=shards, pages=0,
                           table=0)
  with jax.set_mesh(mesh):
    weights = programs.abstract_weights(model, models.laid_out(model.config, mesh), mesh)
    slots = programs.abstract_slots(model.config, capacity.SamplerConfig(), shapes, rows, 2048,
                                    mesh)
    lowered = programs.lower_decode(model, Sampling(max_tokens=1024), TOKENS, weights, slots, mesh)
  found = [one for one in hlo.kernels(lowered.compile().as_text(), TOKENS)
           if one.collective_bytes and one.count >= TOKENS]
  return len(found), sum(one.collective_bytes for one in found) / TOKENS


def test_rows_are_decoded_without_messages():
  # Weights that are split over fsdp are whole on each card while tokens are decoded.
  assert in_each_step((1, 8, 1)) == (0, 0)


def test_heads_are_decoded_with_two_sums_a_layer():
  count, sent = in_each_step((1, 1, 8))
  # Features of 64 rows in bfloat16: of the embedding, and twice of each layer.
  features = 5 * 2 * 64 * 2 * 4096 * 7 / 8
  # The choice of a token: sums of groups of 16 words, not the logits of 151,936. Then the largest
  # logit, the words of a group and a word's logit.
  groups = 64 * 4 * (151_936 / 16) * 7 / 8
  assert features < sent < features + 1.1 * groups
  assert count == 5 + 4
