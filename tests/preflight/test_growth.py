"""The compiler's account of an update, beside the memory that a fresh process in fact takes."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.preflight import growth

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_process_grows_by_the_account_of_its_update():
  done = subprocess.run([sys.executable, "-m", growth.__name__], cwd=ROOT, capture_output=True,
                        text=True, check=True, timeout=600)
  found = json.loads(done.stdout)
  # Of a layer q and o of 1,024, k and v of 512, the MLP of 3,072, norms of 1,024 and of 64; then
  # the embedding and the last norm. Each weight has two moments beside it.
  numbers = 8 * (1024 * (2 * 1024 + 2 * 512 + 3 * 3072) + 2 * 1024 + 2 * 64) + 16_001 * 1024
  assert 0 <= found["account"]["arguments"] - 12 * numbers < 50_000  # the batch and counters
  assert found["total"] >= 2e9
  assert abs(found["growth"] / found["total"] - 1) < 0.1, found
