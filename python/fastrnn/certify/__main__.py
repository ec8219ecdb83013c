"""The child process that `fastrnn certify` starts: ``python -m fastrnn.certify cuda:0``."""

from __future__ import annotations

import sys

from fastrnn.certify.child import serve
from fastrnn.certify.device import Cuda

if __name__ == "__main__":
    serve(lambda: Cuda(sys.argv[1]))
