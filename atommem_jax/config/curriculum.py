"""A curriculum as the config spells it: what is learned from which step on."""

import itertools
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from atommem_jax.config.errors import ConfigError, check

_ENTRY = re.compile(r"\s*(\d{1,9})\s*:(.*)", re.DOTALL)
_FORM = "allowed are texts 'STEP: FIELD=VALUE ...', such as ('0: task.facts_per_chunk=1', '300:')"


class Entry(NamedTuple):
    """What holds from a step on."""

    step: int
    settings: tuple[str, ...]  # as of `--set`; none is the config itself


def read(texts: Sequence[str], steps: int, field: str) -> list[Entry]:
    """The entries of a curriculum, the first of them at step 0.

    Args:
      texts: as they stand in the config.
      steps: of the stage; 0 where it is not trained.
      field: what errors call it.

    Raises ConfigError for a text of another form, and for steps out of order or past the end.
    """
    entries = []
    for text in texts:
        matched = _ENTRY.fullmatch(text)
        if matched is None:
            raise ConfigError(f"{field} has {text!r}: {_FORM}")
        entries.append(Entry(int(matched[1]), _split(matched[2], text, field)))
    starts = [entry.step for entry in entries]
    check(
        all(a < b for a, b in itertools.pairwise(starts)),
        f"{field} begins at steps {starts}: each must come after the one before it",
    )
    check(
        not starts or not steps or starts[-1] < steps,
        f"{field} has an entry that begins at step {max(starts, default=0)} of {steps}: it would "
        "never be learned; let it begin earlier, or raise the number of steps",
    )
    return entries if starts[:1] == [0] else [Entry(0, ()), *entries]


def _split(text: str, whole: str, field: str) -> tuple[str, ...]:
    try:
        settings = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{field} has {whole!r} ({error}): {_FORM}") from error
    check(all("=" in setting for setting in settings), f"{field} has {whole!r}: {_FORM}")
    return settings
