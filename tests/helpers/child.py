"""Runs a script as a user does, but with one compilation cache for all processes and topologies.

    python tests/helpers/child.py experiments/train.py --workdir=...

On a CPU JAX makes the number of the process and of its devices part of a cache key, and process 0
alone writes: the others would compile everything at every start. What is compiled is the same; on
GPUs JAX leaves these numbers out of the key itself.
"""

import pathlib
import runpy
import sys

from jax._src import cache_key

_hash_options = cache_key._hash_serialized_compile_options


def _hash_options_without_devices(hash_obj, options, strip_device_assignment=False):
    del strip_device_assignment
    _hash_options(hash_obj, options, strip_device_assignment=True)


if __name__ == "__main__":
    cache_key._hash_accelerator_config = cache_key._hash_devices
    cache_key._hash_serialized_compile_options = _hash_options_without_devices
    sys.argv = sys.argv[1:]
    sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
