"""Encodec of transformers: the codec for audio with the sizes of facebook/encodec_24khz."""

import torch
from transformers import EncodecConfig, EncodecModel

import fastrnn
from common import compare

audio = torch.randn(1, 1, 24_000)  # a second


def build() -> EncodecModel:
    return EncodecModel(EncodecConfig())


compare(
    "transformers",
    "`EncodecModel`, sizes of encodec_24khz: LSTM, 2 layers, twice; 1 s of audio",
    build,
    lambda: fastrnn.convert(build()),
    infer=lambda model: model.eval().decoder(model.encoder(audio)),
    train=lambda model: model.train().decoder(model.encoder(audio)).square().mean(),
)
