"""Options of a stage against their controls, in the composition world, under three seeds.

  s2d-jax run --config=results/composition/variants.py:variant=search_reward \
    --workdir=runs/methods [--plan]

A variant is a name of VARIANTS. All variants of a study begin with the same stages, which a common
work folder trains once. study.py beside this file trains all of them, and compare.py
compares them.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import common, composition

# Looking ahead: EffOPD's own settings, https://arxiv.org/abs/2605.11739.
_SEARCH = {"candidates": 5, "stride": 2.0, "problems": 50, "samples": 1, "accept": "above",
           "signal": "reward", "leaves": "blocks"}


class Variant(NamedTuple):
  """A run of a study."""
  study: str                # a key of _STUDIES
  changes: dict[str, Any]   # of the study's config, by flat keys
  seeds: int = 3


def _search(**changes: Any) -> dict[str, Any]:
  """The change that makes a stage of on-policy distillation search."""
  return {"stages.reverse_kl.foresee": _SEARCH | changes}


def _rate(factor: float) -> dict[str, Any]:
  """The change of the learning rate of on-policy distillation to a multiple of the world's."""
  return {"stages.reverse_kl.optim.lr": 2e-3 * factor}


def _form(form: str, top_k: int, support: str = "student") -> dict[str, Any]:
  """The change of the divergence of on-policy distillation; a top k is the student's."""
  changes = {"form": form, "top_k": top_k, "support": support}
  return {f"stages.reverse_kl.{key}": value for key, value in changes.items()}


def _shares(interval: int, rule: str, **changes: Any) -> dict[str, Any]:
  """The change that decides the shares of families, about twenty times a stage."""
  return {"stages.forward_kl.allocate": {
      "interval": interval, "rule": rule, "weights": "", "requirement": "",
      "kappa": 1.0, "beta": 0.5, "explore": 5, "problems": 160} | changes}


# The world's own schedule of on-policy distillation; the study of searches has a constant rate.
_DECAY = {"stages.reverse_kl.optim.warmup": 5, "stages.reverse_kl.optim.decay": "linear"}

VARIANTS = {
    # Searches at the world's learning rate, a tenth and a hundredth, each with plain on-policy
    # distillation. `chance` accepts as often as `reward` did at a tenth, and `kl` at a hundredth.
    # At the world's rate each candidate was refused: there its chance would be 0, and it `plain`.
    "plain": Variant("search", {}),
    "search_reward": Variant("search", _search()),
    "search_kl": Variant("search", _search(signal="kl")),
    "search_jump": Variant("search", _search(accept=1.0, candidates=1)),
    "plain_third": Variant("search", _rate(1 / 3)),
    "plain_triple": Variant("search", _rate(3)),
    "plain_tenfold": Variant("search", _rate(10)),
    "plain_tenth": Variant("search", _rate(0.1)),
    "search_reward_tenth": Variant("search", _rate(0.1) | _search()),
    "search_kl_tenth": Variant("search", _rate(0.1) | _search(signal="kl")),
    "search_jump_tenth": Variant("search", _rate(0.1) | _search(accept=1.0, candidates=1)),
    "search_chance_tenth": Variant("search", _rate(0.1) | _search(accept=3 / 18)),
    "plain_hundredth": Variant("search", _rate(0.01)),
    "search_reward_hundredth": Variant("search", _rate(0.01) | _search()),
    "search_kl_hundredth": Variant("search", _rate(0.01) | _search(signal="kl")),
    "search_jump_hundredth": Variant("search", _rate(0.01) | _search(accept=1.0, candidates=1)),
    "search_chance_hundredth": Variant("search", _rate(0.01) | _search(accept=24 / 39)),
    "plain_decay": Variant("search", _DECAY),
    "search_reward_decay": Variant("search", _DECAY | _search()),
    "search_kl_decay": Variant("search", _DECAY | _search(signal="kl")),
    # Forms of the reverse KL, after a warmup and without one.
    **{f"{name}{suffix}": Variant(study, form)
       for study, suffix in (("forms", ""), ("cold_forms", "_cold"))
       for name, form in {
           "full": _form("full", 4),
           "top_2": _form("top_k", 2), "top_4": _form("top_k", 4),
           "intersection_2": _form("intersection", 2, support="intersection"),
           "intersection_4": _form("intersection", 4, support="intersection"),
           "generalised_2": _form("generalised", 2), "generalised_4": _form("generalised", 4),
           "sampled": _form("sampled", 4)}.items()},
    # On-policy distillation after learning from the teacher's samples, filtered or not.
    "opd_only": Variant("warmups", {"arms": "opd_only"}),
    "sft_bridge": Variant("warmups", {"arms": "sft_bridge"}),
    "sft_bridge_kept": Variant("warmups", {
        "arms": "sft_bridge", "stages.sft.keep": "right,stopped,unrepetitive"}),
    "half_sft_opd": Variant("warmups", {"arms": "half_sft_opd"}),
    # Shares of families, in a quarter and in a half of the steps of `fkl_only`.
    **{f"{name}_{budget}": Variant(
           "shares", {"stages.forward_kl.steps": steps} | _shares(interval, **changes), seeds=5)
       for budget, steps, interval in (("quarter", 22, 1), ("half", 45, 2))
       for name, changes in {
           "uniform": {"rule": "uniform"}, "largest_gap": {"rule": "largest_gap"},
           "ensemble": {"rule": "ensemble"}, "transfer": {"rule": "transfer"},
           # The paper's control "greedy": its models without a bonus for their spread.
           "ensemble_greedy": {"rule": "ensemble", "kappa": 0.0},
           "transfer_for_long": {"rule": "transfer", "requirement": "long=1"},
           # Shares that do not change: a small grid.
           "fixed_long": {"rule": "fixed", "weights": "long=1"},
           "fixed_hard": {"rule": "fixed", "weights": "long=0.5,right=0.25,product=0.25"},
           "fixed_graded": {"rule": "fixed",
                            "weights": "sum=0.1,left=0.1,product=0.2,right=0.2,long=0.4"},
       }.items()},
    "as_drawn_quarter": Variant("shares", {"stages.forward_kl.steps": 22}, seeds=5),
    "as_drawn_half": Variant("shares", {"stages.forward_kl.steps": 45}, seeds=5),
    # Whether the teacher can finish the student's responses, along a bridge.
    "prefixes": Variant("prefixes", {}),
    # The student's start as a guide that reads the answer, against no training at all.
    "untrained": Variant("hints", {"arms": "untrained"}),
    "self_distilled": Variant("hints", {"arms": "self_distilled"}),
}


def _curve(every: int) -> dict[str, Any]:
  """Scores on `validation` between steps of on-policy distillation, for costs until a score."""
  return common.evaluation(
      split="validation", prompts=256, statistics="avg,response_length",
      sampling=common.sampling(samples_per_prompt=2, max_tokens=composition.WORLD.answer_tokens),
      when=f"every {every}", stages="reverse_kl")


def _set_search(config: ConfigDict) -> None:
  """A constant rate: a search at step 10 of 30 would otherwise have another one than a short run.
  """
  config.arms = "bridge"
  config.stages.forward_kl.steps = 20
  config.stages.reverse_kl.optim.update({"warmup": 0, "decay": "constant"})
  config.evals.validation = _curve(2)


def _set_forms(config: ConfigDict) -> None:
  """The bridge as the ladder has it."""
  config.arms = "bridge"
  config.evals.validation = _curve(5)


def _set_cold_forms(config: ConfigDict) -> None:
  """On-policy distillation from the untrained student, in as many steps as a bridge."""
  config.arms = "opd_only"
  config.evals.validation = _curve(10)


def _set_warmups(config: ConfigDict) -> None:
  config.evals.validation = _curve(5)


def _set_shares(config: ConfigDict) -> None:
  """The warmup alone, of the steps that the variant has."""
  config.arms = "fkl_only"
  config.stages.reverse_kl.steps = 0


def _set_prefixes(config: ConfigDict) -> None:
  """The bridge as the ladder has it, probed on all problems of `validation`."""
  config.arms = "bridge"
  config.probe.problems = 256
  config.probe.prefixes = 256


def _set_hints(config: ConfigDict) -> None:
  """On-policy distillation of the student from its own start, as long as a bridge."""
  steps = config.stages.forward_kl.steps + config.stages.reverse_kl.steps
  config.stages.self_distillation = ConfigDict(
      config.stages.reverse_kl.to_dict() | {"steps": steps, "hint_tokens": 29})


_STUDIES = {"search": _set_search, "forms": _set_forms, "cold_forms": _set_cold_forms,
            "warmups": _set_warmups, "shares": _set_shares, "prefixes": _set_prefixes,
            "hints": _set_hints}


def get_config(arg: str = "") -> ConfigDict:
  """configs/composition.py as a variant has it; `:variant=plain`, with `tiny` in seconds.

  Raises:
    ValueError: the variant is not a name of VARIANTS.
  """
  parsed = common.parse_arg(arg, variant="plain", seed=0, tiny=False)
  if parsed.variant not in VARIANTS:
    raise ValueError(f"the config's argument variant is {parsed.variant!r}: choose it from "
                     f"{', '.join(VARIANTS)}.")
  variant = VARIANTS[parsed.variant]
  config = composition.get_config(f"seed={parsed.seed}")
  with config.unlocked():
    config.probe.problems = 0  # the comparisons read no probe
    _STUDIES[variant.study](config)
    for key, value in variant.changes.items():
      block, _, name = key.rpartition(".")
      target = config
      for part in filter(None, block.split(".")):
        target = target[part]
      target[name] = value
    if parsed.tiny:
      common.shrink(config)
      if "prefixes" in config.probe:
        config.probe.prefixes = config.probe.problems
      config.stages.teacher_sft.sampling.samples_per_prompt = 1
    config.sweep = tuple({"seed": config.seed + i} for i in range(variant.seeds))
  return config.lock()
