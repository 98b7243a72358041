"""Names of topologies, and what is said where one is wrong or cannot be compiled for."""

import importlib.metadata

import pytest

from s2d_jax import chips
from s2d_jax.preflight import topologies, verdicts


@pytest.mark.parametrize("name, memory", [
  ("h100", 80), ("h100:8", 80), ("h200:8", 141), ("a100", 80)])
def test_a_card_has_the_memory_of_its_data_sheet(name, memory):
  chip = topologies.chip(name)
  assert chip.platform == "gpu"
  assert 0.98 * memory * 1e9 < chip.memory < 1.08 * memory * 1e9


# A compiler says "exceeds available HBM (15.75G)" where a program is too large for a v5e.
@pytest.mark.parametrize("name, gib", [
  ("v5e:4x4", 15.75), ("v5p:2x2x4", 95.74), ("v6e:8x8", 31.25)])
def test_a_tpu_has_the_memory_that_its_compiler_has(name, gib):
  chip = topologies.chip(name)
  assert chip.platform == "tpu"
  assert abs(chip.memory - gib * 2**30) < 1


@pytest.mark.parametrize("name", ["", "h100:", "h100:0", "h100:12", "h100:2x4", "b300", "v5e",
                                  "v5e:4x", "v7:2x2", "H100"])
def test_an_unknown_topology_names_the_known_ones(name):
  with pytest.raises(ValueError, match="unknown: name a card .a100, h100, h200.* v5e, v5p, v6e"):
    topologies.devices(name)


def test_of_a_gpu_jax_takes_a_share_and_of_a_tpu_all():
  assert topologies.chip("h100").usable == int(0.92 * 84_942_979_072)
  assert topologies.chip("v5e:4x4").usable == topologies.chip("v5e:4x4").memory
  assert verdicts.memory(topologies.chip("h100")) == (
      "a device has 84.94 GB, of which JAX takes 92%: 78.15 GB")
  assert verdicts.memory(topologies.chip("v5e:4x4")) == "a device has 16.91 GB"


def test_cards_of_several_hosts_share_a_slower_network():
  assert topologies.chip("h100:64").network < topologies.chip("h100:8").network / 5


@pytest.mark.parametrize("name, package, extra", [
  ("h100:8", "jax-cuda12-plugin", "gpu-compile"), ("v5e:4x4", "libtpu", "tpu")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package, extra):
  def missing(package):
    raise importlib.metadata.PackageNotFoundError(package)
  monkeypatch.setattr(importlib.metadata, "version", missing)
  with pytest.raises(
      ValueError, match=rf"{package}, which is not installed.*pip install -e '\.\[{extra}\]'"):
    topologies.devices(name)


@pytest.mark.parametrize("kind, name", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"), ("cpu", None)])
def test_a_chip_is_found_by_jaxs_name_of_it(kind, name):
  assert chips.of_kind(kind) is (None if name is None else chips.CHIPS[name])
