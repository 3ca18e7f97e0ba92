"""What a field of a section may hold, and the section that checks it.

It stands in the field's annotation: `Positive`, `Share`, `Choices("adamw", "muon")`. Numbers are
finite. `Section.validate` checks the fields one by one, and then those that must agree.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from atommem_jax.config.errors import check

_LARGEST_INTEGER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be; its ends are allowed but for `above`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in it."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.least is not None:
            if self.most is not None:
                return f"{self.least} to {self.most}"
            return "0 or more" if self.least == 0 else f"at least {self.least}"
        if self.above is not None:
            return f"above {self.above}" + (f" up to {self.most}" if self.most is not None else "")
        return f"at most {self.most}" if self.most is not None else "a finite number"


class Choices(tuple[str, ...]):
    """The names that a field may hold."""

    def __new__(cls, *names: str) -> "Choices":
        """Choices("a", "b")."""
        return super().__new__(cls, names)

    def __str__(self) -> str:
        return ", ".join(map(repr, self))


class AnyPath:
    """Marks a field that is a path: `parse` spells it out, see `paths.expand`."""


Path = Annotated[str, AnyPath()]


Positive = Annotated[int, Range(least=1)]


Count = Annotated[int, Range(least=0)]


Share = Annotated[float, Range(least=0.0, most=1.0)]


AboveZero = Annotated[float, Range(above=0.0)]


NotNegative = Annotated[float, Range(least=0.0)]


@functools.cache
def read_hints(kind: Any) -> Mapping[str, Any]:
    """Field -> annotation, with what it says of the values allowed."""
    return typing.get_type_hints(kind, include_extras=True)


@dataclasses.dataclass(frozen=True)
class Section:
    """What all sections share."""

    def validate(self, prefix: str) -> None:
        """Raises ConfigError, naming the field, the value found and the values allowed.

        prefix: path of the section, as `rl.ppo`.
        """
        kind: Any = type(self)
        hints = read_hints(kind)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            path = f"{prefix}.{field.name}" if prefix else field.name
            if isinstance(value, Section):
                value.validate(path)
            else:
                check_value(path, value, hints[field.name])
        self._check_together(prefix)

    def _check_together(self, prefix: str) -> None:
        """Raises ConfigError where fields of this section disagree."""


def check_value(path: str, value: Any, hint: Any) -> None:
    """Raises ConfigError for a value that its annotation does not allow."""
    limits = getattr(hint, "__metadata__", (Range(),))[0]
    if isinstance(limits, Choices):
        check(value in limits, f"{path}={value!r}: allowed are {limits}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    check(math.isfinite(value), f"{path}={value}: allowed are finite numbers; set --config.{path}")
    check(
        isinstance(value, float) or abs(value) <= _LARGEST_INTEGER,
        f"{path}={value}: allowed is {limits}, up to {_LARGEST_INTEGER}; set --config.{path}",
    )
    check(limits.holds(value), f"{path}={value}: allowed is {limits}; set --config.{path}")
