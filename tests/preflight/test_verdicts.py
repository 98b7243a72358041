"""The sentences on programs: sums, and the least time of a step."""

import re

from s2d_jax.preflight import costs, hlo, verdicts

GB = 10**9
SMALL = costs.Account(1, 0, 0, 0)


def program(name="update", seconds=1.0, account=SMALL, problem=""):
  return costs.Cost("reverse_kl", name, account, 3 * GB, 2.0, hlo.total(()),
                    costs.Least(seconds, 0.0, 0.0, 0.0), problem)


def test_the_numbers_of_a_refusal_have_their_sum():
  account = costs.Account(10 * GB, 20 * GB, 3 * GB, 4 * GB)
  found = verdicts.verdict([program(account=account)], 30 * GB)
  total, limit, *parts = map(float, re.findall(r"([\d.]+) GB", found))
  assert (total, limit) == (40, 30) and sum(parts) == total


def test_a_step_of_a_sweep_is_that_of_its_slowest_run():
  runs = [[program("sample", 3.0), program("update", 1.0)],
          [program("sample", 5.0), program("update", 1.0)]]
  found = verdicts.summary(runs, 10 * GB).splitlines()
  assert found[1].endswith("; a step takes at least 12.0 s: sample 10.0 (products), "
                           "update 2.0 (products)")


def test_a_step_without_one_of_its_programs_has_no_time():
  refused = program("update", account=None, problem="no memory")
  found = verdicts.summary([[program("sample"), refused]], 10 * GB)
  assert "a step takes" not in found
  assert "reverse_kl: does not fit: reverse_kl update: no memory" in found
