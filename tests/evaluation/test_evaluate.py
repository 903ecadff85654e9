import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmkern.evaluation.evaluate import evaluate

VOCABULARY = ["<|endoftext|>", *"abcdefgh"]


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context=8)
        self.logits = nn.Parameter(torch.zeros(len(VOCABULARY), len(VOCABULARY)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


@dataclass
class Split:
    documents_text: list[str]

    def text(self) -> list[str]:
        return self.documents_text

    @property
    def tokens(self) -> Tensor:
        ids = [[*(VOCABULARY.index(c) for c in text), 0] for text in self.documents_text]
        return torch.tensor(sum(ids, []), dtype=torch.uint16)

    @property
    def documents(self) -> Tensor:
        return torch.tensor(np.cumsum([0] + [len(text) + 1 for text in self.documents_text[:-1]]))

    @property
    def bytes(self) -> int:
        return sum(len(text) for text in self.documents_text)


def make_split(seed: int, n: int) -> Split:
    """Letters, each mostly followed by the next of the alphabet."""
    rng = np.random.default_rng(seed)
    walks = [np.cumsum(rng.choice([1, 1, 1, 2, 5], size=rng.integers(1, 30))) % 8 for _ in range(n)]
    return Split(["".join("abcdefgh"[i] for i in walk) for walk in walks])


@pytest.fixture
def dataset() -> SimpleNamespace:
    tokenizer = SimpleNamespace(get_vocab_size=lambda: len(VOCABULARY))
    splits = {"train": make_split(0, 200), "validation": make_split(1, 30), "test": make_split(2, 30)}
    return SimpleNamespace(**splits, tokenizer=tokenizer, end_of_text=0)


def test_table_has_all_rows_and_survives_json(dataset):
    table = evaluate(Bigram(), dataset, name="Bigram")
    assert json.loads(json.dumps(table)) == table
    assert (table["split"], table["bytes"], table["tokens"]) == (
        "test",
        dataset.test.bytes,
        len(dataset.test.tokens),
    )
    assert [row["name"] for row in table["rows"]] == [
        "Bigram",
        "modified Kneser-Ney 5-gram",
        "interpolation",
        "xz -9e",
        "xz -9e given the training text",
    ]
    assert [set(row) - {"name", "bits_per_byte"} for row in table["rows"]] == [
        {"perplexity"},
        {"perplexity"},
        {"perplexity", "weight"},
        set(),
        set(),
    ]


def test_a_model_that_knows_nothing_pays_for_every_token_alike(dataset):
    row = evaluate(Bigram(), dataset)["rows"][0]
    assert row["perplexity"] == pytest.approx(9, rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(
        len(dataset.test.tokens) * math.log2(9) / dataset.test.bytes, rel=1e-5
    )


def test_interpolation_is_weighted_on_validation_and_beats_both_parts(dataset):
    dataset.train = make_split(0, 4)
    model = Bigram()
    with torch.no_grad():
        for i in range(8):
            model.logits[1 + i, 1 + (i + 1) % 8] = 2
    ours, theirs, both = evaluate(model, dataset)["rows"][:3]
    assert 0.1 < both["weight"] < 0.9
    assert both["bits_per_byte"] < min(ours["bits_per_byte"], theirs["bits_per_byte"])
    dataset.test = make_split(7, 40)
    assert evaluate(model, dataset)["rows"][2]["weight"] == both["weight"]


def test_training_text_helps_xz(dataset):
    alone, given = evaluate(Bigram(), dataset)["rows"][3:]
    assert 0 < given["bits_per_byte"] < alone["bits_per_byte"]


def test_validation_can_be_judged_too(dataset):
    table = evaluate(Bigram(), dataset, split="validation")
    assert table["split"] == "validation" and table["bytes"] == dataset.validation.bytes


def test_every_stage_reports_its_end(dataset):
    last: dict[str, tuple[int, int]] = {}
    evaluate(Bigram(), dataset, progress=lambda stage, done, total: last.update({stage: (done, total)}))
    assert list(last) == [
        "lmkern GPT, test",
        "lmkern GPT, validation",
        "modified Kneser-Ney 5-gram",
        "xz -9e",
    ]
    assert all(done == total for done, total in last.values())


def test_the_training_split_is_refused(dataset):
    with pytest.raises(ValueError, match='split must be "test" or "validation"; got \'train\''):
        evaluate(Bigram(), dataset, split="train")
