"""A new source of samples, the problems' bare answers, touches the table of sources: one place."""

import pytest

from tests.newcomer.checkout import Checkout

SOURCES = "s2d_jax/rollouts/sources.py"
TABLE = "SOURCES: dict[str, Source] = {\n"
# The new code itself: one class.
CODE = '''class Answers(NamedTuple):
  """The answers of the problems, without the steps that lead to them."""
  stage: StageInputs

  def sample(self, params, prompts, step, round=0, on_finish=None):
    """As `RolloutSource.sample`, one row a prompt; no row is fresh."""
    texts = [self.stage.problem(prompt.id)["answer"] for prompt in prompts]
    solutions = [self.stage.encode(text) for text in texts]
    rollout = records.given_solutions(prompts, solutions,
                                      self.stage.prompt_tokens, self.stage.hp.sampling.max_tokens)
    return rollout, np.zeros(len(prompts), bool), None


'''
ENTRY = '    "answers": Source(Answers, None, "each_step", 1, texts=("answer",)),\n'
# The stage and the arm are arguments of `run`, and the config is the user's own.
RUN = """
import json, pathlib
import jax
from configs import arithmetic
from s2d_jax import metrics, objectives, recipe, sharding, tasks
from s2d_jax.data.arithmetic import problems
from s2d_jax.planning import Stage, Use

config = arithmetic.get_config("tiny").unlock()
config.arms = "answers_only"
config.stages.answers = config.stages.teacher_sft.copy_and_resolve_references()
config.stages.answers.update({"steps": 2, "prompts": 8, "minibatches": 1, "log_samples": 8})
config.stages.answers.sampling.samples_per_prompt = SAMPLES
stages = (*recipe.STAGES, Stage("answers", "answers", "student", None,
                                objectives.NEGATIVE_LOG_LIKELIHOOD))
arms = {"answers_only": (Use("answers", "all"),)}
splits = problems.splits(sizes={"labelled": 64, "validation": 32, "test": 8})
task = tasks.get(config)._replace(source=splits.__getitem__)
with jax.set_mesh(sharding.make_mesh(config.mesh)):
  plan = recipe.run(config, "work", task, stages, arms, compared=())
folder, = pathlib.Path("work").glob("answers-*")
samples = metrics.read(folder, "samples")
answers = {row["id"]: row["answer"] for row in splits["labelled"]}
print(len(samples), all(sample["text"] == answers[sample["prompt_id"]] for sample in samples))
totals = json.loads((folder / "ledger.json").read_text())
print(totals["label_uses"], totals["sequences"], totals["tokens_sampled"])
print(len(list(pathlib.Path("work").glob("probe-*"))))
"""


def add(checkout: Checkout, in_the_table: bool = True) -> None:
  checkout.edit(SOURCES, "# By the name that a stage has as its `actor`.\n",
                CODE + "# By the name that a stage has as its `actor`.\n")
  checkout.touched.clear()  # the new code itself
  if in_the_table:
    checkout.edit(SOURCES, TABLE, TABLE + ENTRY)


@pytest.mark.medium
def test_one_place_is_touched(tmp_path):
  checkout = Checkout(tmp_path)
  add(checkout)
  assert len(checkout.touched) == 1
  ran = checkout.run(RUN.replace("SAMPLES", "1"))
  assert ran.returncode == 0, ran.stderr
  learned, spent, probes = ran.stdout.splitlines()
  assert learned == "16 True"
  # Two steps of 8 prompts, whose labels are read in each; nothing is sampled.
  assert spent == "16 16 0"
  # Before and after the stage.
  assert probes == "2"


@pytest.mark.parametrize("in_the_table, samples, message", [
  (False, 1, "the actor of the stage answers is 'answers': choose it from teacher, student, given"),
  (True, 4, "samples_per_prompt is 4 and the source 'answers' has 1 for each problem: set it to 1"),
])
def test_a_forgotten_entry_and_a_wrong_number_are_errors(tmp_path, in_the_table, samples, message):
  checkout = Checkout(tmp_path)
  add(checkout, in_the_table)
  ran = checkout.run(RUN.replace("SAMPLES", str(samples)))
  assert ran.returncode and message in ran.stderr
