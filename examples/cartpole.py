"""A recurrent policy learns to balance a pole without observing its velocities (PPO).

The policy observes only position and angle of 32 cart-poles (Barto, Sutton and Anderson 1983), so
it needs memory. Episodes end in the middle of sequences; `reset=` resets the state there, so an
update processes all steps in one call. The first update is also computed with a loop over the
steps, for comparison.

    python examples/cartpole.py

Exit code 1 if the two computations differ, or the poles still fall early.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fastrnn
from common import arguments, curve, save, verdict

SEED, CARTS, STEPS, UNITS, LONGEST, LOWEST_RETURN = 0, 32, 128, 48, 200, 120.0
NAMES = ("seen", "reset", "action", "chance", "value", "over", "ages")  # of the collected data
DISCOUNT, SMOOTHING, CLIP, EPOCHS = 0.98, 0.95, 0.2, 10  # the reward of a step: 1 − DISCOUNT


class CartPoles:
    """Many cart-poles; each is reset when its pole falls or after LONGEST steps."""

    def __init__(self) -> None:
        self.state, self.age = torch.rand(CARTS, 4) * 0.1 - 0.05, torch.zeros(CARTS)

    def seen(self) -> Tensor:
        return self.state[:, ::2] * torch.tensor([0.5, 5.0])  # position and angle, no velocities

    def step(self, action: Tensor) -> Tensor:
        """Push left (0) or right (1); return which episodes are over."""
        _, dx, angle, turn = self.state.T
        push = (20.0 * action - 10.0 + 0.05 * turn**2 * angle.sin()) / 1.1
        ddangle = 9.8 * angle.sin() - angle.cos() * push
        ddangle = ddangle / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        ddx = push - 0.05 * ddangle * angle.cos() / 1.1
        self.state = self.state + 0.02 * torch.stack([dx, ddx, turn, ddangle], 1)
        self.age += 1
        over = (self.seen().abs() > torch.tensor([1.2, 1.05])).any(1) | (self.age >= LONGEST)
        self.state = torch.where(over[:, None], torch.rand(CARTS, 4) * 0.1 - 0.05, self.state)
        self.age *= ~over
        return over


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = fastrnn.LSTM(2, UNITS), nn.Linear(UNITS, 3)

    def forward(self, seen: Tensor, hx: tuple, reset: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Logits (T, B, 2), values (T, B, 1) and the state; reset (T, B) starts episodes."""
        output, hx = self.layer(seen, hx, reset=reset)
        return *self.head(output).split_with_sizes((2, 1), -1), hx

    def step_by_step(self, seen: Tensor, hx: tuple, reset: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """The same without `reset=`: a loop over the steps."""
        outputs = []
        for x, starts in zip(seen, reset, strict=True):
            output, hx = self.layer(x[None], tuple(s * ~starts[:, None] for s in hx))
            outputs.append(output)
        return *self.head(torch.cat(outputs)).split_with_sizes((2, 1), -1), hx


@torch.no_grad()
def collect(policy: Policy, carts: CartPoles, hx: tuple, starts: Tensor) -> dict:
    """STEPS steps of every cart, and the advantage of each action (Schulman et al. 2016)."""
    rows, before = [], hx
    for _ in range(STEPS):
        seen, ages = carts.seen(), carts.age + 1
        logits, value, hx = policy(seen[None], hx, starts[None])
        choice = Categorical(logits=logits[0])
        action = choice.sample()
        over = carts.step(action)
        rows.append((seen, starts, action, choice.log_prob(action), value[0, :, 0], over, ages))
        starts = over
    data = dict(zip(NAMES, map(torch.stack, zip(*rows, strict=True)), strict=True))
    _, last, _ = policy(carts.seen()[None], hx, starts[None])
    values, advantage, gains = torch.cat([data["value"], last[..., 0]]), torch.zeros(CARTS), []
    for t in reversed(range(STEPS)):
        goes_on = DISCOUNT * (~data["over"][t]).float()
        advantage = 1 - DISCOUNT + goes_on * (values[t + 1] + SMOOTHING * advantage) - values[t]
        gains.append(advantage)
    gain = torch.stack(gains[::-1])
    return data | {"gain": gain, "target": gain + values[:-1], "hx": before, "after": (hx, starts)}


def loss_of(read: Any, data: dict) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017), the value loss and the entropy."""
    logits, value, _ = read(data["seen"], data["hx"], data["reset"])
    choice = Categorical(logits=logits)
    ratio = (choice.log_prob(data["action"]) - data["chance"]).exp()
    gain = (data["gain"] - data["gain"].mean()) / (data["gain"].std() + 1e-6)
    gained = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    off = nn.functional.smooth_l1_loss(value[..., 0], data["target"])
    return off - gained - 0.01 * choice.entropy().mean()


def compare(policy: Policy, data: dict) -> tuple[float, float]:
    """The largest difference between the gradients of both ways, and the ratio of their times."""
    gradients, seconds = [], []
    for read in (policy, policy.step_by_step):
        policy.zero_grad()
        loss_of(read, data).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        start = time.perf_counter()
        loss_of(read, data).backward()  # a second run, after warm-up
        seconds.append(time.perf_counter() - start)
    return (gradients[0] - gradients[1]).abs().max().item(), seconds[1] / seconds[0]


def main() -> int:
    options = arguments("Balance a pole from memory.", "cartpole.png", updates=60)
    torch.manual_seed(SEED)
    policy, carts, returns, stood = Policy(), CartPoles(), [0.0], []
    optimiser = torch.optim.Adam(policy.parameters(), lr=5e-3)
    state = ((torch.zeros(1, CARTS, UNITS),) * 2, torch.ones(CARTS, dtype=torch.bool))
    for update in range(options.updates):
        data = collect(policy, carts, *state)
        state = data["after"]
        returns += data["ages"][data["over"]].tolist()
        stood.append(statistics.fmean(returns[-100:]))
        if update == 0:
            apart, faster = compare(policy, data)
        for _ in range(EPOCHS):
            optimiser.zero_grad()
            loss_of(policy, data).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()

    labels = {"xlabel": "update", "ylabel": f"steps before the pole falls, of {LONGEST}"}
    save(curve(stood, title="balancing from memory", **labels), options.output)
    print(f"reset= is {faster:.1f} times as fast as the loop; gradients differ by {apart:.1e}")
    print(f"mean steps until the pole falls: {stood[0]:.0f} at first, {stood[-1]:.0f} for the last "
          f"100 poles, at most {LONGEST}")  # fmt: skip
    good = options.quick or stood[-1] >= LOWEST_RETURN
    return verdict(
        good and apart < 1e-4,
        "gradients differ" if good else "the poles fall early",
        "the curve rises towards its limit although the policy never observes a velocity: its "
        "state remembers the positions before. `reset=` gives the loop's gradients in one call.",
    )


if __name__ == "__main__":
    sys.exit(main())
