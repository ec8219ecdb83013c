"""A classifier of skorch that reads the digits of scikit-learn row by row."""

import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

import fastrnn
from common import compare

images, labels = load_digits(return_X_y=True)
rows = images.reshape(-1, 8, 8).astype("float32") / 16


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 128, 2, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def build(switch=lambda module: module) -> NeuralNetClassifier:
    net = NeuralNetClassifier(Reader, criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0)
    switch(net.initialize().module_)
    return net


compare(
    "skorch",
    "`NeuralNetClassifier`, LSTM of 2 layers, 1,797 digits: `predict_proba`; an epoch",
    build,
    lambda: build(fastrnn.convert),
    switch=("`fastrnn.convert(net.module_)`", 1),
    module=lambda net: net.module_,
    infer=lambda net: net.predict_proba(rows),
    train=lambda net: net.partial_fit(rows, labels).history[-1, "train_loss"],
)
