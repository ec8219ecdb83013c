"""Sequence tagging: a bidirectional GRU colours Python source, character by character.

The text is Python's standard library; Python's tokenizer gives the tag of each character: keyword,
name, number, string, comment, operator or space. Lines differ in length: the batch is padded,
`lengths` gives the length of each line, and the reverse direction starts at each line's end.
Nothing is sorted or packed.

    python examples/tagging.py

Exit code 1 if the accuracy on held-out files is too low.
"""

from __future__ import annotations

import io
import keyword
import sys
import sysconfig
import tokenize
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrnn
from common import WIDTH, arguments, progress, save, verdict

SEED, LONGEST, UNITS, LOWEST_ACCURACY = 0, 100, 64, 0.93
TAGS = ("space", "name", "keyword", "number", "string", "comment", "operator")
COLOURS = ("#cccccc", "#24292f", "#cf222e", "#0550ae", "#0a7d33", "#8b949e", "#8250df")
PADDING = -1  # the tag of padding
SHOWN = range(86, 106)  # the held-out lines of the picture
HELD_OUT = ("textwrap.py", "queue.py", "heapq.py")
TRAINING = ("argparse.py", "ast.py", "bisect.py", "calendar.py", "cmd.py", "codecs.py", "copy.py")
TRAINING += ("csv.py", "dis.py", "enum.py", "fractions.py", "functools.py", "inspect.py")
TRAINING += ("ipaddress.py", "locale.py", "pickle.py", "shutil.py", "statistics.py", "zipfile.py")


def tag_of(token: tokenize.TokenInfo) -> int:
    if token.type == tokenize.NAME:
        return TAGS.index("keyword" if keyword.iskeyword(token.string) else "name")
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment"}
    return TAGS.index(kinds.get(token.type, "operator" if token.string.strip() else "space"))


def tagged_lines(source: str) -> list[tuple[str, Tensor]]:
    """The lines of a file that are neither empty nor too long, with their tags."""
    lines = source.splitlines()
    tags = [torch.zeros(len(line), dtype=torch.long) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last, end) = token.start, token.end
        for r in range(row, min(last, len(lines)) + 1):
            here = slice(column if r == row else 0, end if r == last else None)
            tags[r - 1][here] = tag_of(token)
    return [(line, t) for line, t in zip(lines, tags, strict=True) if 0 < len(line) <= LONGEST]


def load(names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    library = Path(sysconfig.get_path("stdlib"))
    present = [library / name for name in names if (library / name).exists()]
    return [pair for path in present for pair in tagged_lines(path.read_text("utf-8"))]


def batch_of(pairs: list[tuple[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Characters (B, T), lengths (B,) and tags (B, T); padding has the tag PADDING."""
    texts = [torch.tensor([min(ord(c), 127) for c in text]) for text, _ in pairs]
    lengths = torch.tensor([len(text) for text in texts])
    tags = pad_sequence([tags for _, tags in pairs], True, PADDING)
    return pad_sequence(texts, True), lengths, tags


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.layers = fastrnn.GRU(32, UNITS, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * UNITS, len(TAGS))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.layers(self.embedding(characters), lengths=lengths)
        return self.head(output)


def train(model: Tagger, pairs: list[tuple[str, Tensor]], epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(pairs)).split(64):
            characters, lengths, tags = batch_of([pairs[i] for i in chosen])
            logits = model(characters, lengths)
            loss = F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=PADDING)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        progress("epoch", epoch + 1, epochs, loss.item())


def plot(lines: list[str], found: Tensor) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.2 * len(lines) + 0.6))
    axes = figure.subplots()
    widest = max(map(len, lines))
    axes.set(xlim=(0, widest), ylim=(len(lines) + 0.5, -1.5))
    axes.axis("off")
    for i, (tag, colour) in enumerate(zip(TAGS[1:], COLOURS[1:], strict=True)):
        axes.text(widest * i / 6, -1, tag, color=colour, weight="bold", size=10)
    size = min(72 * WIDTH / widest / 0.66, 11)  # a monospaced letter is 0.6 of its size wide
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            colour = COLOURS[int(found[row, column])]
            axes.text(column, row + 0.5, character, color=colour, family="monospace", size=size)
    return figure


def main() -> int:
    quick = "a quarter of the lines; only check that the model beats the most frequent tag"
    options = arguments("Colour source code with a GRU.", "tagging.png", quick, epochs=4)
    torch.manual_seed(SEED)
    training, held_out = load(TRAINING), load(HELD_OUT)
    if options.quick:
        training = training[::4]
    model = Tagger()
    train(model, training, options.epochs)
    characters, lengths, tags = batch_of(held_out)
    with torch.inference_mode():
        found = model(characters, lengths).argmax(-1)
    real = tags != PADDING
    accuracy = (found == tags)[real].float().mean().item()
    counts = [int((tags == tag).sum()) for tag in range(len(TAGS))]
    most = max(range(len(TAGS)), key=counts.__getitem__)
    baseline = counts[most] / sum(counts)
    print(f"{len(training)} lines for training, {len(held_out)} held-out lines of other files")
    print(f"correct characters: {accuracy:.1%} (always {TAGS[most]}: {baseline:.1%})")
    for tag, (name, count) in enumerate(zip(TAGS, counts, strict=True)):
        right = int((found == tags)[tags == tag].sum())
        share = f"{right / count:.1%}" if count else "-"
        print(f"  {name:<9}{share:>7} of {count}")
    save(plot([held_out[i][0] for i in SHOWN], found[list(SHOWN)]), options.output)
    lowest = baseline if options.quick else LOWEST_ACCURACY
    return verdict(
        accuracy > lowest,
        f"not above {lowest:.1%}",
        "in the picture the model has coloured lines of a file that it has not read before. The "
        "end of a comment or string is right even where its beginning is far to the left.",
    )


if __name__ == "__main__":
    sys.exit(main())
