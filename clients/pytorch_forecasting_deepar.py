"""DeepAR of pytorch-forecasting, trained on 60 noisy sine waves and asked for a forecast."""

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer
from pytorch_forecasting import DeepAR, TimeSeriesDataSet
from pytorch_forecasting.data import NaNLabelEncoder

import fastrnn
from common import QUIET, compare

rng = np.random.default_rng(0)
waves = np.sin(np.arange(120) / 8 + rng.uniform(0, 6, (60, 1))) + rng.normal(0, 0.1, (60, 120))
frame = pd.DataFrame({"value": waves.ravel(), "time": np.tile(np.arange(120), 60)})
frame["wave"] = np.repeat(np.arange(60), 120).astype(str)
own = {"categorical_encoders": {"wave": NaNLabelEncoder()}, "time_varying_unknown_reals": ["value"]}
sizes = {"max_encoder_length": 48, "max_prediction_length": 12}
data = TimeSeriesDataSet(frame, "time", "value", ["wave"], **sizes, **own)
batches = data.to_dataloader(train=False, batch_size=64)


def build() -> DeepAR:
    return DeepAR.from_dataset(data, hidden_size=64, rnn_layers=2, dropout=0.1)


compare(
    "pytorch-forecasting",
    "`DeepAR`, LSTM of 2 layers, batch 64: a forecast; 8 steps of `Trainer.fit`",
    build,
    lambda: fastrnn.convert(build()),
    infer=lambda model: model.eval()(next(iter(batches))[0], n_samples=20)["prediction"],
    train=lambda model: Trainer(max_steps=8, **QUIET).fit(model.train(), batches),
)
