"""Qwen3-1.7B at the setting of the paper; see `presets`."""

from ml_collections import ConfigDict

from experiments.configs import published


def get_config() -> ConfigDict:
    """Sizes for `compile_report.py`."""
    return published.get_config("qwen3_1.7b")
