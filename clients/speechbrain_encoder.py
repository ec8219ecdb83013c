"""An encoder of speechbrain for utterances of different lengths, which it packs."""

import torch
from speechbrain.nnet.RNN import LSTM

import fastrnn
from common import compare

features = torch.randn(8, 200, 80)  # (batch, frames, mel bands)
lengths = torch.linspace(1.0, 0.4, 8)  # relative to the longest, as speechbrain's batches have them


def build() -> LSTM:
    return LSTM(hidden_size=256, input_size=80, num_layers=2, bidirectional=True)


def run(model: LSTM) -> torch.Tensor:
    return model(features, lengths=lengths)[0]


compare(
    "speechbrain",
    "`nnet.RNN.LSTM` on a packed batch: 2 layers, both directions, 8 × 80 to 200 frames",
    build,
    lambda: fastrnn.convert(build()),
    infer=run,
    train=lambda model: run(model).square().mean(),
)
