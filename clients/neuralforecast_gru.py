"""GRU of neuralforecast, trained on 20 noisy sine waves and asked for a forecast."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MAE
from neuralforecast.models import GRU

import fastrnn
from common import QUIET, compare

rng = np.random.default_rng(0)
waves = np.sin(np.arange(300) / 4 + rng.uniform(0, 6, (20, 1))) + rng.normal(0, 0.1, (20, 300))
data = pd.DataFrame({"ds": np.tile(np.arange(300), 20), "y": waves.ravel()})
data["unique_id"] = np.repeat(np.arange(20), 300)


def fitted(switch=lambda model: model) -> NeuralForecast:
    model = GRU(24, 72, loss=MAE(), max_steps=8, **QUIET)
    forecast = NeuralForecast([switch(model)], freq=1)
    forecast.fit(data)
    return forecast


compare(
    "neuralforecast",
    "`GRU` of 2 layers, 20 series: `predict`; 8 steps of `fit`",
    fitted,
    lambda: fitted(fastrnn.convert),
    module=lambda forecast: forecast.models[0],
    infer=lambda forecast: forecast.predict(data)["GRU"].to_numpy(),
    train=lambda forecast: forecast.fit(data),
)
