"""A character model: an LSTM learns to write like Python's reference manual.

The text is `pydoc_data.topics`, the part of the manual that ships with Python. Two LSTM layers read
it in chunks of 64 characters, carry the state from chunk to chunk, and predict every next
character. The perplexity starts near the size of the alphabet and falls; then the model writes.

    python examples/characters.py

Exit code 1 if the held-out perplexity is not below that of a table of character pairs.
"""

from __future__ import annotations

import math
import sys
import time
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, save, verdict

SEED, BATCH, STEPS, UNITS = 0, 32, 64, 256


class Writer(nn.Module):
    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 64)
        self.layers = fastrnn.LSTM(64, UNITS, num_layers=2, dropout=0.1)
        self.head = nn.Linear(UNITS, alphabet)

    def forward(self, characters: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        output, state = self.layers(self.embedding(characters), state)
        return self.head(output), state


def pair_perplexity(training: Tensor, held_out: Tensor, alphabet: int) -> float:
    """The perplexity of a table of how often each character follows each other one."""
    counts = torch.ones(alphabet, alphabet)
    counts.index_put_((training[:-1], training[1:]), torch.tensor(1.0), accumulate=True)
    chances = counts / counts.sum(1, keepdim=True)
    return chances[held_out[:-1], held_out[1:]].log().mean().neg().exp().item()


@torch.inference_mode()
def perplexity(model: Writer, text: Tensor) -> float:
    model.eval()
    logits, _ = model(text[:-1, None])
    model.train()
    return F.cross_entropy(logits[:, 0], text[1:]).exp().item()


@torch.inference_mode()
def write(model: Writer, start: Tensor, characters: str, length: int, temperature: float) -> str:
    """`length` characters that follow `start`, each from one step of the layers."""
    model.eval()
    logits, state = model(start[:, None])
    written = []
    for _ in range(length):
        chances = F.softmax(logits[-1, 0] / temperature, 0)
        following = torch.multinomial(chances, 1)
        written.append(characters[int(following)])
        logits, state = model(following[:, None], state)
    return "".join(written)


def train(model: Writer, text: Tensor, updates: int) -> list[float]:
    """Truncated BPTT at BATCH places of the text in parallel; the loss of each update."""
    columns = text[: len(text) // BATCH * BATCH].view(BATCH, -1).T
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=updates)
    state, losses, at = None, [], 0
    for _ in range(updates):
        if at + STEPS + 1 > len(columns):
            at, state = 0, None
        logits, state = model(columns[at : at + STEPS], state)
        state = tuple(s.detach() for s in state)  # stops the gradient, keeps the state
        loss = F.cross_entropy(logits.flatten(0, 1), columns[at + 1 : at + STEPS + 1].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        losses.append(loss.item())
        at += STEPS
    return losses


def plot(losses: list[float], pairs: float) -> Figure:
    figure, axes = panels()
    axes.semilogy([math.exp(loss) for loss in losses], lw=1, label="LSTM, training")
    axes.axhline(pairs, color="k", ls="--", lw=1, label="table of pairs, held out")
    ticks = (2, 3, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set(xlabel="update", ylabel="perplexity", title="predicting the next character")
    axes.legend()
    return figure


def main() -> int:
    options = arguments("Teach an LSTM to write.", "characters.png", updates=400)
    torch.manual_seed(SEED)
    manual = "\n".join(topics[name] for name in sorted(topics))
    characters = "".join(sorted(set(manual)))
    place = {character: i for i, character in enumerate(characters)}
    text = torch.tensor([place[character] for character in manual])
    held_out, training = text[:20_000], text[20_000:]

    model = Writer(len(characters))
    before = perplexity(model, held_out)
    start = time.perf_counter()
    losses = train(model, training, options.updates)
    seconds = time.perf_counter() - start
    after, pairs = perplexity(model, held_out), pair_perplexity(training, held_out, len(characters))
    save(plot(losses, pairs), options.output)

    print(f"{len(text)} characters of {len(characters)} kinds; {options.updates} updates")
    print(f"{seconds:.1f} s, {options.updates * BATCH * STEPS / seconds:.0f} characters a second")
    print(f"held-out perplexity {before:.1f} before, {after:.2f} after; table of pairs {pairs:.2f}")
    opening = "The statement "
    written = write(model, torch.tensor([place[c] for c in opening]), characters, 300, 0.7)
    print("-" * 80, opening + written, "-" * 80, sep="\n")
    return verdict(
        options.quick or after < pairs,
        "not better than the table of pairs",
        f"a perplexity of {after:.1f} means that the next character is as uncertain as a choice "
        f"among {after:.1f}; the written text has words and markup, though little sense.",
    )


if __name__ == "__main__":
    sys.exit(main())
