"""The part-of-speech tagger of stanza, on sentences in CoNLL-U."""

import random

import torch
from stanza.models import tagger
from stanza.models.pos.data import Dataset
from stanza.models.pos.model import Tagger
from stanza.models.pos.trainer import unpack_batch
from stanza.utils.conll import CoNLL

import fastrnn
from common import compare

words = {"the": "DET", "cat": "NOUN", "dog": "NOUN", "sees": "VERB", "here": "ADV", "now": "ADV"}
text, rng = "", random.Random(0)
for length in [*range(5, 37)] * 2:
    for i, word in enumerate(rng.choices([*words], k=length)):
        text += f"{i + 1}\t{word}\t{word}\t{words[word]}\t{words[word]}\t_\t{i}\tdep\t_\t_\n"
    text += "\n"
arguments = tagger.parse_args(["--no_pretrain", "--augment_nopunct", "0", "--lang", "en"])
data = Dataset(CoNLL.conll2doc(input_str=text), arguments, None)
inputs, _, *rest = unpack_batch(next(iter(data.to_loader(batch_size=64))), "cpu")


def build() -> Tagger:
    model = Tagger(arguments, data.vocab)
    torch.nn.init.normal_(model.upos_clf.weight)  # zeros at first, which would hide a difference
    return model


compare(
    "stanza",
    "the `pos` tagger with its default sizes and character model: 64 sentences",
    build,
    lambda: fastrnn.convert(build()),
    infer=lambda model: model.eval()(*inputs, *rest),
    train=lambda model: model.train()(*inputs, *rest)[0],
)
