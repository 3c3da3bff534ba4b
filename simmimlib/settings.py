"""Settings that check and explain themselves: a wrong value stops at once with its name, its value and what is allowed.

Each setting is explained once, beside its field: ``epochs: int = setting(12, "passes over the training images")``.
``help()`` of the class lists these texts, and the notebooks' parameters cells come from them (``notebook.py``).
"""

import copy
import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import field
from typing import Any, ClassVar, Self


def setting(default: Any, about: str = "") -> Any:
    """A field of a settings dataclass with its explanation; without one, that of the class it overrides holds."""
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"about": about})
    return field(default=default, metadata={"about": about})


class Settings:
    """Base of the settings dataclasses: types are checked against the annotations, then ``check`` looks at values."""

    about: ClassVar[dict[str, str]] = {}  # name -> explanation

    def __init_subclass__(cls) -> None:
        fields = {
            name: cls.__dict__[name]
            for name in cls.__dict__.get("__annotations__", {})  # noqa: RUF063
            if name in cls.__dict__
        }
        texts = {name: f.metadata.get("about", "") for name, f in fields.items() if isinstance(f, dataclasses.Field)}
        inherited = {
            name: text for base in reversed(cls.__mro__[1:]) for name, text in vars(base).get("about", {}).items()
        }
        cls.about = inherited | {name: text for name, text in texts.items() if text}
        lines = "\n".join(f"    {name}: {text}" for name, text in cls.about.items())
        cls.__doc__ = f"{cls.__doc__}\n\nSettings:\n{lines}"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # noqa: F402
            setattr(
                self,
                field.name,
                _as_type(field.name, getattr(self, field.name), field.type),  # type: ignore[arg-type]
            )
        self.check()

    def check(self) -> None:
        """Raises ValueError on a value that is not allowed."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Like ``cls(**values)``, with unknown names refused by name."""
        for name in values:
            if name not in cls.names():
                near = difflib.get_close_matches(name, cls.names(), n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown parameter {name!r}: {hint}Allowed: {', '.join(cls.names())}")
        return cls(**values)


def require(condition: object, name: str, value: object, allowed: str) -> None:
    """Raises ValueError with the name, the value and what is allowed, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")


def _as_type(name: str, value: object, wanted: type) -> object:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        hint = " (write 1.0e-4, not 1e-4, in a YAML file)" if wanted is float and isinstance(value, str) else ""
        raise ValueError(f"{name} = {value!r} ({type(value).__name__}): must be of type {wanted.__name__}{hint}")
    return value
