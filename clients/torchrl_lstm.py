"""LSTMModule of torchrl on trajectories with resets, as it is and with `reset=`."""

import torch
from tensordict import TensorDict
from torchrl.modules import LSTMModule, set_recurrent_mode

import fastrnn
from common import compare

batch = TensorDict({"seen": torch.randn(32, 128, 8)}, [32, 128])
batch["is_init"] = torch.rand(32, 128, 1) < 0.03


class WithReset(LSTMModule):
    def _lstm_scan_with_resets(self, input, hidden0_in, hidden1_in, hidden, is_init):
        y, _, (h, c) = self.lstm(input, hidden, reset=is_init, return_states=True)
        ends = torch.cat([is_init[:, 1:], torch.ones_like(is_init[:, :1])], 1)[..., None, None]
        return y, h.permute(2, 1, 0, 3) * ends, c.permute(2, 1, 0, 3) * ends


def build(cls=LSTMModule, backend="auto"):
    return cls(8, 128, in_key="seen", out_key="y", recurrent_backend=backend)


@set_recurrent_mode()
def run(model):
    return model(batch.clone()).select("y", "next").flatten_keys().to_dict()


for options, more in ((), 0), ((WithReset, "scan"), 5):
    compare(
        "torchrl",
        "`LSTMModule` in recurrent mode, 32 rows of 128 steps with resets",
        build,
        lambda options=options: fastrnn.patch_torch() and build(*options),
        switch=("`fastrnn.patch_torch()`" + (" and `reset=`" if more else ""), 1 + more),
        infer=run,
        train=lambda model: sum(x.square().mean() for x in run(model).values()),
    )
