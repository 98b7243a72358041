"""The frozen worlds: their weights, and the text from which their script trains them."""

import hashlib
import json

import pytest

from s2d_jax import chat
from s2d_jax.assets import train_base
from s2d_jax.assets.worlds import WORLDS

# SHA-256 of the weights, of which every published score is.
WEIGHTS = {
    "arithmetic/teacher": "ca621752ec8717adbc06eed0ac6f87ed6d3a968d95c6b7bd67af5cba05837487",
    "arithmetic/student": "71aa697c5012486a0bdddaa5c59f3bc727f2ee715ff4d66b8f68b58d9fb31bad",
    "composition/teacher": "9663c873ddc552e991b35b350ab2f108bfd78c80ea6b6ae1f5d2ca97fc9323be",
    "composition/student": "5c796fe73f5228457c3110c70fbc841b168469d483978658843bf1f4d4a36e96",
}
# SHA-256 of the first tokens of each part of the text: of other text come other weights.
TEXTS = {
    "arithmetic/teacher": "0f7d526167ab34e5422019804cdfb7115a62c60a0e1033dd6841c5e0a441dba7",
    "arithmetic/student": "c4923c0e7e273a74ce3a8735112d046c9225042b7e549ca9dcacfe49b641e015",
    "composition/teacher": "2c0f61762c5bda8ef02b373478dea9cacd48695bdedc4546ee6323e6fa179c34",
    "composition/student": "15ecd39d3fc2675854cde139f4e8c863df3db3d5203f13d0fcb2b4079bdd3d63",
}


def test_every_base_is_frozen():
  assert set(WEIGHTS) == set(TEXTS) == {f"{world}/{role}" for world in WORLDS
                                        for role in ("teacher", "student")}


@pytest.mark.parametrize("folder", sorted(WEIGHTS))
def test_the_weights_are_frozen(folder):
  file = train_base.FOLDER / folder / "model.safetensors"
  assert hashlib.sha256(file.read_bytes()).hexdigest() == WEIGHTS[folder]


@pytest.mark.parametrize("folder", sorted(TEXTS))
def test_the_text_is_frozen(folder):
  world, role = folder.split("/")
  base = train_base.BASES[world][role]._replace(single_steps=500, problems=500)
  tokenizer = chat.Chat(train_base.FOLDER / "arithmetic" / "student")
  documents = list(train_base.documents(WORLDS[world], base, tokenizer, 0))
  assert hashlib.sha256(json.dumps(documents).encode()).hexdigest() == TEXTS[folder]
