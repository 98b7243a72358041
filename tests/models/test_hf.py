"""Hugging Face folders: there and back, on meshes, whole or not at all, and what is refused."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from s2d_jax import manifest, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.models import digests, hf, saving, shards


@pytest.fixture
def saved(tmp_path, tiny_json, randomized):
  """(folder, model, params) of a tiny Llama that was saved."""
  model = models.get(tiny_json("llama"))
  params = randomized(model)
  return hf.save(tmp_path / "model", model, params), model, params


def edit_weights(folder, change, stale=False):
  """Rewrites the weights of a folder after `change` of the dict of them.

  Its checksums are deleted, as most published folders have none, or are `stale` from here on.
  """
  if not stale:
    (folder / "SHA256SUMS").unlink(missing_ok=True)
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, other="model-00002-of-00002.safetensors"):
  """Splits the weights of a folder in two, as large checkpoints are; `other` is in the index."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  parts = {"model-00001-of-00002.safetensors": names[::2],
           "model-00002-of-00002.safetensors": names[1::2]}
  for file, part in parts.items():
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
  weight_map = dict.fromkeys(names[::2], "model-00001-of-00002.safetensors")
  (folder / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": weight_map | dict.fromkeys(names[1::2], other)}))


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_saving_and_loading_is_exact(saved):
  folder, model, params = saved
  again, got = hf.load(folder)
  assert again is model
  assert_equal(got, params)


def test_saved_tensors_have_hugging_face_names_and_layouts(saved):
  folder, _, params = saved
  theirs = safetensors.numpy.load_file(folder / "model.safetensors")
  x = np.random.default_rng(0).normal(size=32).astype(np.float32)
  ours = params["layers"]["attn"]
  q, o = (theirs[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qo")
  # A Torch linear is W x with W [out, in]; its 64 outputs are 4 heads of 16, head by head.
  np.testing.assert_allclose((q @ x).reshape(4, 16), np.einsum("D,DNH->NH", x, ours["q"][1]),
                             rtol=1e-4, atol=1e-5)
  heads = q @ x
  np.testing.assert_allclose(
      o @ heads, np.einsum("NH,NHD->D", heads.reshape(4, 16), ours["o"][1]), rtol=1e-4, atol=1e-5)


def test_shards_and_their_index(saved):
  folder, _, params = saved
  shard(folder)
  assert_equal(hf.load(folder)[1], params)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4), (2, 2, 2)])
def test_loading_on_a_mesh_gives_each_device_its_shards(shape, saved):
  folder, model, params = saved
  mesh = sharding.make_mesh(shape)
  _, got = hf.load(folder, mesh)
  assert_equal(jax.device_get(got), params)
  want = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
  assert jax.tree.map(lambda x: x.sharding, got) == want


def test_weights_on_a_mesh_are_saved_whole(saved, tmp_path):
  folder, model, params = saved
  _, placed = hf.load(folder, sharding.make_mesh((1, 2, 4)))
  assert_equal(hf.load(hf.save(tmp_path / "again", model, placed))[1], params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_weights_are_loaded_in_the_dtype_of_the_argument(stored, dtype, saved, tmp_path):
  _, model, params = saved
  cast = jax.tree.map(lambda x: x.astype(stored), params)
  folder = hf.save(tmp_path / "cast", model, cast)
  assert json.loads((folder / "config.json").read_text())["dtype"] == stored
  _, got = hf.load(folder, dtype=dtype)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype or "float32")}
  assert_equal(got, jax.tree.map(lambda x: x.astype(dtype or "float32"), cast))


def test_loading_needs_no_implicit_transfer(saved):
  folder, model, params = saved
  with jax.transfer_guard("disallow"):
    hf.load(folder, sharding.make_mesh((2, 2, 2)))
    hf.save(folder, model, hf.load(folder)[1])


def test_a_tied_head_stored_twice_is_dropped_if_equal(tiny_json, randomized, tmp_path):
  # Qwen3-0.6B and 1.7B are published so.
  model = models.get(tiny_json("qwen3", tie_word_embeddings=True))
  params = randomized(model)
  folder = hf.save(tmp_path / "tied", model, params)
  def copy(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  edit_weights(folder, copy)
  assert_equal(hf.load(folder)[1], params)
  def differ(tensors):
    tensors["lm_head.weight"][0, 0] += 1
  edit_weights(folder, differ)
  with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
    hf.load(folder)


def test_a_descendant_keeps_the_tokenizer_and_the_config_of_its_source(saved, tmp_path):
  folder, model, params = saved
  (folder / "tokenizer.json").write_text("{}")
  (folder / "chat_template.jinja").write_text("{{ messages }}")
  (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
  (folder / "README.md").write_text("not about the descendant")
  edit_config(folder, eos_token_id=7, torch_dtype="bfloat16")
  child = hf.save(tmp_path / "child", model, params, source=folder, lineage={"stage": "sft"})
  assert sorted(p.name for p in child.iterdir()) == [
      "SHA256SUMS", "chat_template.jinja", "config.json", "generation_config.json", "lineage.json",
      "model.safetensors", "tokenizer.json"]
  config = json.loads((child / "config.json").read_text())
  assert (config["eos_token_id"], config["dtype"], "torch_dtype" in config) == (7, "float32", False)
  assert json.loads((child / "lineage.json").read_text()) == {"stage": "sft"}


def test_saving_again_replaces_and_leaves_nothing_else(saved):
  folder, model, params = saved
  other = jax.tree.map(lambda x: x + 1, params)
  hf.save(folder, model, other)
  assert_equal(hf.load(folder)[1], other)
  assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_an_interrupted_save_leaves_the_old_folder(saved, monkeypatch):
  folder, model, params = saved
  def cut(*_):
    raise KeyboardInterrupt
  monkeypatch.setattr(safetensors.numpy, "save_file", cut)
  with pytest.raises(KeyboardInterrupt):
    hf.save(folder, model, jax.tree.map(lambda x: x + 1, params))
  assert_equal(hf.load(folder)[1], params)
  monkeypatch.undo()
  hf.save(folder, model, params)  # what was cut short is swept away
  assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_equal_weights_give_equal_bytes_and_identity(saved, tmp_path):
  folder, model, params = saved
  copy = hf.save(tmp_path / "copy", model, params)
  for path in folder.iterdir():
    assert path.read_bytes() == (copy / path.name).read_bytes()
  assert hf.identity(folder) == hf.identity(copy)


def test_the_checksum_is_of_the_file(saved):
  folder, _, _ = saved
  want = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
  assert (folder / "SHA256SUMS").read_text() == f"{want}  model.safetensors\n"


def test_identity_changes_with_values_header_size_config_index_and_download(saved, tmp_path):
  folder, model, params = saved
  identities = [hf.identity(folder)]
  def look():
    identities.append(hf.identity(folder))
    assert len(set(identities)) == len(identities)
  hf.save(folder, model, jax.tree.map(lambda x: x + 1, params))
  look()  # through the checksum: same shapes, same size
  edit_weights(folder, lambda tensors: tensors.update(extra=np.zeros(1, np.float32)))
  look()
  with open(folder / "model.safetensors", "ab") as f:
    f.write(b"\0")
  look()
  edit_config(folder, rope_theta=5.0)
  look()
  record = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
  record.parent.mkdir(parents=True)
  for etag in "ab":
    record.write_text(f"commit\n{etag}\n0.0\n")
    look()
  hf.save(tmp_path / "sharded", model, params)
  folder = tmp_path / "sharded"
  shard(folder)
  look()
  index = folder / "model.safetensors.index.json"
  index.write_text(index.read_text() + " ")
  look()


def test_identity_changes_with_the_blob_of_a_download(saved, tmp_path):
  folder, _, _ = saved
  before = hf.identity(folder)
  (tmp_path / "blobs").mkdir()
  (folder / "model.safetensors").rename(tmp_path / "blobs" / "d34db33f")
  (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "d34db33f")
  assert hf.identity(folder) != before


@pytest.fixture(params=["small", "large"])
def file_size(request, monkeypatch):
  """Files are hashed whole, or as if they were too large for that."""
  if request.param == "large":
    monkeypatch.setattr(digests, "_WHOLE", 0)


def test_two_fine_tunes_without_checksums_have_two_identities(saved, tmp_path, file_size):
  folder, model, params = saved
  for path, changes in {"layers": 1, "embed": 2, "norm": 3}.items():
    other = hf.save(tmp_path / f"other{changes}", model, params | {
        path: jax.tree.map(lambda x: x * 1.001, params[path])})
    for copy in (folder, other):
      (copy / "SHA256SUMS").unlink(missing_ok=True)
    sizes = [(copy / "model.safetensors").stat().st_size for copy in (folder, other)]
    assert sizes[0] == sizes[1]
    assert hf.identity(folder) != hf.identity(other)


def test_every_tensor_is_in_the_identity(saved, file_size):
  folder, _, _ = saved
  names = safetensors_header(folder / "model.safetensors")
  identities = {hf.identity(folder)}
  for name in names:
    def change(tensors, name=name):
      tensors[name] = tensors[name] + 1
    edit_weights(folder, change, stale=True)
    identities.add(hf.identity(folder))
  assert len(identities) == 1 + len(names)


def test_one_number_of_a_small_file_is_in_the_identity(saved):
  folder, _, _ = saved
  before = hf.identity(folder)
  path = folder / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 64
  path.write_bytes(data)
  assert hf.identity(folder) != before


def test_a_swapped_pair_of_tensors_has_another_identity(saved, file_size):
  folder, _, _ = saved
  (folder / "SHA256SUMS").unlink()
  before = hf.identity(folder)
  def swap(tensors):
    a, b = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]
  edit_weights(folder, swap)
  assert hf.identity(folder) != before


def test_the_identity_repeats_and_is_that_of_a_copy(saved, tmp_path, file_size):
  folder, _, _ = saved
  shutil.copytree(folder, tmp_path / "copy")
  assert hf.identity(folder) == hf.identity(folder) == hf.identity(tmp_path / "copy")


def test_a_large_tensor_is_read_in_pieces_from_its_first_byte_to_its_last(tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "_WHOLE", 0)
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(100_000, np.float32), "b": np.zeros(3, np.float16)},
                              path)
  hashes = {digests._values_hash(path)}
  # The ends of both tensors, and of the first 32 KiB of 400 KB spread over it: one byte in twelve.
  spans = shards.spans(path)
  for name in "ab":
    for byte in (spans[name][0], spans[name][1] - 1):
      data = bytearray(path.read_bytes())
      data[byte] ^= 1
      path.write_bytes(data)
      hashes.add(digests._values_hash(path))
  assert len(hashes) == 5
  start, end = spans["a"]
  found = 0
  before = digests._values_hash(path)
  for byte in range(start, end, 4001):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
    found += digests._values_hash(path) != before
    before = digests._values_hash(path)
  assert 6 <= found <= 10  # of 100 single bytes; a fine-tune changes thousands


def damaged(path, change):
  """Turns one bit of a file round, cuts it, empties it or deletes it."""
  data = path.read_bytes()
  if change == "unlink":
    path.unlink()
  else:
    middle = len(data) // 2
    path.write_bytes({"flip": data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1:],
                      "cut": data[:middle], "empty": b""}[change])


@pytest.mark.parametrize("change", ["flip", "cut", "empty"])
def test_weights_are_compared_with_the_checksums_of_their_folder(change, saved):
  folder, _, params = saved
  # As `sha256sum *` writes it, with a file that was not downloaded.
  sums = folder / "SHA256SUMS"
  sums.write_text(f"{'0' * 64}  original/consolidated.00.pth\n" + "".join(
      f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} *./{name}\n"
      for name in ("config.json", "model.safetensors")))
  jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], params)
  for name in ("model.safetensors", "config.json"):
    before = (folder / name).read_bytes()
    damaged(folder / name, change)
    with pytest.raises(InputError) as refused:
      hf.load(folder)
    assert str(refused.value) == (
        f"{folder}/{name} holds other bytes than were written: get it again, or delete {sums} if "
        "you changed it yourself.")
    (folder / name).write_bytes(before)
  hf.load(folder)


def test_weights_are_compared_on_a_mesh_too_and_their_small_files_without_weights(saved):
  folder, _, _ = saved
  path = folder / "model.safetensors"
  damaged(path, "flip")
  with pytest.raises(InputError, match="model.safetensors holds other bytes"):
    hf.load(folder, sharding.make_mesh((1, 2, 1)))
  hf.check(folder)  # reads no weight
  (folder / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
  with pytest.raises(InputError, match="config.json holds other bytes"):
    hf.check(folder)


@pytest.mark.parametrize("form", ["# weights\n\n{sum}  {name}\n", "{SUM}  ./{name}\n",
                                  "SHA256 ({name}) = {sum}\n"])
def test_checksums_with_comments_in_capitals_or_with_tags_are_read(form, saved):
  folder, _, params = saved
  name = "model.safetensors"
  right = hashlib.sha256((folder / name).read_bytes()).hexdigest()
  (folder / "SHA256SUMS").write_text(form.format(sum=right, SUM=right.upper(), name=name))
  jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], params)
  wrong = "0" * 64
  (folder / "SHA256SUMS").write_text(form.format(sum=wrong, SUM=wrong, name=name))
  with pytest.raises(InputError, match=f"{name} holds other bytes than were written"):
    hf.load(folder)


@pytest.mark.parametrize("options", [[], ["--tag"], ["--binary"]])
def test_names_that_sha256sum_escapes_are_read(options, saved):
  folder, _, params = saved
  # A name that splitlines would cut, and three that coreutils escapes.
  names = ["a\nb.json", "c\\d.json", "e\\nf.json", "g\x1ch\u2028.json"]
  for name in names:
    (folder / name).write_text("{}")
  sums = folder / "SHA256SUMS"
  sums.write_bytes(subprocess.run(
      ["sha256sum", *options, *names, "model.safetensors"], cwd=folder, capture_output=True,
      check=True).stdout)
  assert sums.read_text().count("\n\\") == 2  # of three lines with escapes, one is the first
  jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], params)
  for name in names:
    (folder / name).write_text("[]")
    with pytest.raises(InputError, match=re.escape(f"{name} holds other bytes than were written")):
      hf.load(folder)
    (folder / name).write_text("{}")


@pytest.mark.parametrize("sums", [b"", b"\xff\xfe", b"not sums"])
def test_damaged_checksums_are_no_checksums(sums, saved):
  folder, _, _ = saved
  (folder / "SHA256SUMS").write_bytes(sums)
  with pytest.raises(InputError, match="SHA256SUMS is damaged, or .*: get it again, or delete it"):
    hf.load(folder)


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "unlink"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_model_of_a_finished_stage_is_compared_with_the_stages_checksums(
    name, change, saved, tmp_path, monkeypatch):
  folder, _, params = saved
  stage = tmp_path / "reverse_kl-0123456789ab"
  stage.mkdir()
  folder.rename(stage / "hf")
  manifest.write(stage, {"inputs": {}})
  monkeypatch.chdir(stage)  # the path need not say of which stage it is
  jax.tree.map(np.testing.assert_array_equal, hf.load("hf")[1], params)
  damaged(stage / "hf" / name, change)
  with pytest.raises(InputError) as refused:
    hf.load("hf")
  assert str(refused.value).startswith(f"hf/{name} ")
  assert str(refused.value).endswith(
      f": put the file back, or make {stage.name} again by the command of its run with "
      f"--redo={stage.name}.")
  (stage / "checksums" / "finished.json").write_bytes(b"")
  with pytest.raises(InputError, match=r"finished.json is empty: put the file back, or make rev"):
    hf.load("hf")


@pytest.mark.parametrize("sums", [b"", b"\xff\xfe", b"not sums", b"x" * 64 + b"  other.file\n"])
def test_checksums_of_another_form_are_no_error(sums, saved):
  folder, _, _ = saved
  before = hf.identity(folder)
  (folder / "SHA256SUMS").write_bytes(sums)
  assert hf.identity(folder) != before


@pytest.mark.parametrize("record", ["", "commit", "commit\n"])
def test_a_damaged_record_of_a_download_is_no_error(record, saved):
  folder, _, _ = saved
  before = hf.identity(folder)
  path = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
  path.parent.mkdir(parents=True)
  path.write_text(record)
  assert hf.identity(folder) == before  # no checksum is recorded


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="nowhere is not a folder"):
    hf.load(tmp_path / "nowhere")


def test_a_folder_without_config_is_refused(tmp_path):
  with pytest.raises(ValueError, match="has no config.json"):
    hf.load(tmp_path)


# Texts of a config.json that describe no model: (text, sentence behind the file's name).
@pytest.mark.parametrize("function", [hf.load, hf.check, hf.identity])
@pytest.mark.parametrize("text, sentence", [
    ("null", "is not a JSON object"), ("[]", "is not a JSON object"), ("", "is empty"),
    ('{"model_type": "llama"', "is not JSON"), ('{"a": ' * 5000, "is nested too deeply"),
    ('{"vocab_size": 1, "vocab_size": 2}', "has the key 'vocab_size' twice"),
    ('{"rms_norm_eps": NaN}', "has NaN, which JSON lacks"),
    ('{"vocab_size": %s}' % ("9" * 5000), "has an integer of 5000 digits"),
    ('{"name": "\\ud800"}', "has half a surrogate pair")])
def test_a_config_that_is_no_object_is_refused(function, text, sentence, saved):
  folder, _, _ = saved
  (folder / "config.json").write_text(text)
  with pytest.raises(InputError, match=f"^{folder}/config.json {sentence}"):
    function(folder)


@pytest.mark.parametrize("changes, sentence", [
    ({"vocab_size": None}, "has null under 'vocab_size'"),
    ({"vocab_size": 272.9}, "has 272.9 under 'vocab_size': make it an integer from 1 to"),
    ({"max_position_embeddings": 0}, "has 0 under 'max_position_embeddings'"),
    ({"rms_norm_eps": -1}, "has -1 under 'rms_norm_eps': make it a number"),
    ({"model_type": "mamba"}, "asks for model_type='mamba'"),
    ({"num_experts": 8}, "asks for num_experts=8")])
def test_a_wrong_key_is_named_with_its_folder(changes, sentence, saved):
  folder, _, _ = saved
  edit_config(folder, **changes)
  for function in (hf.load, hf.check, hf.read_config):
    with pytest.raises(InputError, match=f"^{folder}/config.json {sentence}"):
      function(folder)


def test_a_config_that_is_a_folder_is_refused(saved):
  folder, _, _ = saved
  (folder / "config.json").unlink()
  (folder / "config.json").mkdir()
  with pytest.raises(InputError, match="config.json cannot be read .Is a directory.: download it"):
    hf.load(folder)


@pytest.mark.parametrize("function", [hf.load, hf.identity])
def test_a_folder_without_weights_is_refused(function, saved):
  folder, _, _ = saved
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="has no weights: it needs model.safetensors"):
    function(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(name, saved):
  folder, _, _ = saved
  (folder / "model.safetensors").rename(folder / name)
  with pytest.raises(ValueError, match=f"pickled weights only .{name}., and unpickling runs code"):
    hf.load(folder)


@pytest.mark.parametrize("function", [hf.load, hf.identity])
def test_a_folder_with_auto_map_is_refused(function, saved):
  folder, _, _ = saved
  edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
  with pytest.raises(ValueError, match="auto_map, code of its own"):
    function(folder)


def test_a_missing_weight_is_named(saved):
  folder, _, _ = saved
  edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
  with pytest.raises(ValueError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
    hf.load(folder)


def test_a_left_over_weight_is_named(saved):
  folder, _, _ = saved
  name = "model.layers.1.self_attn.q_norm.weight"
  edit_weights(folder, lambda tensors: tensors.update({name: np.zeros(16, np.float32)}))
  with pytest.raises(ValueError, match=f"has the weight {name} .1 in all. that a llama"):
    hf.load(folder)


def test_a_wrong_shape_is_named(saved):
  folder, _, _ = saved
  edit_config(folder, intermediate_size=48)
  with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \(40, 32\) and config.json "
                                       r"asks for \(48, 32\)"):
    hf.load(folder)


def test_a_type_that_is_not_read_is_named(saved):
  folder, _, _ = saved
  def quantize(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  edit_weights(folder, quantize)
  with pytest.raises(ValueError, match="model.norm.weight is stored as I8"):
    hf.load(folder)


@pytest.mark.parametrize("other", ["../model.safetensors", "/etc/model.safetensors",
                                   "a/b.safetensors", "..\\x.safetensors", "weights.bin"])
@pytest.mark.parametrize("function", [hf.load, hf.identity])
def test_shards_may_not_leave_the_folder(other, function, saved):
  folder, _, _ = saved
  shard(folder, other)
  with pytest.raises(ValueError, match="which is not a safetensors file of this folder"):
    function(folder)


def test_a_missing_shard_is_named(saved):
  folder, _, _ = saved
  shard(folder, "model-00003-of-00003.safetensors")
  with pytest.raises(ValueError, match="lacks the shard model-00003-of-00003.safetensors"):
    hf.load(folder)


def test_a_file_cut_short_is_refused(saved):
  folder, _, _ = saved
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  (folder / "SHA256SUMS").unlink()
  last = list(safetensors_header(path))[-1]
  with pytest.raises(ValueError, match=f"model.safetensors is not whole .*, {last} is cut short"):
    hf.load(folder)


def safetensors_header(path):
  """Names of a file's tensors in the order of their bytes, from the format's own description."""
  data = path.read_bytes()
  about = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
  about.pop("__metadata__", None)
  return sorted(about, key=lambda name: about[name]["data_offsets"][0])


@pytest.mark.parametrize("index", [{"a": 1}, ["x"], None])
def test_an_index_of_the_wrong_form_is_refused(index, saved):
  folder, _, _ = saved
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  with pytest.raises(ValueError, match="has no weight_map of tensors to files"):
    hf.load(folder)


@pytest.mark.parametrize("change, said", [
    (lambda names: names.pop("model.norm.weight"), "model.norm.weight is in no shard and it is in"),
    (lambda names: names.update(ghost="model.safetensors"),
     "ghost is in model.safetensors and it is in no shard")])
def test_an_index_that_is_wrong_is_refused(change, said, saved):
  folder, _, _ = saved
  names = dict.fromkeys(safetensors_header(folder / "model.safetensors"), "model.safetensors")
  change(names)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
  with pytest.raises(ValueError, match=said):
    hf.load(folder)


def test_a_kill_between_two_renames_loses_nothing(saved, monkeypatch):
  # The process is killed after the old folder was moved aside: its weights and the new ones exist.
  folder, model, params = saved
  rename, renamed = type(folder).rename, []
  def killed(self, to):
    if renamed:
      raise KeyboardInterrupt
    renamed.append(rename(self, to))
  monkeypatch.setattr(type(folder), "rename", killed)
  other = jax.tree.map(lambda x: x + 1, params)
  with pytest.raises(KeyboardInterrupt):
    hf.save(folder, model, other)
  assert not folder.exists()
  monkeypatch.setattr(type(folder), "rename", rename)
  assert_equal(hf.load(folder.with_name(".model.old"))[1], params)
  assert_equal(hf.load(folder.with_name(".model.partial"))[1], other)
  hf.save(folder, model, params)
  assert_equal(hf.load(folder)[1], params)
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_with_adapters_is_refused(saved, tmp_path):
  _, model, params = saved
  adapted = models.build(dataclasses.replace(model.config, lora=models.Lora(2, 4.0, ("q",))))
  with pytest.raises(ValueError, match="a model with adapters has no Hugging Face folder"):
    hf.save(tmp_path / "new", adapted, params)
  assert not (tmp_path / "new").exists()


def test_a_tied_head_is_compared_a_few_rows_at_a_time(tiny_json, randomized, tmp_path, monkeypatch):
  model = models.get(tiny_json("qwen3", tie_word_embeddings=True))
  folder = hf.save(tmp_path / "model", model, randomized(model))
  edit_weights(folder, lambda tensors: tensors.update(
      {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
  read, sizes = shards.read, []
  monkeypatch.setattr(shards, "_ROWS", 10)
  monkeypatch.setattr(shards, "read", lambda *args: sizes.append(args[0].name) or read(*args))
  hf.check(folder)
  assert not sizes  # headers alone
  hf.load(folder)
  assert sizes[:10] == ["lm_head.weight", "model.embed_tokens.weight"] * 5  # 48 rows


def test_a_header_that_is_too_long_is_refused(saved):
  folder, _, _ = saved
  (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
  with pytest.raises(ValueError, match="declares a header of 1152921504606846976 bytes"):
    hf.identity(folder)


def test_saving_over_something_else_is_refused(saved, tmp_path):
  _, model, params = saved
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter.tex").write_text("")
  with pytest.raises(ValueError, match="thesis exists and holds no model.safetensors"):
    hf.save(tmp_path / "thesis", model, params)
  assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_saving_needs_the_models_own_tree(saved, tmp_path):
  _, model, params = saved
  with pytest.raises(ValueError, match="the parameter norm has shape none"):
    hf.save(tmp_path / "x", model, {k: v for k, v in params.items() if k != "norm"})
  with pytest.raises(ValueError, match=r"the parameter norm has shape \(31,\)"):
    hf.save(tmp_path / "x", model, params | {"norm": params["norm"][1:]})
  assert not (tmp_path / "x").exists()


def test_saving_needs_one_type(saved, tmp_path):
  _, model, params = saved
  with pytest.raises(ValueError, match="parameters of several types"):
    hf.save(tmp_path / "x", model, params | {"norm": params["norm"].astype(jnp.bfloat16)})


def test_a_source_of_another_model_is_refused(saved, tmp_path, tiny_json):
  folder, _, params = saved
  other = models.get(tiny_json("llama", rope_theta=7.0))
  with pytest.raises(ValueError, match="is another model than the one to save"):
    hf.save(tmp_path / "x", other, params, source=folder)


def test_a_weight_that_is_there_twice_is_named(saved):
  folder, _, _ = saved
  shard(folder)
  first, second = sorted(folder.glob("*.safetensors"))
  tensors = safetensors.numpy.load_file(second)
  name, tensor = next(iter(safetensors.numpy.load_file(first).items()))
  safetensors.numpy.save_file(tensors | {name: tensor}, second)
  with pytest.raises(ValueError, match=f"{second.name} has the weight {name}, and .*{first.name}"):
    hf.load(folder)


def test_large_models_are_saved_in_shards_that_others_read(saved, tmp_path):
  folder, model, params = saved
  again = hf.save(tmp_path / "again", model, params, shard_bytes=20_000)
  files = sorted(path.name for path in again.glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  whole = safetensors.numpy.load_file(folder / "model.safetensors")
  index = json.loads((again / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
  assert set(index["weight_map"]) == set(whole)
  for name, file in index["weight_map"].items():
    part = safetensors.numpy.load_file(again / file)
    np.testing.assert_array_equal(part[name], whole[name])
    assert sum(x.nbytes for x in part.values()) <= 20_000 or len(part) == 1
  assert_equal(hf.load(again)[1], params)
  sums = (again / "SHA256SUMS").read_text().splitlines()
  assert [line.split()[1] for line in sums] == files
  hf.save(again, model, params)  # one file again, and no index that lies
  assert not (again / "model.safetensors.index.json").exists()
  assert_equal(hf.load(again)[1], params)


def test_a_saved_tensor_has_the_bytes_of_the_source(saved, tmp_path):
  # A source of several types, as some are published: norms in float32, the rest in bfloat16.
  folder, model, _ = saved
  def mix(tensors):
    for name in tensors:
      if "norm" not in name:
        tensors[name] = tensors[name].astype(jnp.bfloat16)
  edit_weights(folder, mix)
  edit_config(folder, dtype="bfloat16")
  for dtype in ("float32", None):
    again = hf.save(tmp_path / "again", model, hf.load(folder, dtype=dtype)[1], source=folder,
                    dtype="source", shard_bytes=30_000)
    index = json.loads((again / "model.safetensors.index.json").read_text())["weight_map"]
    want = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in want.items():
      got = safetensors.numpy.load_file(again / index[name])[name]
      assert (got.dtype, got.tobytes()) == (tensor.dtype, tensor.tobytes()), name
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_host_holds_one_layer_at_a_time_and_reads_its_own_part(saved, monkeypatch):
  folder, model, params = saved
  read, sizes = shards.read, []
  def counted(stored, index=slice(None)):
    part = read(stored, index)
    sizes.append((stored.name, part.size))
    return part
  monkeypatch.setattr(shards, "read", counted)
  assert_equal(hf.load(folder, sharding.make_mesh((1, 2, 2)))[1], params)
  largest = 48 * 32  # the embedding; a layer's largest is 40 x 32
  assert max(size for _, size in sizes) <= largest
  # Each of four devices asks for its own quarter of a layer's matrix, and for no other.
  assert [size for name, size in sizes if name == "model.layers.1.mlp.up_proj.weight"] == [320] * 4


def test_licence_and_notices_are_copied(saved, tmp_path):
  folder, model, params = saved
  for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"):
    (folder / name).write_text(name)
  child = hf.save(tmp_path / "child", model, params, source=folder)
  for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"):
    assert (child / name).read_text() == name


def test_the_folder_has_its_name_only_when_it_is_complete(saved, monkeypatch):
  folder, model, params = saved
  exists, rename = [], type(folder).rename
  monkeypatch.setattr(type(folder), "rename",
                      lambda self, to: (rename(self, to), exists.append(folder.exists()))[0])
  other = jax.tree.map(lambda x: x + 1, params)
  hf.save(folder, model, other)
  assert_equal(hf.load(folder)[1], other)
  assert [p.name for p in folder.parent.iterdir()] == ["model"]
  assert exists == [False, True]


def test_the_returned_model_has_the_fields_of_the_argument(saved):
  folder, model, params = saved
  got, weights = hf.load(folder, run={"dtype": "bfloat16", "remat": "block"},
                         shapes=models.frozen_shapes)
  assert got.config == dataclasses.replace(model.config, dtype="bfloat16", remat="block")
  table = models.weights(model.config)
  for path, x in models.layout.flat(weights).items():
    is_scale = len(table[path].axes) - table[path].stacked == 1
    assert x.dtype == ("float32" if is_scale else "bfloat16")
  assert_equal(weights, jax.tree.map(lambda x, y: x.astype(y.dtype), params, weights))


def test_weights_in_a_folder_of_their_files_name_are_refused(saved):
  folder, _, _ = saved
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").mkdir()
  for function in (hf.load, hf.check, hf.identity):
    with pytest.raises(InputError, match="model.safetensors is a folder, not a safetensors file"):
      function(folder)


@pytest.mark.parametrize("data", [b"", b"\1\0", b"\xff" * 8, b"\2\0\0\0\0\0\0\0[]",
                                  b"\4\0\0\0\0\0\0\0null", b"<html>not found</html>",
                                  b"PK\3\4" * 9])
def test_weights_that_are_no_safetensors_are_refused(data, saved):
  folder, _, _ = saved
  (folder / "model.safetensors").write_bytes(data)
  (folder / "SHA256SUMS").unlink()
  for function in (hf.load, hf.check):
    with pytest.raises(InputError, match="model.safetensors is not whole .*download it again"):
      function(folder)


@pytest.mark.parametrize("text, sentence", [
    ("null", "is not a JSON object"), ("{}", "has no weight_map"),
    ('{"weight_map": 3}', "has no weight_map"),
    ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key 'a' twice"),
    ("[" * 5000, "is nested too deeply"), ("", "is empty")])
def test_an_index_that_is_no_index_is_refused(text, sentence, saved):
  folder, _, _ = saved
  (folder / "model.safetensors.index.json").write_text(text)
  for function in (hf.load, hf.identity):
    with pytest.raises(InputError, match=f"model.safetensors.index.json {sentence}"):
      function(folder)


def renamed(tensors, names):
  """Renames tensors in place: {old: new}."""
  for old, new in names.items():
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_tied_model_with_its_head_alone_is_loaded(family, tiny_json, randomized, tmp_path):
  model = models.get(tiny_json(family, tie_word_embeddings=True))
  params = randomized(model)
  folder = hf.save(tmp_path / "tied", model, params)
  edit_weights(folder, lambda tensors: renamed(
      tensors, {"model.embed_tokens.weight": "lm_head.weight"}))
  hf.check(folder)
  assert_equal(hf.load(folder)[1], params)
  # A model saved from it has the usual name, and the type of the source.
  child = hf.save(tmp_path / "child", model, params, source=folder, dtype="source")
  assert "model.embed_tokens.weight" in safetensors_header(child / "model.safetensors")


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached"])
def test_frequencies_of_old_checkpoints_are_passed_over(name, saved):
  folder, _, params = saved
  edit_weights(folder, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
  hf.check(folder)
  assert_equal(hf.load(folder)[1], params)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_prefix_are_loaded(family, tied, tiny_json, randomized, tmp_path):
  model = models.get(tiny_json(family, tie_word_embeddings=tied))
  params = randomized(model)
  folder = hf.save(tmp_path / "bare", model, params)
  edit_weights(folder, lambda tensors: renamed(
      tensors, {n: n.removeprefix("model.") for n in tensors if n.startswith("model.")}))
  hf.check(folder)
  assert_equal(hf.load(folder)[1], params)
  assert_equal(jax.device_get(hf.load(folder, sharding.make_mesh((1, 2, 4)))[1]), params)


def test_names_without_the_prefix_may_be_in_shards(saved):
  folder, _, params = saved
  edit_weights(folder, lambda tensors: renamed(
      tensors, {n: n.removeprefix("model.") for n in tensors if n.startswith("model.")}))
  shard(folder)
  assert_equal(hf.load(folder)[1], params)


def test_a_weight_under_both_names_is_refused(saved):
  folder, _, _ = saved
  edit_weights(folder, lambda tensors: tensors.update(
      {"norm.weight": tensors["model.norm.weight"].copy()}))
  with pytest.raises(InputError, match="the weight model.norm.weight twice, as .*norm.weight and"):
    hf.load(folder)


@pytest.mark.parametrize("name", ["norm.bias", "model.norm.bias", "transformer.norm.weight",
                                  "inv_freq", "layers.2.mlp.up_proj.weight"])
def test_a_name_that_no_model_has_is_refused(name, saved):
  folder, _, _ = saved
  edit_weights(folder, lambda tensors: tensors.update({name: np.ones(32, np.float32)}))
  with pytest.raises(InputError, match=f"has the weight {name} .1 in all. that a llama"):
    hf.load(folder)


def test_an_untied_model_needs_its_head(saved):
  folder, _, _ = saved
  edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(InputError, match="lacks the weight lm_head.weight"):
    hf.load(folder)


@pytest.mark.parametrize("value, dtype, sentence", [
    (1e6, "float16", "has numbers beyond float16: save it as bfloat16 or float32"),
    (-70000, "float16", "has numbers beyond float16"),
    (3.4e38, "bfloat16", "has numbers beyond bfloat16"),
    (np.nan, None, "has NaN or infinite numbers"), (np.inf, None, "has NaN or infinite numbers"),
    (-np.inf, "bfloat16", "has NaN or infinite numbers"),
    (np.nan, "float16", "has NaN or infinite numbers")])
@pytest.mark.parametrize("path", ["norm", "embed"])
def test_a_number_that_is_not_finite_on_disk_is_refused(path, value, dtype, sentence, saved):
  folder, model, params = saved
  bad = params | {path: params[path].at[-1].set(value)}
  with pytest.raises(InputError, match=rf"the weight model\.\w+\.?\w* {sentence}"):
    hf.save(folder, model, bad, dtype=dtype)
  # The folder that was there is as before, and nothing is beside it.
  assert_equal(hf.load(folder)[1], params)
  assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_the_largest_number_of_a_type_is_saved(saved, tmp_path):
  _, model, params = saved
  most = params | {"norm": params["norm"].at[0].set(65504)}
  got = hf.load(hf.save(tmp_path / "most", model, most, dtype="float16"))[1]
  assert got["norm"][0] == 65504


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "bool", "half precision",
                                   "complex64", "int32"])
def test_a_type_that_cannot_be_loaded_is_not_saved(dtype, saved, tmp_path):
  _, model, params = saved
  with pytest.raises(InputError, match=f"not saved as {dtype}, which hf.load does not read: give"):
    hf.save(tmp_path / "x", model, params, dtype=dtype)
  assert not list(tmp_path.glob("*x*"))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_, np.complex64])
def test_parameters_that_are_no_floats_are_not_saved(dtype, saved, tmp_path):
  _, model, params = saved
  cast = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
  for written in (None, "float32"):
    with pytest.raises(InputError, match="parameters of type .*: save floating-point ones"):
      hf.save(tmp_path / "x", model, cast, dtype=written)


@pytest.mark.parametrize("dtype", [np.float64, "float8_e5m2"])
def test_parameters_of_a_type_that_cannot_be_loaded_are_not_saved(dtype, saved, tmp_path):
  _, model, params = saved
  cast = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
  with pytest.raises(InputError, match="not saved as .*: give save a dtype of float32, float16, b"):
    hf.save(tmp_path / "x", model, cast)
  folder = hf.save(tmp_path / "x", model, cast, dtype="float32")
  assert_equal(hf.load(folder)[1], jax.tree.map(lambda x: x.astype(np.float32), cast))


def test_the_types_of_a_source_that_cannot_be_loaded_are_refused(saved, tmp_path):
  folder, model, params = saved
  edit_weights(folder, lambda tensors: tensors.update(
      {"model.norm.weight": tensors["model.norm.weight"].astype(np.float64)}))
  with pytest.raises(InputError, match="model.norm.weight is stored as F64"):
    hf.save(tmp_path / "x", model, params, source=folder, dtype="source")


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_stays_and_its_target_is_replaced(relative, saved):
  folder, model, params = saved
  link = folder.with_name("latest")
  link.symlink_to(folder.name if relative else folder)
  for add in (1, 2):
    other = jax.tree.map(lambda x, add=add: x + add, params)
    assert hf.save(link, model, other) == link
    assert link.is_symlink() and not folder.is_symlink()
    assert_equal(hf.load(link)[1], other)
    assert_equal(hf.load(folder)[1], other)
  assert sorted(p.name for p in folder.parent.iterdir()) == ["latest", "model"]


def test_a_link_may_point_to_a_new_folder(saved, tmp_path):
  _, model, params = saved
  (tmp_path / "latest").symlink_to(tmp_path / "disk" / "model")
  hf.save(tmp_path / "latest", model, params)
  assert (tmp_path / "latest").is_symlink()
  assert_equal(hf.load(tmp_path / "disk" / "model")[1], params)


def test_a_link_to_something_else_is_refused(saved, tmp_path):
  _, model, params = saved
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter.tex").write_text("")
  (tmp_path / "link").symlink_to(tmp_path / "thesis")
  with pytest.raises(InputError, match="thesis exists and holds no model.safetensors"):
    hf.save(tmp_path / "link", model, params)
  (tmp_path / "file").write_text("")
  (tmp_path / "other").symlink_to(tmp_path / "file")
  for name in ("file", "other"):
    with pytest.raises(InputError, match="file is a file: save to a new folder"):
      hf.save(tmp_path / name, model, params)


@pytest.mark.parametrize("lineage", [
    {"a": float("nan")}, {"a": [float("inf")]}, {"a": {1, 2}}, {"a": object()}, {"a": b"x"},
    {("a",): 1}, {"a": 1, 2: 3}, {"a": "\ud800"}, {"a": 10**400}, ["a"], "text", 3,
    {"a": np.float32(1)}, {1: 2, "1": 3}])
def test_a_lineage_that_is_no_json_is_refused_before_anything_is_written(lineage, saved, tmp_path):
  _, model, params = saved
  with pytest.raises(InputError, match="lineage is not a JSON object"):
    hf.save(tmp_path / "x", model, params, lineage=lineage)
  assert not list(tmp_path.glob("*x*"))


def test_a_lineage_within_itself_is_refused(saved, tmp_path):
  _, model, params = saved
  lineage = {}
  lineage["a"] = lineage
  with pytest.raises(InputError, match="lineage is not a JSON object"):
    hf.save(tmp_path / "x", model, params, lineage=lineage)


def test_named_templates_and_folders_of_licences_are_copied(saved, tmp_path):
  folder, model, params = saved
  for name in ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja",
               "LICENSES/Apache-2.0.txt"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(name)
  child = hf.save(tmp_path / "child", model, params, source=folder)
  name = "additional_chat_templates/tool_use.jinja"
  assert (child / name).read_text() == name
  assert (child / "additional_chat_templates" / "rag.jinja").exists()
  assert (child / "LICENSES" / "Apache-2.0.txt").exists()


@pytest.mark.parametrize("field, value", [
    ("rope_theta", 0.0), ("rope_theta", float("nan")), ("rope_theta", float("inf")),
    ("max_positions", 0), ("max_positions", 2.5), ("norm_eps", -1.0), ("norm_eps", float("nan")),
    ("norm_eps", float("inf")), ("norm_eps", np.float32(1e-6))])
def test_a_config_that_load_refuses_is_not_saved(saved, tmp_path, field, value):
  _, model, params = saved
  config = dataclasses.replace(model.config, **{field: value})
  wrong = dataclasses.replace(model, config=config)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(InputError, match=r"^the model cannot be saved \(.*\): correct "):
    hf.save(tmp_path / "x", wrong, params)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save_file", "_write_other_files"])
def test_an_error_while_saving_leaves_nothing_behind(saved, tmp_path, monkeypatch, error, step):
  _, model, params = saved
  def fail(*_):
    raise error
  owner = safetensors.numpy if step == "save_file" else saving
  monkeypatch.setattr(owner, step, fail)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(type(error)):
    hf.save(tmp_path / "x", model, params)
  assert sorted(tmp_path.rglob("*")) == before
