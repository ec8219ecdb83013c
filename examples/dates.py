"""Sequence to sequence with attention: translate dates in words to ISO dates.

The model translates "saturday the third of march, nineteen eighty-four" to "1984-03-03". A
bidirectional LSTM reads the characters of each date, up to its length (`lengths`); another LSTM
writes the digits, and at each digit attends to the whole text (Luong et al. 2015).

    python examples/dates.py

Exit code 1 if too few of the held-out dates are completely correct.
"""

from __future__ import annotations

import datetime as dt
import random
import sys

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrnn
from common import WIDTH, arguments, save, verdict

SEED, UNITS, BATCH, LOWEST_ACCURACY = 0, 96, 64, 0.95
FIRST, DAYS = dt.date(1900, 1, 1), 73_000  # to the end of 2099
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = (ONES + " fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"}
ORDINALS |= {"nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}
DIGITS = "0123456789-<"  # < opens the written date
LETTERS = "_ ,-abcdefghijklmnopqrstuvwxyz"


def number(n: int) -> str:
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def ordinal(n: int) -> str:
    *most, last = number(n).split("-")
    return "-".join([*most, ORDINALS.get(last, last + "th")])


def year_in_words(year: int) -> str:
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {number(rest)}" if rest else "")
    return f"{number(century)} {number(rest) if rest else 'hundred'}"


def in_words(date: dt.date, choose: random.Random) -> str:
    """One of several ways to write a date in words."""
    day, year = ordinal(date.day), year_in_words(date.year)
    month, weekday = (f"{date:{code}}".lower() for code in ("%B", "%A"))
    form = choose.choice(["{w} the {d} of {m}, {y}", "{d} of {m} {y}", "{m} {d}, {y}",
                          "{w}, {m} the {d}, {y}", "the {d} of {m} in {y}"])  # fmt: skip
    return form.format(w=weekday, d=day, m=month, y=year)


def batch_of(dates: list[dt.date], choose: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Letters (B, S), lengths (B,) and digits (B, 11), the first of which opens the date."""
    texts = [torch.tensor([LETTERS.index(c) for c in in_words(d, choose)]) for d in dates]
    digits = torch.tensor([[DIGITS.index(c) for c in "<" + d.isoformat()] for d in dates])
    return pad_sequence(texts, True), torch.tensor([len(t) for t in texts]), digits


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.digits = nn.Embedding(len(LETTERS), 32), nn.Embedding(len(DIGITS), 32)
        self.reader = fastrnn.LSTM(32, UNITS, batch_first=True, bidirectional=True)
        self.start = nn.Linear(2 * UNITS, UNITS)
        self.writer = fastrnn.LSTM(32, UNITS, batch_first=True)
        self.query = nn.Linear(UNITS, 2 * UNITS)
        self.head = nn.Sequential(nn.Linear(3 * UNITS, UNITS), nn.Tanh(), nn.Linear(UNITS, 12))

    def read(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple]:
        memory, (h, _) = self.reader(self.letters(letters), lengths=lengths)
        mask = torch.arange(letters.shape[1]) < lengths[:, None]
        h = torch.tanh(self.start(torch.cat([h[0], h[1]], -1)))[None]
        return memory, mask, (h, torch.zeros_like(h))

    def write(self, digits: Tensor, memory: Tensor, mask: Tensor, state: tuple) -> tuple:
        """The logits of the digit after each given one, the attention weights, the new state."""
        output, state = self.writer(self.digits(digits), state)
        scores = self.query(output) @ memory.transpose(1, 2)
        attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.head(torch.cat([output, attention @ memory], -1)), attention, state

    @torch.inference_mode()
    def translate(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Digits (B, 10), each the most likely given the previous ones, and the attention."""
        memory, mask, state = self.read(letters, lengths)
        digit = torch.full((len(letters), 1), DIGITS.index("<"))
        found = []
        for _ in range(10):
            logits, attention, state = self.write(digit, memory, mask, state)
            digit = logits[..., :-1].argmax(-1)
            found.append((digit, attention))
        digits, looks = zip(*found, strict=True)
        return torch.cat(digits, 1), torch.cat(looks, 1)


def plot(text: str, date: str, attention: Tensor) -> Figure:
    """The attention of each digit over the text: one row for each digit, one column a letter."""
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    image = axes.imshow(attention.numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1)
    axes.set_xticks(range(len(text)), text, family="monospace")
    axes.set_yticks(range(len(date)), date, family="monospace")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set(title="where the model looks while it writes", xlabel="the text that it reads")
    axes.set_ylabel("the date that it writes")
    figure.colorbar(image, label="attention")
    return figure


def main() -> int:
    options = arguments("Translate dates in words to ISO dates.", "dates.png", updates=500)
    torch.manual_seed(SEED)
    choose = random.Random(SEED)
    dates = [FIRST + dt.timedelta(n) for n in choose.sample(range(DAYS), DAYS)]
    held_out, training = dates[:500], dates[500:]
    model = Translator()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.updates):
        letters, lengths, digits = batch_of(choose.sample(training, BATCH), choose)
        logits, _, _ = model.write(digits[:, :-1], *model.read(letters, lengths))
        loss = F.cross_entropy(logits.flatten(0, 1), digits[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    letters, lengths, digits = batch_of(held_out, choose)
    found, attention = model.translate(letters, lengths)
    right = (found == digits[:, 1:]).all(1).float().mean().item()
    for row in reversed(range(5)):
        text = "".join(LETTERS[i] for i in letters[row, : lengths[row]])
        written = "".join(DIGITS[i] for i in found[row])
        print(f"{text:<58} {written}")
    print(f"completely correct dates: {right:.1%} of {len(held_out)} held-out dates")
    save(plot(text, written, attention[0, :, : lengths[0]]), options.output)
    return verdict(
        options.quick or right >= LOWEST_ACCURACY,
        f"below {LOWEST_ACCURACY:.0%}",
        "each row of the picture is one written digit; the dark cells are the letters that it "
        "was read from: first the words of the year, then the month, then the day.",
    )


if __name__ == "__main__":
    sys.exit(main())
