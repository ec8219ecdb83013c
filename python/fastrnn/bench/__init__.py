"""The benchmark: every case runs fastrnn and each peer in turn, interleaved, in one process.

- ``suites.json`` the cases of each suite; ``cases.py`` the definition and arithmetic of a case
- ``data.py`` the arrays of a case, the same for every provider
- ``providers.py``, ``onnx_provider.py``, ``flashrnn_provider.py`` the libraries that compute a case
- ``inference_providers.py`` fastrnn frozen and as a stream; torch.compile of torch's layer
- ``prepare.py`` what a provider returns, and its errors
- ``cells.py`` cells written in torch; ``step_providers.py`` the providers for them
- ``timing.py`` clocks, interleaving, percentiles; ``roof.py`` the limits of the machine
- ``runner.py`` runs cases: prepare, compare with fastrnn, measure
- ``records.py`` the JSON document; ``report.py``, ``compare.py``, ``plot.py`` its presentation

`fastrnn bench --help` shows the command; `runner.run` runs the benchmark from Python.
"""
