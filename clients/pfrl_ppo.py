"""PPO of pfrl with a recurrent policy, on recorded observations of 8 environments."""

import numpy as np
import pfrl
import torch
from pfrl.policies import SoftmaxCategoricalHead
from torch import nn

import fastrnn
from common import compare

rng = np.random.default_rng(0)
seen, rewards = rng.normal(size=(129, 8, 8)).astype(np.float32), rng.normal(size=(128, 8))
ends, never = rng.random((128, 8)) < 0.03, np.zeros(8, bool)


def build() -> pfrl.agents.PPO:
    policy = nn.Sequential(nn.Linear(64, 4), SoftmaxCategoricalHead())
    heads = pfrl.nn.Branched(policy, nn.Linear(64, 1))
    model = pfrl.nn.RecurrentSequential(nn.Linear(8, 64), nn.Tanh(), nn.LSTM(64, 64), heads)
    options = {"recurrent": True, "update_interval": 1024, "minibatch_size": 256, "epochs": 4}
    return pfrl.agents.PPO(model, torch.optim.Adam(model.parameters(), 3e-4), **options)


def train(agent: pfrl.agents.PPO) -> None:
    for step in range(128):
        agent.batch_act(list(seen[step]))
        agent.batch_observe(list(seen[step + 1]), list(rewards[step]), list(ends[step]), never)


compare(
    "pfrl",
    "`PPO`, a recurrent policy, 8 environments: 128 steps and one update",
    build,
    lambda: fastrnn.patch_torch() and build(),
    switch=("`fastrnn.patch_torch()`", 1),
    module=lambda agent: agent.model,
    train=train,
)
