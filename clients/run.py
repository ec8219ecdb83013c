"""Run real packages with torch's recurrent layers and with fastrnn's, and write the table of results.

    python clients/run.py                      every package (make clients)
    python clients/run.py darts_rnn encodec    some scripts; prints, and leaves the page as it is

Each requirements-GROUP.txt is a group of packages that can be installed together, with the scripts
that it names. A group has a virtual environment, build/clients-GROUP, which is made once and kept.
Each script runs in a process of its own. Exit code 1 if a script fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
PAGE = ROOT / "docs" / "tried-with.md"
TORCH = "2.13.0"
TIMEOUT = 900  # seconds of one script
HELPERS = ("common", "run")

# What was tried and cannot be in the table, with the reason.
LEFT_OUT: dict[str, str] = {}
