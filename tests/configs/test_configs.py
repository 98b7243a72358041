"""Every config builds, is locked and sound; its keys are reviewed; the numbers are the paper's."""

import ast
import importlib
import itertools
import json
from pathlib import Path

import ml_collections
import pytest

from configs import common
from s2d_jax import command, doctor, paper, recipe, sweep, tasks
from s2d_jax.data import leave_out, published

ROOT = Path(__file__).parents[2]
KEYS = Path(__file__).with_name("keys.json")
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py")
               if path.stem not in ("__init__", "common"))
MATH = ["qwen3_math", "llama_math"]


def build(name, arg=""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def blocks(config, path="config"):
  """{dotted place: block} of a config and every block in it."""
  found = {path: config}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found |= blocks(value, f"{path}.{key}")
  return found


def keys(config):
  """{place: "its keys, in order"}, blocks in their places."""
  return {path: " ".join(sorted(block)) for path, block in blocks(config).items()}


def test_every_config_is_tested():
  assert {"arithmetic", *MATH} <= set(NAMES)


@pytest.mark.parametrize("arg", ["", "tiny", "seed=3,tiny=false"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_locked_and_passes_the_doctor(name, arg):
  config, *_ = runs = sweep.expand(build(name, arg))
  assert all(block.is_locked for run in runs for block in blocks(run).values())
  with pytest.raises(AttributeError):
    config.stages.teacher_grpo.banana = 1
  for run in runs:
    doctor.check_config(run, {row.name: row for row in recipe.STAGES})
  assert config.seed == (3 if "seed" in arg else 0)
  assert set(config.arms.split(",")) <= {*recipe.ARMS, "all"}
  assert config.task in tasks.TASKS


@pytest.mark.parametrize("name", NAMES)
def test_tiny_is_the_same_config_smaller(name):
  config, tiny = build(name), build(name, "tiny")
  assert keys(config) == keys(tiny)
  for path, block in blocks(config).items():
    for key in {"steps", "prompts", "problems", "samples_per_prompt", "max_tokens"} & set(block):
      assert blocks(tiny)[path][key] <= block[key], f"{path}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_an_override_changes_one_key(name):
  # A dict that stands in two places becomes one block, and then both move.
  found = blocks(build(name))
  paths_of = {}
  for path, block in found.items():
    paths_of.setdefault(id(block), []).append(path)
  assert [shared for shared in paths_of.values() if len(shared) > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_reviewed_ones(name):
  reviewed = json.loads(KEYS.read_text())
  assert keys(build(name)) == reviewed.get(name), (
      "the keys of this config changed: if every new one is needed, rewrite the snapshot with "
      "`PYTHONPATH=. python tests/configs/test_configs.py` and review the difference")


def test_the_snapshot_has_no_config_that_is_gone():
  assert sorted(json.loads(KEYS.read_text())) == NAMES


def test_an_argument_moves_several_settings():
  parsed = common.parse_arg("seed=7,tiny,models=a=b", seed=0, tiny=False, models="models")
  assert (parsed.seed, parsed.tiny, parsed.models) == (7, True, "a=b")
  for text, tiny in (("tiny=true", True), ("tiny=0", False), ("tiny=False", False), ("", False),
                     (None, False), ("tiny=1,", True)):
    assert common.parse_arg(text, tiny=False).tiny is tiny
  assert common.parse_arg("seed=-1", seed=0).seed == -1


@pytest.mark.parametrize("arg, said", [
    ("sede=1", "the config's argument 'sede' is unknown: use seed, tiny, data, "),
    ("seed=1, tiny", "the config's argument ' tiny' is unknown"),
    ("seed=1,tiny,seed=2", "the config's argument seed is given twice: give it once."),
    ("tiny,tiny", "the config's argument tiny is given twice: give it once."),
    ("student=", "the config's argument student is '': give it as in student=NAME."),
    ("tiny=yes", "the config's argument tiny is 'yes': use true or false."),
    ("tiny=", "the config's argument tiny is '': use true or false."),
    ("seed=one", "the config's argument seed is 'one': give it as in seed=0."),
    ("seed", "the config's argument seed is '': give it as in seed=0."),
    ("data=", "the config's argument data is '': give it as in data=here."),
])
def test_a_bad_argument_is_refused(arg, said):
  with pytest.raises(ValueError) as error:
    common.parse_arg(arg, seed=0, tiny=False, data="here", student="")
  assert str(error.value).startswith(said)


@pytest.mark.parametrize("name", MATH)
def test_the_papers_numbers(name):
  # arXiv 2605.12483 v4, tables 8 (GRPO, direct and last stage) and 9 (transfer); the paper prints
  # none for the Llama block.
  config, prompts = build(name), 17_398  # distinct problems of DAPO-Math-17K
  devices = 2 * 8
  assert config.dtype == "bfloat16" and config.prompt_tokens == 3072
  assert config.mesh[0] * config.mesh[1] * config.mesh[2] == devices
  for row in ("teacher_grpo", "student_grpo"):
    hp = config.stages[row]
    rows = hp.prompts * hp.sampling.samples_per_prompt
    assert hp.prompts / hp.minibatches == 8  # mini-batch, in prompts
    assert rows / hp.minibatches / hp.microbatches / devices == 1  # micro-batch per GPU
    assert hp.steps * hp.prompts / prompts == pytest.approx(10, rel=0.01)  # epochs
    assert (hp.clip_low, hp.clip_high, hp.kl_coef) == (0.2, 0.2, 5e-4)
    assert hp.kl != "none" and hp.advantages == "group"
  for row in ("forward_kl", "reverse_kl", "sft"):
    hp = config.stages[row]
    assert hp.prompts / hp.minibatches == 64
    assert hp.steps * hp.prompts / prompts == pytest.approx(1, rel=0.01)
    assert hp.sampling.samples_per_prompt == 8  # rollouts per prompt
  for hp in config.stages.values():
    assert (hp.optim.lr, hp.optim.clip) == (1e-6, 1.0)
    assert hp.sampling.max_tokens == 16_384
    # Printed: top-k −1, which is our 0.
    assert (hp.sampling.temperature, hp.sampling.top_p, hp.sampling.top_k) == (1.0, 1.0, 0)
  for benchmark in ("math500", "aime24", "aime25"):
    assert config.evals[benchmark].sampling.samples_per_prompt == 16  # avg@16
    assert config.evals[benchmark].split == benchmark
  assert {"math500", "aime24", "aime25"} <= set(config.data)


def papers_arms(teacher):
  """The arms of students that the paper's tables have for a teacher, and those without one."""
  rows = [row for table in paper.published()["tables"] for row in table["rows"]]
  return {row["arm"] for row in rows if row["teacher"] == teacher and row["student"]} | {
      "untrained", "cold_grpo"}


@pytest.mark.parametrize("name, pair, template, arms", [
    ("qwen3_math", ("Qwen3-8B", "Qwen3-1.7B"), {"enable_thinking": False},
     {"untrained", "cold_grpo", "raw_bridge", "bridge", "half_bridge_grpo_2h"}),
    ("llama_math", ("Llama-3.3-70B-Instruct", "Llama-3.1-8B-Instruct"), {},
     papers_arms("llama-3.3-70b-instruct")),
])
def test_the_papers_models_and_arms(name, pair, template, arms):
  config = build(name, "models=/elsewhere,data=/rows")
  assert (config.teacher, config.student) == tuple(f"/elsewhere/{folder}" for folder in pair)
  assert config.template.to_dict() == template
  assert (config.data.dir, config.data.labelled) == ("/rows", "dapo_math_17k")
  assert {config.data[split] for split in config.data if split not in leave_out.NOT_SPLITS} <= set(
      published.SOURCES)
  assert set(config.arms.split(",")) == arms


@pytest.mark.parametrize("arg, pair, arms", [
    ("teacher=14b", ("Qwen3-14B", "Qwen3-1.7B"), set(build("qwen3_math").arms.split(","))),
    ("teacher=1.7b", ("Qwen3-1.7B", "Qwen3-1.7B"),
     {"untrained", "cold_grpo", "bridge", "opd_only", "sft_only"}),
    ("teacher=8b,sft_teacher", ("Qwen3-8B", "Qwen3-1.7B"),
     {"untrained", "cold_grpo", "sft_teacher_bridge", "half_sft_teacher_bridge",
      "half_sft_teacher_bridge_grpo_2h", "half_sft_teacher_bridge_replay_1h"}),
    ("teacher=14b,all_arms", ("Qwen3-14B", "Qwen3-1.7B"),
     {arm for arm in papers_arms("qwen3-14b") if "teacher" not in arm}),
    ("one_gpu", ("Qwen3-8B", "Qwen3-1.7B"), set(build("qwen3_math").arms.split(","))),
    ("colab", ("Qwen3-1.7B", "Qwen3-0.6B"), {"untrained", "cold_grpo", "bridge"}),
])
def test_the_papers_teachers_and_the_small_cards(arg, pair, arms):
  for text in (arg, f"{arg},tiny"):
    config = build("qwen3_math", f"{text},models=/elsewhere,data=/rows")
    assert (config.teacher, config.student) == tuple(f"/elsewhere/{folder}" for folder in pair)
    assert set(config.arms.split(",")) == arms <= set(recipe.ARMS)
    assert config.template.to_dict() == {"enable_thinking": False}
    doctor.check_config(config, {row.name: row for row in recipe.STAGES})
    assert config.data.get("solutions") == (
        "/rows/solutions.jsonl" if "sft_teacher" in arg else None)


def test_one_card_trains_one_row_at_a_time_and_adapters_where_weights_do_not_fit():
  for arg, adapted in (("one_gpu", {"teacher_grpo", "teacher_sft"}),
                       ("colab", {row.name for row in recipe.STAGES} - {"self_distillation"})):
    config = build("qwen3_math", arg)
    assert config.mesh == (1, 1, 1)
    assert {name for name, hp in config.stages.items() if hp.lora.rank} == adapted
    for hp in config.stages.values():
      assert hp.prompts * hp.sampling.samples_per_prompt == hp.minibatches * hp.microbatches


def test_a_job_of_one_card_of_80_gb_is_short_and_else_the_papers():
  ours, papers = (build("qwen3_math", arg) for arg in ("one_gpu", ""))
  for name in ("forward_kl", "reverse_kl", "sft", "student_grpo"):
    short, long = (flat(config.stages[name]) for config in (ours, papers))
    assert {key.removeprefix("config.") for key in long if short[key] != long[key]} <= {
        "steps", "prompts", "minibatches", "microbatches", "sampling.max_tokens"}
  for name, hp in ours.stages.items():
    # Decoded tokens of the stage: less than a hundredth of the paper's in GRPO.
    short, long = (one.steps * one.prompts * one.sampling.samples_per_prompt
                   * one.sampling.max_tokens for one in (hp, papers.stages[name]))
    assert short * (100 if name.endswith("grpo") else 25) < long, name
    assert hp.sampling.max_tokens == 4096 and hp.prompts % hp.minibatches == 0
  # Mini-batches of 8 problems, as printed.
  assert ours.stages.student_grpo.prompts / ours.stages.student_grpo.minibatches == 8
  for block in (ours.probe, *ours.evals.values()):
    assert block.sampling.max_tokens == 4096 and block.sampling.samples_per_prompt <= 4
  halved = build("qwen3_math", "one_gpu,halves").stages
  assert all(2 * halved[name].steps == hp.steps for name, hp in ours.stages.items())


@pytest.mark.parametrize("arg", ["all_arms", "sft_teacher", "all_arms,sft_teacher", "halves",
                                 "halves,sft_teacher"])
def test_llama_has_the_arms_of_qwens_teachers_by_the_same_arguments(arg):
  qwen, llama = (build(name, arg) for name in ("qwen3_math", "llama_math"))
  assert llama.arms == qwen.arms and llama.data == qwen.data
  assert {name: hp.steps for name, hp in llama.stages.items()} == {
      name: hp.steps for name, hp in qwen.stages.items()}


def test_an_unknown_teacher_is_refused():
  with pytest.raises(ValueError, match="argument teacher is '4b': use 8b, 14b, 1.7b."):
    build("qwen3_math", "teacher=4b")


# Every argument of every config, with a value other than its default.
ARGUMENTS = {
    "arithmetic": ("seed=3", "cold_teacher", "same_size", "tiny"),
    "composition": ("seed=3", "cold_teacher", "same_size", "tiny"),
    "llama_math": ("seed=3", "models=/m", "data=/d", "all_arms", "sft_teacher", "halves", "tiny"),
    "qwen3_math": ("seed=3", "models=/m", "data=/d", "teacher=14b", "teacher=1.7b", "all_arms",
                   "sft_teacher", "halves", "one_gpu", "colab", "tiny"),
    "smollm2": ("seed=3", "models=/m", "teacher=a", "student=b", "layers=4", "tiny"),
    **{name: ("seed=3", "cold_teacher", "same_size", "tiny") for name in NAMES
       if name.startswith("sweep_")}}


def flat(config):
  """{dotted key: value} of a config."""
  return {f"{path}.{key}": value for path, block in blocks(config).items()
          for key, value in block.items() if not isinstance(value, ml_collections.ConfigDict)}


def test_every_argument_of_every_config_is_in_the_pairs(monkeypatch):
  read = {}
  parse = common.parse_arg

  def recorded(arg, **defaults):
    read["names"] = set(defaults)
    return parse(arg, **defaults)

  monkeypatch.setattr(common, "parse_arg", recorded)
  assert sorted(ARGUMENTS) == NAMES
  for name, texts in ARGUMENTS.items():
    build(name)
    assert {text.partition("=")[0] for text in texts} == read["names"], name


@pytest.mark.parametrize("name, pair", [
    (name, pair) for name, texts in ARGUMENTS.items()
    for pair in itertools.permutations(texts, 2)])
def test_two_arguments_combine_or_are_refused(name, pair):
  words = [text.partition("=")[0] for text in pair]
  try:
    both = flat(build(name, ",".join(pair)))
  except ValueError as error:
    assert all(word in str(error) for word in words) and str(error).endswith(".")
    return
  first, second = (flat(build(name, text)) for text in pair)
  default = flat(build(name))
  assert first != default != second
  # Neither argument is without effect beside the other.
  assert both not in (first, second)
  # A text that one argument sets, such as a folder or the arms, is not replaced by the other's.
  for mine, other in ((first, second), (second, first)):
    for key, value in mine.items():
      if isinstance(value, str) and value != default.get(key) and value != other.get(key):
        assert both[key] != other.get(key), key


@pytest.mark.parametrize("name, arg, said", [
    ("qwen3_math", "teacher=1.7b,all_arms",
     "arguments teacher and all_arms exclude each other, because the paper has three arms of a "
     "teacher of the student's size: leave one of them out."),
    ("qwen3_math", "teacher=1.7b,sft_teacher", "arguments teacher and sft_teacher exclude each"),
    ("qwen3_math", "one_gpu,colab", "arguments colab and one_gpu exclude each other, because colab "
     "has models, arms and problems of its own"),
    ("qwen3_math", "colab,teacher=8b", "arguments colab and teacher exclude each other"),
    ("qwen3_math", "colab,all_arms", "arguments colab and all_arms exclude each other"),
    ("qwen3_math", "colab,sft_teacher", "arguments colab and sft_teacher exclude each other"),
    ("qwen3_math", "one_gpu,teacher=14b", "one_gpu and teacher exclude each other, because one_gpu "
     "is for the teacher of 8B"),
    ("qwen3_math", "halves,all_arms", "arguments halves and all_arms exclude each other"),
    ("llama_math", "halves,all_arms", "arguments halves and all_arms exclude each other"),
    ("smollm2", "layers=4,student=x", "arguments layers and student exclude each other, because "
     "layers makes the student of the teacher: leave one of them out."),
])
def test_arguments_that_would_overwrite_each_other_are_refused(name, arg, said):
  with pytest.raises(ValueError, match=said):
    build(name, arg)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("arg, said", [
    ("one_gpu,colab", "the config's arguments colab and one_gpu exclude each other, because colab "
     "has models, arms and problems of its own: leave one of them out."),
    ("seed=x", "the config's argument seed is 'x': give it as in seed=0."),
])
def test_the_command_prints_the_refusal_of_an_argument_alone(arg, said, capsys):
  parser = command.config_parser("doctor", "Checks.", "an example")
  with pytest.raises(SystemExit):
    command.parse_config(parser, [f"--config={ROOT / 'configs' / 'qwen3_math.py'}:{arg}"])
  assert capsys.readouterr().err.strip() == f"s2d_jax: {said}"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_an_override_of_another_type_is_refused_by_its_flag(capsys):
  parser = command.config_parser("doctor", "Checks.", "an example")
  for flag in ("--config.seed=two", "--config.prompt_tokens=1.5"):
    with pytest.raises(SystemExit):
      command.parse_config(parser, [f"--config={ROOT / 'configs' / 'arithmetic.py'}", flag])
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"s2d_jax: flag {flag}: ") and said.endswith(" the command line.")


def test_arguments_that_add_arms_add_them_up():
  arms = {arg: set(build("qwen3_math", arg).arms.split(",")) for arg in (
      "all_arms", "sft_teacher", "all_arms,sft_teacher", "halves", "halves,sft_teacher")}
  assert arms["all_arms,sft_teacher"] == arms["all_arms"] | arms["sft_teacher"]
  halves = {arm for arm in arms["all_arms,sft_teacher"] if arm.startswith("half_")}
  assert (arms["halves"] | arms["halves,sft_teacher"]) - {"untrained"} == halves


def test_halves_make_the_papers_passes_over_half_of_the_problems():
  # arXiv 2605.12483 v4, tables 8 and 9: 10 epochs of GRPO and 1 of transfer.
  config = build("qwen3_math", "halves")
  for name, hp in config.stages.items():
    passes = 10 if name.endswith("grpo") else 1
    assert hp.steps * hp.prompts / (17_398 / 2) == pytest.approx(passes, rel=0.01), name


def test_every_number_of_the_mathematics_stages_says_where_it_is_from():
  tree = ast.parse((ROOT / "configs" / "common.py").read_text())
  lines = (ROOT / "configs" / "common.py").read_text().splitlines()
  (rl, transfer) = [node for node in tree.body if isinstance(node, ast.FunctionDef)
                    and node.name in ("_math_rl", "_math_transfer")]
  remarks = {}
  for node in (rl, transfer):
    for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
      for word in call.keywords:
        if word.arg != "optim":
          remarks[node.name, word.arg] = lines[word.lineno - 1].partition("# ")[2]
  assert {word for (name, word) in remarks if name == "_math_rl"} >= {
      "steps", "prompts", "sampling", "lr", "weight_decay", "minibatches", "clip_low", "kl_coef"}
  for key, remark in remarks.items():
    assert remark.startswith(("printed", "gap", "ours")), key


if __name__ == "__main__":
  KEYS.write_text(json.dumps({name: keys(build(name)) for name in NAMES}, indent=1) + "\n")
