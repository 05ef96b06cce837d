"""Conversion of nested values with arrays and non-finite numbers to what strict JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """The same value for JSON: arrays, tuples and sets as lists, numbers that are not finite as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_value(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return json_value(value.tolist()) if hasattr(value, "tolist") else str(value)
