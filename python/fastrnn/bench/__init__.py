"""Measuring: every case runs ours and each peer in turn, in one process, interleaved.

- ``suites.json`` the cases, by suite; ``cases.py`` what a case is and what it costs
- ``data.py`` the arrays of a case, equal for every provider
- ``providers.py``, ``onnx_provider.py``, ``flashrnn_provider.py`` who computes a case
- ``cells.py`` cells written in torch; ``step_providers.py`` who computes them
- ``timing.py`` clocks, interleaving, percentiles; ``roof.py`` what the machine can do at most
- ``runner.py`` runs cases: prepare, check against ours, measure
- ``records.py`` the JSON document; ``report.py``, ``compare.py``, ``plot.py`` what is shown of it

`fastrnn bench --help` is the way in; `runner.run` is the same from Python.
"""
