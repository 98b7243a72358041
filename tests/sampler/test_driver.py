"""An old driver: loops stay on the host, and one sentence says so."""

import pytest

from s2d_jax import sharding
from s2d_jax.sampler import driver, programs


@pytest.fixture
def sentences(monkeypatch):
  """The warnings that are logged."""
  found = []
  monkeypatch.setattr(driver.logging, "warning", lambda text, *args: found.append(text % args))
  driver.has_loops_in_graphs.cache_clear()
  yield found
  driver.has_loops_in_graphs.cache_clear()


class Library:
  """Stands for libcuda: a version, or the code of an error."""

  def __init__(self, version, error=0):
    self.version = version
    self.error = error

  def cuDriverGetVersion(self, pointer):
    pointer._obj.value = self.version
    return self.error


@pytest.mark.parametrize("library, expected", [
    (Library(12_020), 12_020), (Library(13_000), 13_000), (Library(0, error=999), None)])
def test_the_version_is_the_drivers(monkeypatch, library, expected):
  monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
  assert driver.version() == expected


def test_a_machine_without_a_driver_has_no_version(monkeypatch):
  def absent(name):
    raise OSError(name)

  monkeypatch.setattr(driver.ctypes, "CDLL", absent)
  assert driver.version() is None


@pytest.mark.parametrize("version, has_loops", [
    (None, True), (12_030, True), (13_000, True), (12_020, False), (11_080, False)])
def test_an_old_driver_is_named_once_and_the_compiler_keeps_its_default(
    monkeypatch, sentences, version, has_loops):
  monkeypatch.setattr(driver, "version", lambda: version)
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  for _ in range(2):
    assert (programs._loop_on_device(None) is not None) == has_loops
  if has_loops:
    assert sentences == []
  else:
    (sentence,) = sentences
    assert f"has CUDA {version // 1000}.{version % 100 // 10}, and its graphs" in sentence
    assert "install a driver of CUDA 12.3 or newer" in sentence
