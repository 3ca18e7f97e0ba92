"""Parameters in two tiers."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], several: bool = False) -> list:
    """Parameters of which `make test` tries the first, and `make test-all` every one.

    Args:
      values: of the parameter.
      several: whether a value is a tuple of what several parameters are.
    """
    return [
        pytest.param(*(value if several else (value,)), marks=pytest.mark.long if number else ())
        for number, value in enumerate(values)
    ]
