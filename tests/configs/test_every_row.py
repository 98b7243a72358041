"""Each config, tiny, runs every row of the recipe on random weights; every key of it is read."""

import contextlib
import functools
import importlib
import importlib.util
import json
import string
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from s2d_jax import chat, checkpoint, doctor, keys, models, recipe, sampler, sharding, tasks
from s2d_jax.assets import tokenizer
from s2d_jax.data import leave_out
from s2d_jax.models import hf
from s2d_jax.planning import Use

pytestmark = pytest.mark.slow
TORCH = importlib.util.find_spec("torch") is not None  # absent: the folders are read by hf alone
ROWS = ("teacher_sft", "teacher_grpo", "forward_kl", "weighted_fkl", "sft", "reverse_kl",
        "student_grpo")
ARMS = {"every_row": (*(Use(row, "1h") for row in ROWS[:-1]), Use("student_grpo", "2h"))}
# The evaluation at the end of each config.
BENCHMARK = {"arithmetic": "test", "qwen3_math": "math500", "llama_math": "math500"}
BENCHMARKS = ("math500", "aime24", "aime25")
# As Qwen3's: with thinking switched off, the assistant's turn opens with a thought that is empty.
SWITCH = """\
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif -%}
"""
PRINTABLE = (*tokenizer.SPECIAL, *string.printable[:95], "\n")
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 12, "rms_norm_eps": 1e-6,
         "rope_theta": 1e4, "max_position_embeddings": 512, "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# Small models like the published pairs: Qwen3-8B has an untied head, and Qwen3-1.7B a tied one.
FAMILIES = {
    "arithmetic": ({"model_type": "qwen3", "tie_word_embeddings": True},
                   {"num_hidden_layers": 1}),
    "qwen3_math": ({"model_type": "qwen3", "tie_word_embeddings": False},
                   {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "llama_math": ({"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": False},
                   {"num_key_value_heads": 1, "hidden_size": 12}),
}
# One family trains adapters, the others all weights.
LORA_RANK = {"arithmetic": 0, "llama_math": 2, "qwen3_math": 0}


# Dotted keys that a run reads of its config, and fields that it reads of a Sampling.
READS: set[str] = set()
SAMPLING: set[str] = set()


class Recorded(ml_collections.ConfigDict):
  """A config that records each key that is read, except while it is copied or checked."""
  _unrecorded = 0
  _path = None  # of a block, dotted; a copy has none, and its reads are those of no block

  def __getitem__(self, key):
    if not Recorded._unrecorded:
      READS.add(f"{self._path}.{key}")
    return super().__getitem__(key)

  def to_dict(self, *args, **kwargs):
    with unrecorded():
      return super().to_dict(*args, **kwargs)


@contextlib.contextmanager
def unrecorded():
  Recorded._unrecorded += 1
  yield
  Recorded._unrecorded -= 1


def without_recording(function):
  """The function, with its reads of the config left out of the record."""
  def call(*args):
    with unrecorded():
      return function(*args)
  return call


class Sampling(sampler.Sampling):
  """A Sampling that records which of its fields are read."""

  def __getattribute__(self, name):
    if name in sampler.Sampling._fields:
      SAMPLING.add(name)
    return super().__getattribute__(name)


def recorded(block, path="config"):
  """A Recorded copy of a config, its blocks as they are named."""
  with unrecorded():
    copy = Recorded({key: recorded(value, f"{path}.{key}")
                     if isinstance(value, ml_collections.ConfigDict) else value
                     for key, value in block.items()}, convert_dict=False)
    object.__setattr__(copy, "_path", path)
  return copy


def unread(block, path="config"):
  """The dotted keys of a Recorded config that were not asked for."""
  found = []
  for key in block:
    with unrecorded():
      value = block[key]
    sampled = path.endswith(".sampling") and key in SAMPLING
    if f"{path}.{key}" not in READS and not sampled:
      found.append(f"{path}.{key}")
    elif isinstance(value, Recorded):
      found += unread(value, f"{path}.{key}")
  return found


def tokenize(folder, family):
  """A per-character tokenizer of printable ASCII, set up as the family's own folders are."""
  tokenizer.write(folder, max_length=512)
  tree = json.loads((folder / "tokenizer.json").read_text())
  tree["model"]["vocab"] = {token: i for i, token in enumerate(PRINTABLE)}
  (folder / "tokenizer.json").write_text(json.dumps(tree))
  if family == "qwen3":
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + SWITCH)
  else:  # Llama's folders have no padding token, and end tokens beside the tokenizer's own
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))


def write_pair(config, name):
  """Random weights, config.json and tokenizer in the two folders that the config names."""
  teacher, student = FAMILIES[name]
  arithmetic = config.task == "arithmetic"
  size = len(tokenizer.VOCABULARY if arithmetic else PRINTABLE)
  for seed, (folder, changes) in enumerate(((config.teacher, {}), (config.student, student))):
    model = models.get(SHAPE | teacher | changes | {"vocab_size": size})
    rng = np.random.default_rng(seed)
    folder = hf.save(folder, model, jax.tree.map(
        lambda x, rng=rng: rng.normal(0, 0.3, x.shape).astype(np.float32),
        models.shapes(model.config)))
    if arithmetic:
      tokenizer.write(folder, max_length=512)
    else:
      tokenize(folder, teacher["model_type"])


def write_data(data):
  """JSON lines of problem and answer, without ids: what a user has; solutions where rows learn."""
  sets = {split: name for split, name in data.items() if split not in leave_out.NOT_SPLITS}
  for first, (split, name) in enumerate(sorted(sets.items())):
    count = 12 if split == "labelled" else 2
    rows = [{"problem": f"{first}{i}+1=?", "answer": f"{first}{i + 1}"} for i in range(count)]
    if split == "labelled":
      rows = [row | {"solution": "=" + row["answer"]} for row in rows]
    path = Path(data.dir, f"{name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny(name, folder):
  """The config as `:tiny` makes it, smaller still by flat overrides, on folders made for it."""
  module = importlib.import_module(f"configs.{name}")
  benchmark = BENCHMARK[name]
  # Two prompts and at most five tokens everywhere, so that samplers share their programs.
  smaller = {"arms": "every_row", "prompt_tokens": 112, f"evals.{benchmark}.prompts": 2,
             f"evals.{benchmark}.draws": 5, f"evals.{benchmark}.sampling.max_tokens": 5,
             "evals.validation.problems": 2, "evals.validation.prompts": 2,
             "evals.validation.sampling.max_tokens": 5, "evals.validation.when": "every 2",
             "probe.problems": 2, "probe.prompts": 2, "probe.sampling.max_tokens": 5,
             "probe.block": 64}
  for row in ROWS:
    samples = 1 if row == "teacher_sft" else 2
    smaller |= {f"stages.{row}.{key}": value for key, value in {
        "steps": 2, "prompts": 2, "save_every": 1, "block": 64, "microbatches": 2,
        "sampling.samples_per_prompt": samples, "sampling.max_tokens": 5,
        "lora.rank": LORA_RANK[name]}.items()}
    if row.endswith("grpo"):
      smaller |= {f"stages.{row}.overlong": "soft", f"stages.{row}.overlong_cache": 2}
  if name == "arithmetic":
    config = module.get_config("tiny")
    with config.unlocked():
      config.evals.validation = common.evaluation(
          split="validation", sampling=common.sampling(samples_per_prompt=2, max_tokens=5),
          statistics="avg,response_length")
    smaller |= {"teacher": str(folder / "teacher"), "student": str(folder / "student"),
                "data.dir": str(folder / "data"), "prompt_tokens": 16,
                "stages.teacher_sft.sampling.max_tokens": 24}
  else:
    config = module.get_config(f"tiny,models={folder / 'models'},data={folder}")
  config.update_from_flattened_dict(smaller)
  if config.task == "math":
    # The fixture scores the three benchmarks by one block, one run after the other.
    with config.unlocked():
      config.evals = {name: config.evals[name] for name in (benchmark, "validation")}
  write_pair(config, name)
  if config.task == "math":
    write_data(config.data)
  return config


def sometimes_rewarded(task):
  """The task with a reward for some random texts, so that some groups are mixed."""
  return task._replace(reward=lambda problem, text: max(
      task.reward(problem, text), float(sum(map(ord, text)) % 2)))


class FinishedRun(NamedTuple):
  """A finished run."""
  name: str
  plans: dict    # evaluation split -> planning.Plan
  workdir: Path
  unread: list   # keys of the config


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def finished(request, quick_compiles, tmp_path_factory):
  """Every row of one config, run once, its evaluation on every benchmark it names."""
  folder = tmp_path_factory.mktemp(request.param)
  config = tiny(request.param, folder)
  with config.unlocked():
    benchmark = config.evals[BENCHMARK[request.param]]
    for block in (config, config.stages.sft, config.stages.forward_kl.optim, benchmark):
      block.banana = 1
  config = recorded(config)
  benchmark = config.evals[BENCHMARK[request.param]]
  for reads in (READS, SAMPLING):
    reads.clear()
  plans = {}
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(sharding.make_mesh(config.mesh)):
    # The planted keys would fail the checks of names, and a hash of a key does not count as reading
    # it. That a loss reads all keys of its record, form by form, is held in test_objectives.
    patch.setattr(doctor, "check_config", lambda *_: None)
    patch.setattr(keys, "check_names", lambda *_: None)
    patch.setattr(keys, "hashed", without_recording(keys.hashed))
    patch.setattr(sampler, "Sampling", Sampling)
    for split in BENCHMARKS if config.task == "math" else (benchmark.split,):
      benchmark.split = split
      with jax.transfer_guard("disallow"):
        task = sometimes_rewarded(tasks.get(config))
        plans[split] = recipe.run(config, folder / "run", task, arms=ARMS)
  return FinishedRun(request.param, plans, folder / "run", unread(config))


def test_every_key_is_read(finished):
  # The planted keys show that the record sees one that is not.
  benchmark = f"config.evals.{BENCHMARK[finished.name]}"
  expected = ["config.banana", f"{benchmark}.banana", "config.stages.forward_kl.optim.banana",
              "config.stages.sft.banana",
              # An evaluation at the end runs in no stage, and one between steps stores no text.
              f"{benchmark}.stages", "config.evals.validation.log_samples"]
  # A rank of 0 makes no adapters, so that a run on all weights uses neither their scale nor their
  # targets: only the doctor reads them, and the fixture replaces it. llama_math reads both.
  if LORA_RANK[finished.name] == 0:
    expected += [f"config.stages.{row}.lora.{key}" for row in ROWS for key in ("alpha", "targets")]
  assert sorted(finished.unread) == sorted(expected)


@functools.cache
def ours(model):
  """Jitted (params, ids, places) -> logits of one of our models."""
  def logits(params, ids, positions):
    features_BTD, _ = model.apply(params, ids, positions, jnp.ones_like(positions))
    return jnp.einsum("BTD,VD->BTV", features_BTD, model.unembed(params))
  return jax.jit(logits)


def theirs(folder, ids):
  """transformers' logits of a folder's model."""
  import torch
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    return model(torch.tensor(ids)).logits.numpy()


def test_every_row_leaves_a_model_that_others_load(finished):
  plan = next(iter(finished.plans.values()))
  assert [node.stage.name for node in plan.nodes.values()] == list(ROWS)
  ids = np.random.default_rng(0).integers(0, 24, (2, 9))
  positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
  for name, node in plan.nodes.items():
    folder = finished.workdir / name
    model, params = hf.load(folder / "hf")
    shapes, mesh = models.shapes(model.config), sharding.make_mesh()
    final = checkpoint.load_final(folder, sharding.laid_out(
        shapes, sharding.weight_shardings(mesh, models.axes(model.config), shapes)))
    jax.tree.map(np.testing.assert_array_equal, params, final)
    base, start = hf.load(plan.bases[node.stage.learner]["folder"])
    assert model is base
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, start)
    assert any(jax.tree.leaves(moved)), f"{name} has the weights of its base"
    if TORCH:  # two layers in float32
      np.testing.assert_allclose(ours(model)(params, ids.astype(np.int32), positions),
                                 theirs(folder / "hf", ids), atol=1e-4)
    assert json.loads((folder / "hf" / "lineage.json").read_text())["stage"] == name
    assert chat.Chat(folder / "hf", **plan.config.template).fingerprint() == plan.chat.fingerprint()


def test_another_benchmark_keeps_finished_stages(finished):
  first, *others = finished.plans.values()
  for plan in others:
    assert list(plan.nodes) == list(first.nodes)
  for name in first.nodes:
    assert len(list((finished.workdir / name / "starts").iterdir())) == 1
  # The student that every row has taught, on each benchmark.
  assert len(list(finished.workdir.glob("eval-*/result.json"))) == len(finished.plans)
  assert len(list(finished.workdir.glob("arms/every_row-*.json"))) == len(finished.plans)


def test_prompts_are_the_familys(finished):
  for split, plan in finished.plans.items():
    ids = [p.id for p in (*plan.prompts["all"], *plan.prompts["validation"], *plan.prompts[split])]
    assert len(set(ids)) == len(plan.problems) == len(ids)
    text = plan.chat.decode(plan.prompts[split][0].tokens)
    assert ("\\boxed{}" in text) == ("math" in finished.name)
    assert text.endswith("<think></think>") == (finished.name == "qwen3_math")
