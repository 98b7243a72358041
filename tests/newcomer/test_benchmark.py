"""A second benchmark is one line of a config: it is scored in the same run, and reported."""

import pytest

from tests.newcomer.checkout import Checkout

LINE = 'common.evaluation(split="test", sampling=answers(16), ks=(1, 4, 16))}\n'
NEW = ('  config.evals["held"] = common.evaluation(split="validation", sampling=answers(2), '
       'ks=(1, 2))\n')
RUN = """
import jax
from configs import arithmetic
from s2d_jax import recipe, report, sharding, tasks
from s2d_jax.data.arithmetic import problems

config = arithmetic.get_config("tiny")
config.arms = "untrained"
splits = problems.splits(sizes={"labelled": 64, "validation": 8, "test": 8})
with jax.set_mesh(sharding.make_mesh(config.mesh)):
  recipe.run(config, "work", tasks.get(config)._replace(source=splits.__getitem__))
print(report.write(["work"]))
"""


@pytest.mark.medium
def test_one_line_is_touched(tmp_path):
  checkout = Checkout(tmp_path)
  checkout.edit("configs/arithmetic.py", LINE, LINE + NEW)
  assert len(checkout.touched) == 1
  process = checkout.run(RUN)
  assert process.returncode == 0, process.stderr
  assert "Split test" in process.stdout and "Split validation" in process.stdout
  # A table of its own for each benchmark.
  assert process.stdout.count("| arm | seeds | ") == 2
