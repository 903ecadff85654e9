"""BLEU and chrF beside sacrebleu's own functions, over a search that gives known targets."""

import sys
from types import SimpleNamespace

import pytest

from lmkern.evaluation import corpus_scores, evaluate_pairs

sacrebleu = pytest.importorskip("sacrebleu")

REFERENCES = ["A man in green holds a guitar.", "Two dogs run over the snow, happily!", "It is  red"]
OUTPUTS = ["A man in Green is holding a guitar .", "Two dogs run across the snow.", ""]


def test_scores_are_sacrebleus_with_their_signatures():
    bleu, chrf = corpus_scores(OUTPUTS, REFERENCES)
    assert bleu["score"] == sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score
    assert chrf["score"] == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score
    assert bleu["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert 0 < bleu["score"] < chrf["score"] < 100
    assert corpus_scores(REFERENCES, REFERENCES)[0]["score"] == pytest.approx(100)


def test_every_pair_of_the_split_is_scored_in_its_order(monkeypatch):
    seen = {}

    def rewrite(model, tokenizer, sources, **options):
        seen.update(options, sources=sources)
        return OUTPUTS

    monkeypatch.setattr("lmkern.evaluation.pairs.rewrite", rewrite)
    split = SimpleNamespace(text=lambda: list(zip("abc", REFERENCES, strict=True)))
    dataset = SimpleNamespace(test=split, tokenizer=None)
    found = evaluate_pairs(None, dataset, beams=3, length_penalty=0.5, max_new_tokens=7)
    assert seen["sources"] == ["a", "b", "c"]
    assert (seen["beams"], seen["length_penalty"], seen["max_new_tokens"]) == (3, 0.5, 7)
    assert found["rows"] == corpus_scores(OUTPUTS, REFERENCES)
    assert (found["pairs"], found["outputs"]) == (3, OUTPUTS)
    assert found["examples"][1] == {"source": "b", "target": REFERENCES[1], "output": OUTPUTS[1]}
    with pytest.raises(ValueError, match='must be "test" or "validation"; got \'train\''):
        evaluate_pairs(None, dataset, split="train")


def test_without_sacrebleu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"pip install 'lmkern\[translation\]'"):
        corpus_scores(OUTPUTS, REFERENCES)
