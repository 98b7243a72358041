"""Records of config keys: names, ranges, defaults, and what of a block is hashed."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from s2d_jax import keys

RECORD = {
    "steps": keys.at_least(0),
    "epochs": keys.at_least(1, neutral=1),
    "block": keys.at_least(1, default=64, hashed=False),
    "optim": {"decay": keys.one_of(("constant", "linear"), neutral="constant"),
              "clip": keys.Key(lambda clip: clip > 0, "choose it above 0", default=1.0)},
}


def block(**changes):
  """A block at neutral values where there are such values, with dotted changes."""
  config = ConfigDict({"steps": 3, "epochs": 1, "block": 64,
                       "optim": {"decay": "constant", "clip": 1.0}}, type_safe=False)
  config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
  return config


def test_a_valid_block_passes():
  keys.check_block("config.x", block(), RECORD)


@pytest.mark.parametrize("changes, message", [
    ({"steps": -1}, "config.x.steps is -1: set it to a whole number of at least 0."),
    ({"epochs": 0}, "config.x.epochs is 0: set it to a whole number of at least 1."),
    ({"epochs": 1.5}, "config.x.epochs is 1.5: set it to a whole number of at least 1."),
    ({"epochs": float("inf")}, "config.x.epochs is inf: set it to"),
    ({"epochs": True}, "config.x.epochs is True: set it to"),
    ({"epochs": "many"}, "config.x.epochs is 'many': set it to"),
    ({"epochs": None}, "config.x.epochs is None: set it to"),
    ({"optim__decay": "step"},
     "config.x.optim.decay is 'step': choose it from constant, linear."),
    ({"optim__clip": 0.0}, "config.x.optim.clip is 0.0: choose it above 0."),
])
def test_a_value_out_of_range_is_refused(changes, message):
  with pytest.raises(ValueError) as error:
    keys.check_block("config.x", block(**changes), RECORD)
  assert str(error.value).startswith(message)


def test_a_missing_and_an_unknown_key_are_refused():
  for path in ("config.x", "config.x.optim"):
    spoilt = block()
    inner = spoilt.optim if path.endswith("optim") else spoilt
    inner.banana = 1
    with pytest.raises(ValueError, match=f"{path} has the key 'banana', which nothing reads: rem"):
      keys.check_block("config.x", spoilt, RECORD)
    del inner.banana
    name = sorted(inner)[0]
    del inner[name]
    with pytest.raises(ValueError, match=f"{path} lacks the key '{name}': add it"):
      keys.check_block("config.x", spoilt, RECORD)


def test_messages_of_check_values_name_the_bare_key():
  values = SimpleNamespace(decay="linear", clip=-1.0)
  with pytest.raises(ValueError, match="^clip is -1.0: choose it above 0.$"):
    keys.check_values(values, RECORD["optim"])


def test_a_block_of_defaults():
  found = keys.defaults(RECORD["optim"])
  assert found.to_dict() == {"decay": "constant", "clip": 1.0} and found.is_locked
  with pytest.raises(ValueError, match="steps has no default: give a value"):
    keys.defaults({"steps": RECORD["steps"]})
  assert keys.defaults(RECORD["optim"], clip=2.0).to_dict() == {"decay": "constant", "clip": 2.0}
  with pytest.raises(ValueError, match="the block has the key 'banana', which nothing reads"):
    keys.defaults(RECORD["optim"], banana=2.0)
  with pytest.raises(ValueError, match="clip is -2.0: choose it above 0"):
    keys.defaults(RECORD["optim"], clip=-2.0)


def test_a_key_at_its_neutral_value_is_not_hashed():
  assert keys.hashed(block(), RECORD) == {"steps": 3, "optim": {"clip": 1.0}}
  assert keys.hashed(block(epochs=2, block=9, optim__decay="linear"), RECORD) == {
      "steps": 3, "epochs": 2, "optim": {"decay": "linear", "clip": 1.0}}
  # A new key at its neutral value changes nothing, nor does a whole new block of them.
  grown = RECORD | {"lora": {"rank": keys.at_least(0, neutral=0)},
                    "new": keys.at_least(0, neutral=0)}
  config = block()
  config.lora = {"rank": 0}
  config.new = 0
  assert keys.hashed(config, grown) == keys.hashed(block(), RECORD)
  config.lora.rank = 2
  assert keys.hashed(config, grown) == keys.hashed(block(), RECORD) | {"lora": {"rank": 2}}


def test_a_block_may_lack_an_optional_key_alone():
  record = {"lr": keys.at_least(1), "longest": keys.at_least(1, neutral=0, optional=True)}
  for block, found in (({"lr": 2}, {"lr": 2}), ({"lr": 2, "longest": 3}, {"lr": 2, "longest": 3})):
    keys.check_block("config", block, record)
    assert keys.hashed(block, record) == found
  for block, said in (({"longest": 3}, "lacks the key 'lr'"),
                      ({"lr": 2, "longest": 0}, "longest is 0")):
    with pytest.raises(ValueError, match=said):
      keys.check_block("config", block, record)
