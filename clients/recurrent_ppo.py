"""RecurrentPPO of sb3-contrib, as it is and with `reset=` in place of its loop over the steps."""

import numpy as np
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent.policies import MlpLstmPolicy
from stable_baselines3.common.env_util import make_vec_env

import fastrnn
from common import compare

seen, state = np.zeros((8, 4), np.float32), (np.zeros((1, 8, 256), np.float32),) * 2


class WithReset(MlpLstmPolicy):
    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        steps = features.unflatten(0, (lstm_states[0].shape[1], -1)).swapaxes(0, 1)
        reset = episode_starts.view(steps.shape[1], -1).T.bool()
        output, lstm_states = lstm(steps, lstm_states, reset=reset)
        return output.swapaxes(0, 1).flatten(0, 1), lstm_states


def build(policy=MlpLstmPolicy, switch=lambda policy: policy):
    carts = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    model = RecurrentPPO(policy, carts, n_steps=128, batch_size=256, n_epochs=4, seed=0)
    return switch(model.policy) and model


for policy, more in ((MlpLstmPolicy, 0), (WithReset, 5)):
    compare(
        "sb3-contrib",
        "`RecurrentPPO`, 8 cart-poles: `predict`; `learn` for one update of 128 steps",
        build,
        lambda policy=policy: build(policy, fastrnn.convert),
        switch=("`fastrnn.convert(model.policy)`" + (" and `reset=`" if more else ""), 1 + more),
        module=lambda model: model.policy,
        infer=lambda model: model.predict(seen, state, deterministic=True)[1],
        train=lambda model: model.learn(1024) and None,
    )
