"""Programs: a step written in torch, run by the engine. README.md says which file does what."""

from .explanation import Explanation, explain, explained
from .run import routed, warn
from .stand_ins import Traced
from .start import start, whole

__all__ = ["Explanation", "Traced", "explain", "explained", "routed", "start", "warn", "whole"]
