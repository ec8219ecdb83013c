"""DeepAR of GluonTS, trained on 40 noisy sine waves and asked for a forecast."""

import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from lightning.pytorch import Trainer

import fastrnn
from common import QUIET, compare

rng = np.random.default_rng(0)
waves = np.sin(np.arange(200) / 4 + rng.uniform(0, 6, (40, 1))) + rng.normal(0, 0.1, (40, 200))
start = pd.Period("2024-01-01", "h")
data = ListDataset([{"start": start, "target": wave} for wave in waves], freq="h")
estimator = DeepAREstimator("h", prediction_length=24, context_length=72, hidden_size=64)
transformed = estimator.create_transformation().apply(data, is_train=True)


def train(model):
    batches = estimator.create_training_data_loader(transformed, model)
    Trainer(max_steps=8, **QUIET).fit(model.train(), batches)


def predict(model):
    predictor = estimator.create_predictor(estimator.create_transformation(), model.eval())
    return [forecast.samples for forecast in predictor.predict(data)]


compare(
    "gluonts",
    "`DeepAREstimator`, LSTM of 2 layers: `predict` 40 series; 8 steps of `Trainer.fit`",
    estimator.create_lightning_module,
    lambda: fastrnn.convert(estimator.create_lightning_module()),
    infer=predict,
    train=train,
)
