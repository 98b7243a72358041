"""The table of sizes: the page is the rendering of what is stored, and entries are resumed."""

import json
import re

import jax
import pytest

from benchmarks import sizes
from s2d_jax import chips, manifest
from s2d_jax.preflight import costs, hlo, programs


def entry(topology="h100:8", stage="reverse_kl", revision="0123456789", **facts):
  return {"student": "qwen3-1.7b", "teacher": "qwen3-8b", "topology": topology, "stage": stage,
          "mesh": [1, 8, 1], "revision": revision, "jax": "0.12.0", "fits": True, **facts}


def test_the_page_is_the_rendering_of_the_stored_entries():
  stored = json.loads(sizes.RESULT.read_text())
  text = sizes.PAGE.read_text()
  assert stored and text == sizes.page(text, stored)
  for found in stored:
    assert re.search(rf"^\| {found['topology']} \|.*\| {found['stage']} \| "
                     rf"[^|]*{re.escape(found['verdict'])} \|", text, re.M)
    # A verdict is about the chip's memory, or says why not one row fits.
    assert f"{found['memory'] / 1e9:,.2f} GB" in found["verdict"] or not found["fits"]


def test_an_entry_has_the_verdict_and_the_least_seconds_of_a_step():
  program = costs.Cost("reverse_kl", "update", costs.Account(60, 30, 0, 0), 20, 2.0, hlo.total(()),
                       costs.Least(3.0, 0.0, 0.0, 4.0))
  found = sizes.facts([program], chips.CHIPS["h100"]._replace(memory=100))
  assert not found["fits"] and found["bytes"] == 110 and found["program"] == "update"
  assert found["step"] == {"update": {"seconds": 8.0, "bound": "network"}}
  text = sizes.table([entry(tried=4, **found)])
  (line,) = [line for line in text.splitlines() if "h100:8" in line]
  assert "| none of 4 settings fits. The first does not fit: reverse_kl update needs" in line
  assert "| 8: update 8 (network) | 0123456, 0.12.0 |" in line


def test_a_finished_entry_of_this_revision_is_not_compiled_again(monkeypatch):
  monkeypatch.setattr(manifest, "revision", lambda: "new")
  def stages(stored, again=False):
    return [(pair.teacher, stage) for pair, topology, stage
            in sizes.missing(stored, "h100:8", again)]
  stored = [entry(revision="new"), entry(revision="old", stage="student_grpo")]
  assert ("qwen3-8b", "reverse_kl") not in stages(stored)
  assert ("qwen3-8b", "student_grpo") in stages(stored)
  assert ("qwen3-14b", "reverse_kl") in stages(stored)
  assert ("qwen3-8b", "reverse_kl") in stages(stored, again=True)


def test_only_refused_entries_are_tried_again(monkeypatch):
  monkeypatch.setattr(manifest, "revision", lambda: "new")
  stored = [entry(fits=False), entry(stage="student_grpo")]
  found = [stage for pair, _, stage in sizes.missing(stored, "h100:8", again=False, refused=True)
           if pair.teacher == "qwen3-8b"]
  assert found == ["teacher_grpo", "forward_kl", "reverse_kl"]  # two are not stored yet


def test_the_first_setting_that_fits_is_taken(monkeypatch, tmp_path):
  (pair, *_) = sizes.PAIRS
  monkeypatch.setattr(sizes.topologies, "devices", lambda name: [None] * 4)
  meshes = [(1, 4, 1), (1, 2, 2), (1, 1, 4)]
  ordered = [(mesh, offload, adapters) for adapters in (0, 32) for mesh in meshes
             for offload in ("", "optimizer,guide")]
  assert list(sizes.settings(pair, 4)) == ordered

  def taken(fits):
    compiled = []
    def entry(pair, topology, stage, setting, folder, progress, names=None):
      compiled.append((setting, names))
      return {"setting": setting, "fits": fits(setting, names), "verdict": "-", "names": names}
    monkeypatch.setattr(sizes, "compiled", entry)
    found = sizes.fitting(pair, "four", "student_grpo", tmp_path, None)
    assert found["names"] is None and compiled[-1] == (found["setting"], None)
    assert found["tried"] == len({setting for setting, _ in compiled}) and found["seconds"] >= 0
    return found["setting"], compiled

  found, compiled = taken(lambda setting, names: setting.mesh[2] == 2)
  assert found == ordered[2]
  # Updates come first, and where they do not fit nothing else is compiled.
  assert compiled == [*((setting, programs.UPDATES) for setting in ordered[:3]), (ordered[2], None)]
  found, _ = taken(lambda setting, names: setting.adapters)
  assert found == ordered[6]
  # Another program than the update may be what does not fit.
  found, _ = taken(lambda setting, names: names is not None or setting.mesh[2] == 4)
  assert found == ordered[4]
  found, compiled = taken(lambda setting, names: False)
  assert found == ordered[0] and len(compiled) == len(ordered) + 1


@pytest.mark.parametrize(("facts", "shown"), [
    ({"offload": "optimizer,guide", "adapters": 0}, "1 × 8 × 1, offload optimizer,guide"),
    ({"offload": "", "adapters": 16}, "1 × 8 × 1, adapters of rank 16")])
def test_a_setting_beyond_the_mesh_is_shown(facts, shown):
  text = sizes.table([entry(verdict="fits", bytes=1, step={}, **facts)])
  assert f"| h100:8 | {shown} | reverse_kl | fits |" in text


def test_the_summary_has_the_setting_of_each_stage():
  step = {"sample": {"seconds": 1200.0}, "update": {"seconds": 34.4}}
  entries = [entry(stage=stage, step=step)
             for stage in ("teacher_grpo", "forward_kl", "reverse_kl", "student_grpo")]
  entries[0] |= {"offload": "optimizer,guide"}
  entries[1] |= {"fits": False}
  lines = sizes.summary([*entries, entry("h100", step=step)]).splitlines()
  assert lines[2:] == [
      "| h100:8 | teacher_grpo (1,234): 1 × 8 × 1, offload optimizer,guide<br>forward_kl: "
      "**no setting**<br>reverse_kl (1,234), student_grpo (1,234): 1 × 8 × 1 | – | – |",
      "| h100 | reverse_kl (1,234): 1 × 8 × 1 | – | – |"]


def test_the_revision_of_an_edited_checkout_is_marked():
  text = sizes.table([entry(verdict="fits", bytes=1, step={}, revision="0123456789+")])
  assert "| 0123456+, 0.12.0 |" in text


def test_a_setting_with_adapters_compiles_the_stage_with_them(monkeypatch, tmp_path):
  ranks = {}
  def costs_of(config, target, progress):
    assert target.programs == programs.UPDATES and not target.scores
    ranks.update({name: hp.lora.rank for name, hp in config.stages.items()})
    return [costs.Cost("student_grpo", "update", costs.Account(6, 3, 0, 0), 1, 2.0, hlo.total(()),
                       costs.Least(3.0, 0.0, 0.0, 4.0))]
  monkeypatch.setattr(sizes.preflight, "costs_of", costs_of)
  monkeypatch.setattr(sizes.topologies, "devices", lambda name: jax.devices()[:1])
  monkeypatch.setattr(sizes.topologies, "chip", lambda name: chips.CHIPS["h100"])
  (pair, *_) = sizes.PAIRS
  setting = sizes.Setting((1, 1, 1), "", adapters=32)
  found = sizes.compiled(pair, "one", "student_grpo", setting, tmp_path, None, programs.UPDATES)
  assert found["adapters"] == 32 and ranks["student_grpo"] == 32
  assert {rank for name, rank in ranks.items() if name != "student_grpo"} == {0}


def test_a_new_entry_replaces_the_older_one_in_the_order_of_the_table():
  old = [entry("h200"), entry(revision="old")]
  new = sizes.stored_with(old, entry(revision="new"))
  assert [(found["topology"], found["revision"]) for found in new] == [
      ("h100:8", "new"), ("h200", "0123456789")]


@pytest.mark.parametrize("pair", sizes.PAIRS, ids=lambda pair: pair.teacher)
def test_every_config_is_the_recipes_with_the_pages_lengths(pair, tmp_path):
  config = pair.config(tmp_path)
  assert config.prompt_tokens == 2048
  for stage in sizes.STAGES:
    assert config.stages[stage].sampling.max_tokens == 16_384
  shape = json.loads((tmp_path / pair.teacher / "config.json").read_text())
  assert shape["num_hidden_layers"] == {"qwen3-8b": 36, "qwen3-14b": 40, "llama-3.3-70b": 80}[
      pair.teacher]
