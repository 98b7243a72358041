"""The programs of preflight: compiled once each, and counted on standard error."""

import jax
import jax.numpy as jnp

from s2d_jax.preflight import costs, pool


def request(name, size):
  return pool.Request("sft", name, jax.jit(jnp.sin).lower(jnp.zeros(size)))


def test_equal_programs_are_compiled_once_and_counted(capsys):
  progress = pool.Progress()
  refused = pool.Request("sft", "sample", costs.DoesNotFit("no row fits"))
  found = list(progress.costs([request("a", 2), refused, request("b", 3), request("c", 2)], None))
  assert [cost.program for cost in found] == ["a", "sample", "b", "c"]
  counts = [line.partition("(")[2] for line in capsys.readouterr().err.splitlines()]
  assert counts == ["1 of 2 programs)", "2 of 2 programs)"]
  # The stages of another run share one program and bring one more.
  list(progress.costs([request("a", 3), request("b", 4)], None))
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("sft: b compiled in ") and line.endswith(" s (3 of 3 programs)")
