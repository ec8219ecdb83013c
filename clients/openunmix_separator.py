"""Open-Unmix: the separator of one source, with the sizes of the published model umxhq."""

import torch
from openunmix.model import OpenUnmix

import fastrnn
from common import compare

spectrogram = torch.rand(4, 2, 2049, 100)  # (batch, channels, frequencies, frames)


def build() -> OpenUnmix:
    return OpenUnmix(nb_bins=2049, nb_channels=2, hidden_size=512, nb_layers=3, max_bin=1487)


def train(model: OpenUnmix) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model.train()(spectrogram), spectrogram)


compare(
    "openunmix",
    "`OpenUnmix`, sizes of umxhq: LSTM, 3 layers, both directions; 4 × 100 frames",
    build,
    lambda: fastrnn.convert(build()),
    infer=lambda model: model.eval()(spectrogram),
    train=train,
)
