"""Bad input at start: one sentence with the remedy, from `recipe.run`, and nothing is written."""

import json
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import arithmetic, common
from s2d_jax import doctor, keys, models, objectives, planning, recipe, tasks
from s2d_jax.assets import tokenizer
from s2d_jax.data.arithmetic import problems
from s2d_jax.errors import InputError
from s2d_jax.models import hf

SHAPE = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8, "rms_norm_eps": 1e-6,
         "rope_theta": 1e4, "tie_word_embeddings": True, "max_position_embeddings": 512,
         "vocab_size": len(tokenizer.VOCABULARY)}
SPLITS = problems.splits(sizes={"labelled": 64, "validation": 8, "test": 8})


def base(folder, **changes):
  """A model folder with random weights and the arithmetic tokenizer."""
  model = models.get(SHAPE | changes)
  rng = np.random.default_rng(0)
  hf.save(folder, model, jax.tree.map(
      lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), models.shapes(model.config)))
  tokenizer.write(folder, max_length=64)
  return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bases")
  return {role: base(folder / role) for role in ("teacher", "student")}


@pytest.fixture
def config(bases):
  """The shipped config in its tiny form with tiny bases, unlocked to be spoilt."""
  config = arithmetic.get_config("tiny")
  config.teacher, config.student = str(bases["teacher"]), str(bases["student"])
  config.unlock()
  config.evals.validation = common.evaluation(
      split="validation", problems=4, when="every 50",
      sampling=common.sampling(samples_per_prompt=4, max_tokens=21))
  return config


@pytest.fixture
def student(bases, config, tmp_path):
  """A copy of the student's folder to spoil; the config names it."""
  config.student = str(tmp_path / "student")
  return pathlib.Path(shutil.copytree(bases["student"], config.student))


def task(**splits):
  splits = SPLITS | splits
  return planning.Task(splits.__getitem__,
                     lambda problem: [{"role": "user", "content": problem["problem"]}],
                     lambda problem, text: 0.0)


def refused(config, tmp_path, own_task=None):
  """The sentence `recipe.run` stops with; it is one, it ends, and the work folder is absent."""
  workdir = tmp_path / "run"
  with pytest.raises(ValueError) as error:
    recipe.run(config, workdir, own_task or task())
  assert not workdir.exists()
  sentence = str(error.value)
  assert re.fullmatch(r"[^\n]+[:,;] [^\n]+\.", sentence), "no remedy behind the complaint"
  assert not re.search(r"[.!?] +[A-Z]", sentence), "more than one sentence"
  return sentence


def at(config, path):
  """The block of a config at a dotted path; "" is the config itself."""
  for key in filter(None, path.split(".")):
    config = config[key]
  return config


def test_a_good_config_is_planned(config):
  plan = recipe.plan(config, task())
  assert set(plan.arms) == set(config.arms.split(","))


BLOCKS = ["", "evals.validation", "evals.validation.sampling", "probe", "evals.test",
          "evals.test.sampling",
          "stages.teacher_grpo", "stages.sft", "stages.reverse_kl.optim",
          "stages.forward_kl.sampling"]


@pytest.mark.parametrize("path", BLOCKS)
def test_an_unknown_key_is_named(config, path, tmp_path):
  at(config, path).banana = 1
  name = f"config.{path}".rstrip(".")
  assert f"{name} has the key 'banana', which nothing reads" in refused(config, tmp_path)


@pytest.mark.parametrize("path", BLOCKS)
def test_a_missing_key_is_named(config, path, tmp_path):
  block = at(config, path)
  for key in [key for key in block if key != "offload"]:  # which may be absent
    value = block[key]
    del block[key]
    name = f"config.{path}".rstrip(".")
    assert f"{name} lacks the key {key!r}: add it" in refused(config, tmp_path)
    with config.ignore_type():
      block[key] = value


@pytest.mark.parametrize("key, said", [
    ("evaluation", "config.evaluation was replaced by an entry of config.evals with when='end'"),
    ("validation", "config.validation was replaced by an entry of config.evals with when='every"),
    ("stages.sft.eval_every", "config.stages.sft.eval_every was replaced by the key `when` of an")])
def test_a_key_of_an_earlier_version_names_the_new_one(config, tmp_path, key, said):
  path, _, name = key.rpartition(".")
  at(config, path)[name] = 50
  assert said in refused(config, tmp_path)
  # A config that has not got the new block yet gets the same answer, by the command too.
  if not path:
    del config.evals
    assert said in refused(config, tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
      tasks.get(config)


def test_keys_of_another_stage_are_unknown(config, tmp_path):
  config.stages.sft.kl_coef = 0.1  # a penalty without a reference
  assert "config.stages.sft has the key 'kl_coef'" in refused(config, tmp_path)


VALUES = [
    ("arms", "bridge,brigde", "there is no arm 'brigde': choose config.arms from untr"),
    ("arms", " , ", "config.arms is empty: choose from untrained"),
    ("dtype", "float16", "dtype 'float16' is unknown: choose it from float32, bfloat16"),
    ("remat", "all", "remat 'all' is unknown: choose it from none, block, dots, offload"),
    ("seed", -1, r"config.seed is -1: choose it from 0 to 2\*\*63 - 1."),
    ("half_seed", -1, "config.half_seed is -1: choose it from 0"),
    ("prompt_tokens", 500, r"prompt_tokens \+ config.stages.forward_kl.sampling.max_tokens is "
     "521 and the teacher has 512 positions .*: lower one."),
    ("evals.validation.split", "1h", "config.evals.validation.split is '1h': choose a split that"),
    ("evals.test.split", "labelled", "config.evals.test.split is 'labelled': choose a split that"),
    ("evals.validation.when", "every 0", "config.evals.validation.when is 'every 0': choose 'end'"),
    ("evals.test.when", "every 5", "config.evals has no evaluation with when='end', so no arm"),
    ("evals.validation.stages", "sft,x", "validation.stages names 'x': choose 'all', or several"),
    ("evals.test.stages", "sft", "evals.test.stages is 'sft' and when is 'end', which is after"),
    ("evals.test.statistics", "avg,best", "statistics is 'avg,best': choose 'all', or several of"),
    ("evals.validation.problems", 9, "validation.problems is 9 and the split validation has 8: lo"),
    ("stages.teacher_grpo.kl_coef", -0.1, "config.stages.teacher_grpo.kl_coef is -0.1: choose 0"),
    ("stages.teacher_grpo.clip_low", 1.5, "teacher_grpo.clip_low is 1.5: choose it from 0 to 1"),
    ("stages.student_grpo.clip_high", -3.0, "student_grpo.clip_high is -3.0: choose 0"),
    ("prompt_tokens", 6, r"of labelled takes \d+ tokens and its window is 6: raise config"),
    ("evals.validation.problems", -1, "config.evals.validation.problems is -1: set it to a whole"),
    ("evals.validation.sampling.top_p", 0.0, "config.evals.validation.sampling.top_p is 0.0: cho"),
    ("evals.validation.sampling.stop_strings", "ab", "sampling.stop_strings is 'ab': give a tuple"),
    ("probe.sampling.stop_strings", ("a", ""), r"probe.sampling.stop_strings is \('a', ''\): give"),
    ("stages.reverse_kl.sampling.stop_strings", ("<|end|>",),
     r"config.stages.reverse_kl.sampling: .*'<\|end\|>', a special token of"),
    ("sampler.cache", "int4", "config.sampler.cache is 'int4': choose it from auto, float32, bf"),
    ("sampler.page", -4, r"config.sampler.page is -4: choose 0 \(no pages\) or more"),
    ("evals.test.ks", (1, 99), r"config.evals.test.ks is \(1, 99\) and 2 samples"),
    ("evals.test.ks", (0,), r"config.evals.test.ks is \(0,\): choose each k a whole number"),
    ("evals.test.ks", (1.5,), r"config.evals.test.ks is \(1.5,\): choose each k a whole number"),
    ("evals.test.when", 5, "config.evals.test.when is 5: choose 'end', or 'every 50'"),
    ("evals.test.stages", ("sft",), r"config.evals.test.stages is \('sft',\): choose 'all'"),
    ("evals.test.statistics", ("avg",), r"evals.test.statistics is \('avg',\): choose 'all'"),
    ("evals.test.statistics", "avg,all", "config.evals.test.statistics is 'avg,all': choose 'all'"),
    ("evals.test.statistics", "greedy", "evals.test.statistics is 'greedy' and when is 'end'"),
    ("evals.test.statistics", "maj,truncated", "and when is 'end': add avg, by which a report"),
    ("evals.test.draws", 0, "config.evals.test.draws is 0: set it to a whole number of at"),
    ("evals.test.prompts", 0, "config.evals.test.prompts is 0: set it to a whole number of"),
    ("evals.test.level", 95.0, "config.evals.test.level is 95.0: choose it between 0 and 1."),
    ("evals.test.sampling.max_tokens", 0, "evals.test.sampling.max_tokens is 0: set it"),
    ("stages.student_grpo.advantages", "z", "student_grpo.advantages is 'z': choose it from gr"),
    ("stages.teacher_grpo.kl", "k1", "grpo.kl is 'k1': choose it from none, .*; k1 .* cannot be"),
    ("stages.teacher_grpo.kl", "k9", "teacher_grpo.kl is 'k9': choose it from none"),
    ("stages.reverse_kl.form", "k1", "kl.form is 'k1': choose it from full, .*; k1 .* cannot"),
    ("stages.forward_kl.student_temperature", 0.0, "kl.student_temperature is 0.0: choose it"),
    ("stages.weighted_fkl.top_k", 0, "weighted_fkl.top_k is 0: set it to a whole number of"),
    ("probe.top_k", 25, "config.probe.top_k is 25 and the vocabulary has 24 tokens: lower it."),
    ("stages.reverse_kl.minibatches", 3, r"reverse_kl draws 16 rows a step, .* 3 x 1"),
    ("stages.sft.microbatches", 32, r"config.stages.sft draws 16 rows a step, .* 1 x 32"),
    ("stages.sft.microbatches", 0, "config.stages.sft.microbatches is 0: set it to a whole"),
    ("stages.sft.steps", -1, "config.stages.sft.steps is -1: set it to 1 or more, or to 0"),
    ("label_share", 0.0, "config.label_share is 0.0: choose it above 0, up to 1"),
    ("compilation_cache", "/dev/null/x", "compilation_cache is '/dev/null/x': name a folder that"),
    ("profile", "3", "config.profile is '3': give the first step and the one after the last, such"),
    ("profile", "3:3", "config.profile is '3:3': give the first step and the one after the last"),
    ("profile", "3:5", "config.profile is '3:5' and the stage student_grpo makes 4 steps: choose"),
    ("mesh", (0, 1, 1), r"config.mesh is \(0, 1, 1\): give three sizes of at least 1"),
    ("probe.split", "labelled", "config.probe.split is 'labelled': choose a split that arms do"),
    ("probe.group", 9, "config.probe.group is 9 and 2 samples are drawn: raise"),
    ("probe.problems", 3, "config.probe.problems is 3: make it a multiple of prompts = "),
    ("probe.problems", 400, "probe.problems is 400 and the split validation has 8: lower it."),
    ("stages.weighted_fkl.pass_samples", 0, "weighted_fkl.pass_samples is 0: set it to a whole"),
    ("stages.sft.save_every", 0, "config.stages.sft.save_every is 0: set it to a whole number"),
    ("stages.sft.block", 0, "config.stages.sft.block is 0: set it to a whole number of at"),
    ("stages.sft.mean", "word", "config.stages.sft.mean is 'word': choose it from token, seq"),
    ("stages.sft.optim.lr", 0.0, "config.stages.sft.optim.lr is 0.0: choose it above 0."),
    ("stages.sft.optim.decay", "step", "sft.optim.decay is 'step': choose it from const"),
    ("stages.sft.optim.warmup", 4, "config.stages.sft.optim.warmup is 4 and the stage makes 4"),
    ("stages.sft.sampling.temperature", -1.0, "sft.sampling.temperature is -1.0: choose"),
    ("stages.sft.sampling.samples_per_prompt", 0, "samples_per_prompt is 0: set it to a whole"),
    ("stages.teacher_sft.sampling.samples_per_prompt", 4,
     "the source 'given' has 1 for each problem: set it to 1"),
    ("stages.student_grpo.mismatch_least", 3.0, "grpo.mismatch_least is 3.0: choose it below mism"),
    ("stages.student_grpo.overlong", "cut", "overlong is 'cut': choose it from none, mask, soft."),
    ("stages.student_grpo.overlong_cache", 99, "overlong_cache is 99: choose at most sampling.max"),
    ("stages.student_grpo.rounds", -1, "student_grpo.rounds is -1: set it to a whole number of"),
    ("stages.sft.sampling.min_tokens", 99, "sft.sampling.min_tokens is 99: choose at most max_tok"),
    ("stages.sft.lora.rank", -1, "config.stages.sft.lora.rank is -1: set it to a whole number"),
    ("stages.sft.lora.targets", ("z",), r"sft.lora.targets is \('z',\): choose from q, k, v, o,"),
    ("stages.sft.steps", "many", "config.stages.sft.steps is 'many': set it to 1 or more"),
    ("stages.cold_grpo", {}, "config.stages.cold_grpo is not a stage of the recipe: remove it"),
    ("stages.teacher_grpo.prompts", 64, "prompts is 64 and the split 1h has .*: lower it."),
    # No number that a report cannot write, also where a bound is on one side alone.
    ("stages.sft.optim.lr", math.inf, "sft.optim.lr is inf: choose a finite number."),
    ("stages.sft.optim.lr", math.nan, "sft.optim.lr is nan: choose it above 0."),
    ("stages.sft.optim.clip", math.nan, "sft.optim.clip is nan: choose it above 0, inf to"),
    ("stages.sft.optim.clip", -math.inf, "sft.optim.clip is -inf: choose it above 0, inf to"),
    ("stages.sft.optim.weight_decay", math.inf, "weight_decay is inf: choose a finite number."),
    ("stages.sft.optim.eps", math.inf, "sft.optim.eps is inf: choose a finite number."),
    ("stages.student_grpo.clip_most", math.nan, "clip_most is nan: choose it above 1."),
    ("stages.student_grpo.clip_high", math.inf, "clip_high is inf: choose a finite number."),
    ("stages.student_grpo.kl_coef", math.inf, "kl_coef is inf: choose a finite number."),
    ("stages.student_grpo.mismatch_most", math.inf, "mismatch_most is inf: choose a finite num"),
    ("stages.reverse_kl.student_temperature", math.inf, "student_temperature is inf: choose a f"),
    ("stages.reverse_kl.student_temperature", math.nan, "student_temperature is nan: choose it"),
    ("stages.sft.lora.alpha", math.inf, "sft.lora.alpha is inf: choose a finite number."),
    ("stages.sft.sampling.temperature", math.inf, "temperature is inf: choose 0 .greedy., or 0.00"),
    ("stages.sft.sampling.temperature", 1e-40, "temperature is 1e-40: choose 0 .greedy., or 0.00"),
    # Settings that make no sense together.
    ("stages.teacher_grpo.sampling.samples_per_prompt", 1,
     "teacher_grpo.sampling.samples_per_prompt is 1 and rewards are compared between .* 2 or more"),
    ("stages.student_grpo.sampling.temperature", 0.0,
     "temperature is 0, so all samples of a prompt are equal and their rewards teach nothing"),
    ("stages.student_grpo.sampling.temperature", 0.6,
     "temperature is 0.6 and mismatch is 'none', so .*: set mismatch to truncate or mask, or "
     "sampling.temperature to 1.0."),
    ("stages.student_grpo.sampling.top_p", 0.8, "top_p is 0.8 and mismatch is 'none', so samples"),
    ("stages.student_grpo.sampling.top_k", 5, "top_k is 5 and mismatch is 'none', so samples are"),
    ("stages.student_grpo.sampling.min_p", 0.1, "min_p is 0.1 and mismatch is 'none', so samples"),
    ("stages.student_grpo.kl_coef", 0.1, "kl_coef is 0.1 and kl is 'none', so nothing reads it"),
    ("stages.reverse_kl.foresee",
     {"candidates": 1, "stride": 2.0, "problems": 99, "samples": 1, "accept": "above",
      "signal": "reward", "leaves": "all"},
     "config.stages.reverse_kl.foresee.problems is 99 and the split .* has 64 problems: lower it"),
    ("stages.teacher_grpo.rounds", 999,
     "teacher_grpo.rounds is 999, which takes 3996 problems in a step, and the split all has "),
]


@pytest.mark.parametrize("path, value, said", VALUES)
def test_a_value_out_of_range_is_named(config, path, value, said, tmp_path):
  block, _, key = path.rpartition(".")
  with config.ignore_type():
    at(config, block)[key] = value
  assert re.search(said, refused(config, tmp_path))


def test_a_stage_with_the_jsd_objective_is_checked(config, tmp_path):
  rows = [row._replace(objective=objectives.JSD) if row.name == "reverse_kl" else row
          for row in recipe.STAGES]
  hp = config.stages.reverse_kl
  for key in ("form", "top_k", "support", "baseline"):
    del hp[key]
  for pi, temperature, said in ((1.5, 1.0, "reverse_kl.pi is 1.5: choose the teacher's share"),
                                (0.5, 0.0, "reverse_kl.teacher_temperature is 0.0: choose it")):
    hp.pi, hp.teacher_temperature = pi, temperature
    with pytest.raises(ValueError, match=said):
      recipe.plan(config, task(), stages=rows)
  hp.teacher_temperature = 1.0
  assert recipe.plan(config, task(), stages=rows).nodes


def test_a_top_k_beyond_the_vocabulary_is_refused(config, tmp_path):
  hp = config.stages.reverse_kl
  hp.top_k = 25  # which the full divergence does not read
  assert recipe.plan(config, task()).nodes
  hp.form = "top_k"
  said = "config.stages.reverse_kl.top_k is 25 and the vocabulary has 24 tokens: lower it."
  assert said in refused(config, tmp_path)
  hp.top_k = 24
  assert recipe.plan(config, task()).nodes


def test_an_arm_needs_its_stages(config, tmp_path):
  del config.stages.reverse_kl
  assert "arm raw_bridge needs config.stages.reverse_kl: add it" in refused(config, tmp_path)


def test_an_absent_folder(config, tmp_path):
  config.teacher = str(tmp_path / "nowhere")
  assert "nowhere is not a folder: give the path" in refused(config, tmp_path)


def test_a_folder_without_weights(config, student, tmp_path):
  (student / "model.safetensors").unlink()
  assert "has no weights: it needs model.safetensors" in refused(config, tmp_path)
  (student / "pytorch_model.bin").write_bytes(b"pickled")
  said = refused(config, tmp_path)
  assert "has pickled weights only (pytorch_model.bin), and unpickling runs code" in said


@pytest.mark.parametrize("change, said", [
    (lambda w: w.pop("model.norm.weight"), "lacks the weight model.norm.weight"),
    (lambda w: w.update(extra=np.zeros(1, np.float32)), "has the weight extra"),
    (lambda w: w.update({"model.norm.weight": np.zeros(9, np.float32)}),
     r"model.norm.weight has shape \(9,\) and config.json asks for \(8,\)"),
])
def test_weights_that_are_not_the_models(config, student, change, said, tmp_path):
  path = student / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  change(weights)
  safetensors.numpy.save_file(weights, path)
  assert re.search(said, refused(config, tmp_path))


def test_tokenizers_that_differ(config, student, tmp_path):
  path = student / "tokenizer.json"
  spoilt = json.loads(path.read_text())
  vocabulary = spoilt["model"]["vocab"]
  vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
  path.write_text(json.dumps(spoilt))
  said = refused(config, tmp_path)
  assert "the vocabularies of" in said and "(the token '+' is 16 and 17)" in said


def test_embeddings_that_differ(config, tmp_path):
  config.student = str(base(tmp_path / "student", vocab_size=32))
  assert "teacher and student embed 24 and 32 tokens: pad" in refused(config, tmp_path)


def test_more_tokens_than_embeddings(config, tmp_path):
  for role in ("teacher", "student"):
    config[role] = str(base(tmp_path / role, vocab_size=16))
  assert "has the token id 23 and its model embeds 16 tokens" in refused(config, tmp_path)


def test_a_split_without_problems(config, tmp_path):
  assert "the split 'test' of task 'arithmetic' is empty: give it problems." in refused(
      config, tmp_path, task(test=[]))
  assert "the split 1h has no problems: label more of them." in refused(
      config, tmp_path, task(labelled=SPLITS["labelled"][:1]))


def test_splits_that_share_a_problem(config, tmp_path):
  first = SPLITS["labelled"][0]
  said = refused(config, tmp_path, task(test=[*SPLITS["test"], first | {"id": 10**6}]))
  assert f"{first['problem']!r} stands in labelled and again in test" in said
  said = refused(config, tmp_path, task(test=[*SPLITS["test"], first | {"problem": "1+1"}]))
  assert f"{first['id']} stands in labelled and again in test" in said


def test_special_tokens_in_problems_and_solutions_are_refused_by_name(config, tmp_path):
  first = SPLITS["labelled"][0]
  for split in ("labelled", "validation"):
    rows = SPLITS[split]
    spoilt = [rows[0] | {"problem": "1+2<|end|>"}, *rows[1:]]
    sentence = refused(config, tmp_path, task(**{split: spoilt}))
    assert sentence.startswith(f"problem {rows[0]['id']} of {split} holds '<|end|>', a special ")
  config.arms = "teach"
  spoilt = [first | {"solution": "46<|end|>"}, *SPLITS["labelled"][1:]]
  said = f"^the solution of problem {first['id']} holds '<.end.>', a special token of"
  with pytest.raises(InputError, match=said):
    recipe.run(config, tmp_path / "run", task(labelled=spoilt),
               arms={"teach": (planning.Use("teacher_sft", "all"),)})


def test_an_overlap_with_labelled_problems_is_counted_and_refused(config, tmp_path):
  first, second = SPLITS["labelled"][:2]
  # Another file's spelling of one problem, and another id.
  other = first | {"id": 10**6, "problem": f" ${first['problem']}$ ?"}
  said = refused(config, tmp_path, task(test=[*SPLITS["test"], other, second]))
  shown = f"{second['problem']!r} stands in labelled and again in test"
  assert f"{shown} (2 of its problems are labelled ones)" in said
  assert "its name in config.data.overlap" in said
  one = task(test=[*SPLITS["test"], other])
  assert "stands in labelled and again in test (1 of its problems are labelled" in refused(
      config, tmp_path, one)
  config.data.overlap = "test"
  config.prompt_tokens = 32
  plan = recipe.plan(config, task(test=[*SPLITS["test"], other, second]))
  assert {split: facts["among_labelled"] for split, facts in plan.sets.items()} == {
      "labelled": 0, "validation": 0, "test": 2}
  # A problem is found by its id, which can have one answer only.
  changed = task(test=[*SPLITS["test"], second | {"answer": "other"}])
  assert shown in refused(config, tmp_path, changed)
  config.data.overlap = "validation"
  assert "stands in labelled and again in test" in refused(config, tmp_path, one)


def test_problems_are_left_out_by_split_and_id(config, tmp_path):
  rows = SPLITS["labelled"]
  other = rows[0] | {"id": 10**6, "problem": f" ${rows[0]['problem']}$ ?"}
  shared = task(test=[*SPLITS["test"], other, rows[1]], validation=[*SPLITS["validation"], rows[2]])
  config.prompt_tokens = 32
  entries = ",".join(f"labelled:{row['id']}" for row in rows[:3])
  # One sentence has the labelled problems that any scored split shares.
  assert f": set config.data.leave_out={entries} to leave these out of" in refused(
      config, tmp_path, shared)
  config.data.leave_out = entries
  plan = recipe.plan(config, shared)
  assert {split: (facts["problems"], facts["left_out"], facts["among_labelled"])
          for split, facts in plan.sets.items()} == {
              "labelled": (61, 3, 0), "validation": (9, 0, 0), "test": (10, 0, 0)}
  assert not {row["id"] for row in rows[:3]} & {p.id for p in plan.prompts["all"]}
  # The stages that draw from the smaller split are others, and so are named by other hashes.
  config.data.leave_out = ""
  before = recipe.plan(config, task())
  assert not set(before.nodes) & set(plan.nodes)
  # A file has an entry a line.
  config.data.leave_out = str(tmp_path / "left_out.txt")
  (tmp_path / "left_out.txt").write_text(entries.replace(",", "\n") + "\n\n")
  assert recipe.plan(config, shared).nodes.keys() == plan.nodes.keys()


def test_one_of_two_rows_for_one_problem_is_left_out(config, tmp_path):
  first = SPLITS["test"][0]
  twice = task(test=[*SPLITS["test"], first | {"id": 10**6}])
  said = refused(config, tmp_path, twice)
  assert said.endswith("in test and again in test: correct its file, or set "
                       "config.data.leave_out=test:1000000 to leave it out.")
  config.data.leave_out = "test:1000000"
  assert recipe.plan(config, twice).sets["test"]["problems"] == 8
  # An id of two problems cannot be left out of one.
  config.data.leave_out = ""
  other = first | {"problem": "1+1", "answer": "2"}
  assert refused(config, tmp_path, task(test=[*SPLITS["test"], other])) == (
      f"{first['id']} stands in test and again in test, for another problem: give every problem an "
      "id of its own.")


@pytest.mark.parametrize("names", ["tset", "labelled", "test,tset"])
def test_an_overlap_of_an_unknown_split_is_refused(config, tmp_path, names):
  config.data.overlap = names
  assert f"config.data.overlap names {names.split(',')[-1]!r}: choose scored" in refused(
      config, tmp_path)


def test_the_contents_of_a_plans_sets_are_hashed(config):
  first = recipe.plan(config, task()).sets
  rows = SPLITS["test"]
  assert {split: facts["problems"] for split, facts in first.items()} == {
      "labelled": 64, "validation": 8, "test": 8}
  assert recipe.plan(config, task(test=[dict(row) for row in rows])).sets == first
  for changed in ([*rows[:-1], rows[-1] | {"answer": "0"}], rows[:-1], rows[::-1]):
    other = recipe.plan(config, task(test=changed)).sets
    assert other["test"]["sha256"] != first["test"]["sha256"]
    assert other["validation"] == first["validation"]


def test_problems_without_a_solution_or_with_a_long_prompt_can_be_left_out(config, tmp_path):
  arms = {"teach": (planning.Use("teacher_sft", "all"),)}
  config.arms = "teach"
  config.data.leave_out = ""
  rows = SPLITS["labelled"]
  unsolved = [rows[0], *({k: v for k, v in row.items() if k != "solution"} for row in rows[1:3]),
              *rows[3:]]
  entries = f"labelled:{rows[1]['id']},labelled:{rows[2]['id']}"
  with pytest.raises(InputError) as error:
    recipe.plan(config, task(labelled=unsolved), arms=arms, compared=())
  assert str(error.value).endswith(f", or drop the arm, or set config.data.leave_out={entries} to "
                                   "leave out such problems (2).")
  config.data.leave_out = entries
  plan = recipe.plan(config, task(labelled=unsolved), arms=arms, compared=())
  assert len(plan.prompts["all"]) == 62
  # Two prompts are longer than the window, one of them scored.
  config.data.leave_out = ""
  long = [{"id": 10**6 + i, "problem": f"{i}" + "+1" * 9, "answer": "1", "solution": "1"}
          for i in (1, 2)]
  with pytest.raises(InputError, match="raise config.prompt_tokens, or set config.data.leave_out="
                                       r"labelled:1000001,test:1000002 to leave out such problems"):
    recipe.plan(config, task(labelled=[*rows, long[0]], test=[*SPLITS["test"], long[1]]),
                arms=arms, compared=())


def test_missing_or_long_solutions_are_refused(config, tmp_path):
  arms = {"teach": (planning.Use("teacher_sft", "all"),)}
  config.arms = "teach"
  labelled = [{k: v for k, v in row.items() if k != "solution"} for row in SPLITS["labelled"]]
  for rows, said in ((labelled, "has no solution and config.stages.teacher_sft learns from it: "),
                     ([row | {"solution": "1" * 64} for row in SPLITS["labelled"]],
                      "takes 65 tokens and config.stages.teacher_sft.sampling.max_tokens is")):
    with pytest.raises(ValueError, match=said):
      recipe.run(config, tmp_path / "run", task(labelled=rows), arms=arms)
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_disagrees_with_its_folder(config, tmp_path):
  workdir, name = tmp_path / "run", next(iter(recipe.plan(config, task()).nodes))
  (workdir / name).mkdir(parents=True)
  (workdir / name / "manifest.json").write_text(json.dumps({"inputs": {"seed": 1}}))
  with pytest.raises(ValueError, match="disagrees with its folder's name: .*, so put the right m"):
    recipe.run(config, workdir, task())
  assert [path.name for path in workdir.iterdir()] == [name]


@pytest.mark.parametrize("text", ["{}", "[]", "{\"inputs\": {", "{\"inputs\": {\"seed\": 1}}"])
@pytest.mark.parametrize("kind", ["stage", "eval"])
def test_a_broken_manifest_of_a_stage_or_a_score(config, tmp_path, kind, text):
  workdir, name = tmp_path / "run", next(iter(recipe.plan(config, task()).nodes))
  folder = workdir / (name if kind == "stage" else "eval-0123456789ab")
  folder.mkdir(parents=True)
  (folder / "manifest.json").write_text(text)
  with pytest.raises(InputError, match="manifest.json .*put the right manifest back, .*--redo="):
    recipe.run(config, workdir, task())
  assert [path.name for path in workdir.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_broken_file_of_a_model_is_named(config, student, name, tmp_path):
  (student / name).write_text('{"a": \n')
  assert f"student/{name} is not JSON (" in refused(config, tmp_path)


def test_an_unknown_task(config):
  config.task = "algebra"
  with pytest.raises(ValueError, match="config.task is 'algebra': choose arithmetic or math"):
    tasks.get(config)


def test_the_data_block_of_the_arithmetic_world(config, tmp_path):
  config.data.banana = 1
  with pytest.raises(ValueError, match="config.data has the key 'banana', which nothing reads"):
    tasks.get(config)
  config.data = {}
  with pytest.raises(ValueError, match="config.data lacks the key 'dir': add it"):
    tasks.get(config)


def test_a_split_that_the_data_does_not_name(config, tmp_path):
  config.task, config.data = "math", {"labelled": str(tmp_path / "labelled.jsonl")}
  (tmp_path / "labelled.jsonl").write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
  config.prompt_tokens = 200
  said = refused(config, tmp_path, tasks.get(config))
  assert "config.data names no split 'validation': add its file" in said


def test_a_users_own_objective_is_checked_like_ours(config):
  def loss(student_head, guide_head, batch, hp):
    raise NotImplementedError
  def at_most_two(hp):
    if hp.alpha > 2:
      raise ValueError(f"alpha is {hp.alpha}: choose at most 2.")
  record = objectives.BLOCK_KEYS | {"alpha": keys.Key(lambda a: a > 0, "choose it above 0")}
  objective = objectives.Objective(loss, record, uses_guide=lambda hp: False, check=at_most_two)
  stages = [stage._replace(objective=objective) if stage.name == "sft" else stage
            for stage in recipe.STAGES]

  def refusal():
    with pytest.raises(ValueError) as error:
      recipe.plan(config, task(), stages=stages)
    return str(error.value)

  assert refusal().startswith("config.stages.sft lacks the key 'alpha': add it")
  config.stages.sft.alpha = -1.0
  assert refusal() == "config.stages.sft.alpha is -1.0: choose it above 0."
  config.stages.sft.alpha = 3.0
  assert refusal() == "config.stages.sft.alpha is 3.0: choose at most 2."
  config.stages.sft.alpha = 1.0
  config.stages.sft.banana = 1.0
  assert refusal().startswith("config.stages.sft has the key 'banana', which nothing reads")
  del config.stages.sft.banana
  assert recipe.plan(config, task(), stages=stages).nodes


def test_an_objective_that_declares_no_keys_is_refused(config):
  stages = [stage._replace(objective=objectives.forward_kl) if stage.name == "sft" else stage
            for stage in recipe.STAGES]
  with pytest.raises(ValueError, match="objective of the stage sft is .*: make it an objec"):
    recipe.plan(config, task(), stages=stages)


@pytest.mark.parametrize("changes, message", [
    ({"actor": "techer"}, "the actor of the stage sft is 'techer': choose it from teacher, stude"),
    ({"learner": "given"}, "the learner of the stage sft is 'given': choose it from teacher, stud"),
    ({"guide": "teachr"}, "the guide of the stage sft is 'teachr': choose it from None, teacher"),
    ({"objective": objectives.Objective(objectives.forward_kl, objectives.BLOCK_KEYS)},
     "config.stages.sft: its objective compares with a guide and the stage has none: name one"),
])
def test_a_row_with_an_unknown_role_or_without_its_guide_is_refused(config, changes, message):
  stages = [stage._replace(**changes) if stage.name == "sft" else stage for stage in recipe.STAGES]
  with pytest.raises(ValueError, match=message):
    recipe.plan(config, task(), stages=stages)


def test_unknown_labels_of_an_arm_are_refused(config):
  config.arms = "mine"
  with pytest.raises(ValueError, match="the arm mine gives sft the labels '3h': choose all, 1h or"):
    recipe.plan(config, task(), arms={"mine": (planning.Use("sft", "3h"),)}, compared=())


@pytest.mark.parametrize("checker", ["string", "verify"])
def test_answers_that_no_response_can_match_are_refused_by_id(tmp_path, checker):
  rows = ["5", "\\boxed{5}", "\\frac{1}{2}", "\\left\\{1", "She has 5.\n#### 5",
          "~", "\\text{Monday}"]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"id": 10 + i, "problem": f"p{i}", "answer": answer}) + "\n"
                          for i, answer in enumerate(rows)))
  task = tasks.math(ConfigDict({"data": {"labelled": str(path)}, "checker": checker}))
  problems = task.source("labelled")
  splits = {"labelled": [problems[i] for i in range(len(problems))]}
  with pytest.raises(InputError) as error:
    doctor.check_answers(task.reward, task.respond, splits)
  assert str(error.value) == (
      "no response matches the answers of some problems (4 of labelled): correct them, or set "
      "config.data.leave_out=labelled:11,labelled:13,labelled:14,labelled:15 to leave them out.")
  # The entries that the value has already stay in it.
  with pytest.raises(InputError, match="leave_out=test:1,labelled:11,labelled:13,"):
    doctor.check_answers(task.reward, task.respond, splits, "test:1")
  doctor.check_answers(task.reward, task.respond, {"labelled": splits["labelled"][:1]})
  # A checker that takes an empty answer for right is refused too.
  with pytest.raises(InputError, match="leave_out=labelled:10 to leave"):
    doctor.check_answers(lambda problem, text: 1.0, task.respond, {"labelled": problems[:1]})


# A normal response to a problem of the answer 5 matches none of these.
NO_ANSWERS = [
    "Answer: 5", "The answer is 5.", "**Answer:** 5", "Final answer: 5", "answer=5",
    "<answer>5</answer>", "5\n\nExplanation: 2+3", "5\nThus it is 5.", '["5"]', '{"answer": "5"}',
    '"5"', "N/A", "n/a", "See solution", "see the figure above", "null", "TBD", "(5", "5)",
    "\\left(5", "Solution: 5", "The result is 5", "['5']", "{'answer': 5}",
    "5 &", "5 \\\\", "Answer:"]
ANSWERS = [
    "5", "\\text{Monday}", "3 : 2", "x=5", "(1,2]", "[1,2)", "]1,2[", "]1,2]", "p - q", "[1, 2]",
    "(-\\infty,-2)\\cup]3,4]", "\\left[0,1\\right)", "\\frac{1}\n{2}", "1,\n2", "2+3=5",
    "\\{1,2\\}",
    "\\begin{pmatrix} 1 & 2 \\\\\n 3 & 4 \\end{pmatrix}", "f(x)=(x+1)", "(A)", "a < b", "Monday",
    "none", "5.", "$5$", "[5]", "\\text{See you}", "5\n", "(1,2)\n"]


def unmatched(answers):
  math = tasks.math(ConfigDict({"data": {}, "checker": "string"}))
  rows = [{"id": i, "problem": f"p{i}", "answer": text} for i, text in enumerate(answers)]
  found = doctor.unmatched(math.reward, math.respond, {"labelled": rows})
  return [answers[number] for _, number in found]


def test_answers_that_no_response_spells_are_refused():
  assert unmatched(NO_ANSWERS) == NO_ANSWERS


def test_texts_intervals_and_formulas_are_answers():
  assert unmatched(ANSWERS) == []


def test_a_task_without_boxes_may_have_such_answers():
  rows = [{"id": i, "problem": "p", "answer": text} for i, text in enumerate(NO_ANSWERS)]
  found = doctor.unmatched(lambda problem, text: float(problem["answer"] == text),
                           lambda answer: answer, {"labelled": rows})
  assert found == []


def test_an_arm_that_trains_nothing_is_refused(config, tmp_path):
  config.arms = "cold_grpo"
  config.stages.student_grpo.steps = 0
  said = refused(config, tmp_path)
  assert "the arm cold_grpo trains nothing, because all of its stages have 0 steps: raise" in said
