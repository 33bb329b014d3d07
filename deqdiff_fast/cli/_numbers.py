"""Argument types: what argparse refuses, it refuses with a sentence."""

from __future__ import annotations

import argparse

MAX_SEED, MAX_FLOAT = 10**12, 1e100


def positive_int(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def class_label(text: str) -> int:
    """A whole number >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A number > 0 whose square is one."""
    value = _number(text)
    if not 0 < value < MAX_FLOAT:
        raise argparse.ArgumentTypeError(f"expected a number > 0 and below {MAX_FLOAT:g}, got {text!r}")
    return value


def factor(text: str) -> float:
    """A number >= 0."""
    value = _number(text)
    if not 0 <= value < MAX_FLOAT:
        raise argparse.ArgumentTypeError(f"expected a number >= 0 and below {MAX_FLOAT:g}, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number from which the 64-bit seeds of millions of images follow."""
    try:
        value = int(text)
    except ValueError:
        value = MAX_SEED + 1
    if abs(value) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from -{MAX_SEED} to {MAX_SEED}, got {text!r}")
    return value


def window(text: str) -> int | str:
    """A whole number >= 1, or 'auto'."""
    return text if text == "auto" else positive_int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
