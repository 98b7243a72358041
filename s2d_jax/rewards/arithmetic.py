"""Exact check of chained addition: what follows the last "=" must be the answer."""


def reward(problem, text):
  """1.0 where the text's last number is the answer to the digit ("03", not "3"), else 0.0.

  "12+34=46+57=03" answers "03", and so does a bare "03"; the steps before it are not judged.
  """
  return float(text.rpartition("=")[2] == problem["answer"])
