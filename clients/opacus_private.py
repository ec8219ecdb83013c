"""Private training (DP-SGD) with Opacus, whose own DPLSTM stands in for torch's LSTM."""

import torch
from opacus import PrivacyEngine
from opacus.layers import DPLSTM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from common import compare

data = TensorDataset(torch.randn(64, 50, 16), torch.randint(0, 4, (64,)))
OPTIONS = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "poisson_sampling": False}


def build(layer):
    model = nn.Sequential(layer(16, 64, batch_first=True))
    sgd, batches = torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=64)
    return PrivacyEngine().make_private(module=model, optimizer=sgd, data_loader=batches, **OPTIONS)


def train(private) -> None:
    model, sgd, _ = private
    sgd.zero_grad()
    nn.functional.cross_entropy(model(data.tensors[0])[0][:, -1, :4], data.tensors[1]).backward()
    sgd.step()


compare(
    "opacus",
    "`PrivacyEngine`, LSTM, batch 64: a step of gradients clipped for each sample",
    lambda: build(DPLSTM),
    lambda: build(fastrnn.LSTM),
    switch=("`fastrnn.LSTM` in place of `DPLSTM`", 1),
    module=lambda private: private[0]._module[0],
    own_layers=True,
    infer=lambda private: private[0](data.tensors[0]),
    train=train,
)
