"""A config whose stages of a bridge have options: shares of families, searches, guides, hints."""

from ml_collections import ConfigDict

from configs import arithmetic


def config(**changes: object) -> ConfigDict:
  """The tiny config with `forward_kl` and `reverse_kl` alone; the second has three options.

  Args:
    changes: of the block `foresee`.
  """
  found = arithmetic.get_config("tiny")
  with found.unlocked():
    found.stages = {name: found.stages[name] for name in ("forward_kl", "reverse_kl")}
    found.stages.forward_kl.allocate = {
        "interval": 2, "rule": "transfer", "weights": "", "requirement": "", "kappa": 1.0,
        "beta": 0.5, "explore": 1, "problems": 6}
    found.stages.reverse_kl.foresee = {
        "candidates": 2, "stride": 2.0, "problems": 8, "samples": 3, "accept": "above",
        "signal": "reward", "leaves": "blocks"} | changes
    found.stages.reverse_kl.hint_tokens = 29
    if found.stages.reverse_kl.foresee.signal == "reward":
      found.stages.reverse_kl.guides = {"by": "family", "folders": {"4": found.student}}
  return found


def programs(signal: str) -> set[tuple[str, str]]:
  """(stage, program) of all that `s2d-jax preflight --fast` shows of such a config."""
  names = {"forward_kl": ("probe", "probe prefill", "probe token_logps", "token_logps", "update"),
           "reverse_kl": ("search", "search prefill", "search jump",
                          *(("gradients", "apply") if signal == "reward"
                            else ("search compare", "update")))}
  return {(stage, name) for stage in names for name in (*names[stage], "sample", "sample prefill")}
