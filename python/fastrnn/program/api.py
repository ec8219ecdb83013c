"""What `scan`, `Recurrent` and `explain` use: a step written in torch, run as a program."""

from .explanation import Explanation, explained
from .run import routed, warn
from .stand_ins import Traced
from .start import start, whole

__all__ = ["Explanation", "Traced", "explained", "routed", "start", "warn", "whole"]
