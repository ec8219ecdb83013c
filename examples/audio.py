"""Listen to sound as it arrives: telephone keys in noise, 20 milliseconds per step.

A telephone key sounds as two tones at once, one for its row and one for its column (ITU-T Q.23). A
GRU reads how loud each of the eight tones is in every 20 ms of sound, and says which key is down,
or none. It is trained on whole sequences. Then `fastrnn.Stream` runs it as a program with a
microphone would: one step for each 20 ms, with the state kept inside, and with the bits of the
whole sequence. The noise is loud enough to hide a tone in 20 ms alone: for comparison, the loudest
row and column tone of each frame.

    python examples/audio.py

Exit code 1 if the stream differs from the layer, or names fewer frames correctly than expected or,
where a key is down, than the loudest tones of the frame alone.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, progress, save, verdict

SEED, UNITS, LOWEST_ACCURACY = 0, 64, 0.85
RATE, FRAME = 8000, 160  # samples a second, and of one step
KEYS = "123A456B789C*0#D"
ROWS, COLUMNS = torch.tensor([697.0, 770, 852, 941]), torch.tensor([1209.0, 1336, 1477, 1633])
SILENCE = len(KEYS)  # the class of no key
LOUDEST_NOISE = 3.0  # its standard deviation; a tone has the amplitude 1
ANGLES = torch.cat([ROWS, COLUMNS])[:, None] * 2 * torch.pi * torch.arange(FRAME) / RATE
WAVES = torch.cat([ANGLES.cos(), ANGLES.sin()]).T / FRAME  # (FRAME, 16)


def loudness(sound: Tensor) -> Tensor:
    """The amplitude of each of the eight tones, (…, 8), in frames (…, FRAME)."""
    cosine, sine = (sound @ WAVES).split(8, -1)
    return 2 * (cosine**2 + sine**2).sqrt()


def dial(rows: int, steps: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sound (steps, rows, FRAME) of random keys, 80 to 200 ms each, and the key of each step."""
    keys = torch.full((steps, rows), SILENCE)
    for row in range(rows):
        step = 0
        while step < steps:
            pause, down = torch.randint(4, 11, (2,), generator=generator).tolist()
            key = torch.randint(SILENCE, (), generator=generator)
            keys[step + pause : step + pause + down, row] = key
            step += pause + down
    down = keys[..., None] < SILENCE
    tones = torch.stack([ROWS[keys.clamp(max=SILENCE - 1) // 4], COLUMNS[keys % 4]])
    seconds = torch.arange(steps * FRAME).view(steps, 1, FRAME) / RATE
    sound = (2 * torch.pi * tones[..., None] * seconds).sin().sum(0) * down
    return sound + noise * torch.randn(sound.shape, generator=generator), keys


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = fastrnn.GRU(8, UNITS), nn.Linear(UNITS, SILENCE + 1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.layer(frames)[0])


def train(model: Listener, updates: int, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for update in range(updates):
        noise = LOUDEST_NOISE * torch.rand((), generator=generator).item()
        sound, keys = dial(16, 100, noise, generator)
        loss = F.cross_entropy(model(loudness(sound)).flatten(0, 1), keys.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        progress("update", update + 1, updates, loss.item())


@torch.inference_mode()
def listen(model: Listener, sound: Tensor) -> tuple[Tensor, Tensor, bool, float]:
    """Stream frames (steps, 1, FRAME) of one microphone.

    The loudness and the logits of each step, whether all states have the bits of one call of the
    layer, and the median microseconds of a step.
    """
    stream = fastrnn.Stream(model.layer)
    tones, states, logits, seconds = [], [], [], []
    for frame in sound:  # a program would wait here for the next 20 ms
        start = time.perf_counter()
        tones.append(loudness(frame))
        h = stream.step(tones[-1])
        logits.append(model.head(h))
        seconds.append(time.perf_counter() - start)
        states.append(h.clone())  # the next step overwrites it
    whole, _ = model.layer(torch.stack(tones))
    same = torch.equal(torch.stack(states), whole)
    return torch.stack(tones), torch.stack(logits), same, statistics.median(seconds) * 1e6


def loudest(tones: Tensor) -> Tensor:
    """The key of the loudest row tone and column tone of each frame."""
    return 4 * tones[..., :4].argmax(-1) + tones[..., 4:].argmax(-1)


def plot(tones: Tensor, keys: Tensor, logits: Tensor) -> Figure:
    figure, above, below = panels(2, height=5.8, sharex=True)
    end = len(keys) * FRAME / RATE
    image = above.imshow(tones.T.numpy(), origin="lower", aspect="auto", extent=(0, end, -0.5, 7.5),
                         cmap="magma")  # fmt: skip
    above.figure.colorbar(image, ax=above, label="amplitude")
    above.set_yticks(range(8), [f"{f:.0f}" for f in [*ROWS.tolist(), *COLUMNS.tolist()]])
    above.grid(visible=False)
    above.set(title="the loudness of the eight tones, in noise", ylabel="Hz")
    chances, seconds = logits.softmax(-1), torch.arange(len(keys)) * FRAME / RATE
    for key in sorted(set(keys.tolist()) - {SILENCE}):
        (line,) = below.plot(seconds, chances[:, key])
        starts = [t for t in range(1, len(keys)) if keys[t] == key != keys[t - 1]]
        for t in starts:
            below.text(t * FRAME / RATE, 1.04, KEYS[key], color=line.get_color(), weight="bold")
    below.set(title="what the GRU says after each 20 ms; the letters are the keys pressed",
              xlabel="seconds", ylabel="probability", ylim=(0, 1.2))  # fmt: skip
    return figure


def main() -> int:
    options = arguments("Name telephone keys from sound.", "audio.png", updates=300)
    torch.manual_seed(SEED)
    model = Listener()
    train(model, options.updates, torch.Generator().manual_seed(SEED))
    sound, keys = dial(20, 400, LOUDEST_NOISE, torch.Generator().manual_seed(SEED + 1))
    tones, logits, same, microseconds = listen(model, sound[:, :1])  # the first row
    save(plot(tones[:200, 0], keys[:200, 0], logits[:200, 0]), options.output)

    with torch.inference_mode():
        right = model(loudness(sound)).argmax(-1) == keys
    accuracy, down = right.float().mean().item(), keys < SILENCE
    gathered = right[down].float().mean().item()
    alone = (loudest(loudness(sound)) == keys)[down].float().mean().item()
    print(f"{keys.numel()} frames of 20 ms; the noise is {LOUDEST_NOISE:g} times a tone")
    print(f"frames named correctly: {accuracy:.1%}")
    print(f"where a key is down: {gathered:.1%}; by the loudest tones alone: {alone:.1%}")
    print(f"a step takes {microseconds:.0f} microseconds, {microseconds / 200:.2f}% of its 20 ms")
    return verdict(
        same and (options.quick or (accuracy >= LOWEST_ACCURACY and gathered > alone)),
        "too few frames are right" if same else "the stream differs from the layer",
        "the curve of the pressed key rises within a few steps of its beginning: the state gathers "
        "what one frame does not show. Streamed or whole, the bits of the states are the same.",
    )


if __name__ == "__main__":
    sys.exit(main())
