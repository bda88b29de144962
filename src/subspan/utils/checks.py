"""Checks for numbers that fp32 can compute with: a setting that it would round to zero or to infinity is refused."""

from typing import TypeGuard

SMALLEST = 1e-30
"""Smallest divisor. fp32 ends at 1e-38, and a correction of bias takes up to eight digits."""
LARGEST = 10**18
"""Largest factor or divisor. fp32 ends at 1e38, and torch takes no whole number beyond 2^63."""
DIVISORS = f"from {SMALLEST:g} to {LARGEST:g}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` can be compared with numbers. A setting of another kind gets the error of one out of range."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_factor(value: object) -> TypeGuard[float]:
    """Whether fp32 can multiply by ``value``: a number from 0 to ``LARGEST``."""
    return is_number(value) and 0 <= value <= LARGEST


def is_divisor(value: object) -> TypeGuard[float]:
    """Whether fp32 can divide by ``value``: a number from ``SMALLEST`` to ``LARGEST``."""
    return is_number(value) and SMALLEST <= value <= LARGEST
