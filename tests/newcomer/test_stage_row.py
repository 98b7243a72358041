"""A new stage, JSD on the student's samples, touches the table of arms and the config: two places.

The row in `recipe.STAGES` is the new code itself.
"""

import pytest

from tests.newcomer.checkout import Checkout

TABLES = "s2d_jax/recipe.py"
CONFIG = "configs/arithmetic.py"
ARM = "jsd_only"
ROW = '    Stage("on_policy_jsd", "student", "student", "teacher", objectives.JSD),\n'
USE = '    "jsd_only": (Use("teacher_grpo", "all"), Use("on_policy_jsd", "all")),\n'
BLOCK = '''      "on_policy_jsd": stage(2e-3, samples=4, steps=30, prompts=64)
                       | {"pi": 0.5, "student_temperature": 1.0, "teacher_temperature": 1.0},
'''


def add(checkout, row=ROW, use=USE, block=BLOCK):
  """Adds the row to the table of stages, and the two places that use it."""
  checkout.edit(TABLES, "STAGES = (\n", "STAGES = (\n" + row, is_new_code=True)
  if use:
    checkout.edit(TABLES, "ARMS: dict[str, Arm] = {\n", "ARMS: dict[str, Arm] = {\n" + use)
  if block:
    checkout.edit(CONFIG, "  config.stages = {\n", "  config.stages = {\n" + block)


def test_two_places_are_touched(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout)
  assert (checkout.touched, checkout.new_code) == ([TABLES, CONFIG], [TABLES])
  checkout.check_plan(ARM, ["teacher_grpo", "on_policy_jsd"])


@pytest.mark.parametrize("forgotten, said", [
    ({"row": ""}, "config.stages.on_policy_jsd is not a stage of the recipe: remove it"),
    ({"use": ""}, "there is no arm 'jsd_only': choose config.arms from"),
    ({"block": ""}, "the arm jsd_only needs config.stages.on_policy_jsd: add it"),
    ({"block": BLOCK.replace('"pi": 0.5, ', "")},
     "config.stages.on_policy_jsd lacks the key 'pi': add it"),
])
def test_a_forgotten_place_is_an_error(tmp_path, forgotten, said):
  checkout = Checkout(tmp_path)
  add(checkout, **forgotten)
  checkout.check_refusal(ARM, said)
