"""RNNModel of darts, trained on the sum of two sine waves and asked for a forecast."""

import numpy as np
from darts import TimeSeries
from darts.models import RNNModel

import fastrnn
from common import QUIET, compare

steps = np.arange(400)
wave = TimeSeries.from_values((np.sin(steps / 8) + np.sin(steps / 3)).astype(np.float32))
sizes = {"input_chunk_length": 48, "training_length": 72, "hidden_dim": 64, "n_rnn_layers": 2}
options = {"batch_size": 64, "n_epochs": 2, "random_state": 0, "pl_trainer_kwargs": QUIET}


def build() -> RNNModel:
    return RNNModel(model="LSTM", **sizes, **options).fit(wave)  # which makes the layers


compare(
    "darts",
    "`RNNModel`, LSTM of 2 layers: `predict` 48 steps; 2 epochs of `fit`",
    build,
    lambda: fastrnn.patch_torch() and build(),
    switch=("`fastrnn.patch_torch()`", 1),
    module=lambda model: model.model,
    infer=lambda model: model.predict(48).values(),
    train=lambda model: model.fit(wave) and None,
)
