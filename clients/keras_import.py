"""The weights of a layer of Keras in fastrnn's, beside Keras itself on its backend for torch."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch

import fastrnn
from common import compare

x = torch.randn(32, 50, 16, requires_grad=True)  # (batch, steps, features)


def build() -> keras.layers.Layer:
    lstm = keras.layers.LSTM(64, return_sequences=True, return_state=True)
    lstm.build((None, None, 16))
    return lstm


def train(model) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x)[0].square().sum(), x))


compare(
    "keras",
    "`keras.layers.LSTM` on the torch backend, 32 rows of 50 steps",
    build,
    lambda: fastrnn.from_keras(build().get_weights(), "LSTM"),
    switch=('`fastrnn.from_keras(layer.get_weights(), "LSTM")`', 1),
    own_layers=True,
    state_dict=False,
    infer=lambda model: model(x)[0],
    train=train,
)
