"""One line for an option that cannot be."""

from typing import get_args


def at_least(name: str, value: float | int, least: float | int) -> None:
    """Raises ValueError for a number that is too small."""
    if not value >= least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


def one_of(name: str, value: str, choices: object) -> None:
    """Raises ValueError for a name that is none of `choices`, a Literal."""
    if value not in get_args(choices):
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}"
        )


def share(name: str, value: float | int) -> None:
    """Raises ValueError for what is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, expected 0 to below 1")
