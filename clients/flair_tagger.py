"""The sequence tagger of flair: words and characters to a bidirectional LSTM and a CRF."""

import random

from flair.data import Dictionary, Sentence
from flair.embeddings import CharacterEmbeddings, HashEmbeddings, StackedEmbeddings
from flair.models import SequenceTagger

import fastrnn
from common import compare

rng, tags, letters = random.Random(0), Dictionary(add_unk=False), Dictionary()
for letter in "adegnortvwxy":
    letters.add_item(letter)
sentences = [Sentence(rng.choices(["red", "dry", "tower"], k=length)) for length in range(8, 40)]
for token in (token for sentence in sentences for token in sentence):
    tags.add_item(token.text[0])
    token.add_label("pos", token.text[0])


def build() -> SequenceTagger:
    words = StackedEmbeddings([HashEmbeddings(1000, 100), CharacterEmbeddings(letters)])
    return SequenceTagger(words, tags, "pos", tag_format="BIO")


def loss(model: SequenceTagger):
    for sentence in sentences:
        sentence.clear_embeddings()
    return model.forward_loss(sentences)[0]


compare(
    "flair",
    "`SequenceTagger`: bidirectional LSTM, CRF, character LSTM; 32 sentences",
    build,
    lambda: fastrnn.convert(build()),
    infer=lambda model: loss(model.eval()),
    train=lambda model: loss(model.train()),
)
