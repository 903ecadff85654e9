import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmkern.evaluation.perplexity import Window, bits_per_byte, perplexity, token_log_probs, windows

V = 11


class Running(nn.Module):
    """Logits that sum up every token shown so far, so that the context a token got can be read off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, V))
        self.dropout = nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        return self.dropout(self.table[tokens].cumsum(dim=1))


def by_hand(model: Running, document: list[int], context: int, stride: int) -> list[float]:
    """Token by token: how far back does the window that scores it reach?"""
    stream = [0, *document]
    out = []
    for i in range(len(document)):
        begin = 0 if i < context else ((i - context) // stride + 1) * stride
        assert i < context or i - begin >= context - stride
        logits = model.table[stream[begin : i + 1]].sum(0)
        out.append(logits.log_softmax(0)[document[i]].item())
    return out


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (8, 1), (5, 2), (1, 1), (64, 32)])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_each_token_is_scored_once_after_the_context_it_is_due(context, stride, batch):
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, V, size=n - 1).tolist(), 0] for n in (1, 7, 30, 8, 9, 2, 17)]
    starts = np.cumsum([0] + [len(d) for d in documents[:-1]])
    model = Running()
    out = token_log_probs(model, sum(documents, []), starts, context=context, stride=stride, batch=batch)
    expected = [x for document in documents for x in by_hand(model, document, context, stride)]
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert max(n for _, n in model.shapes) <= context and max(b for b, _ in model.shapes) <= batch


def test_windows_slide_by_stride_and_score_their_news():
    assert windows(100, 117, context=8, stride=4) == [
        Window(100, 108, 0, True),
        Window(104, 112, 4, False),
        Window(108, 116, 4, False),
        Window(112, 117, 4, False),
    ]


def test_default_stride_is_half_the_context():
    tokens, model = np.arange(40) % V, Running()
    out = token_log_probs(model, tokens, [0], context=8)
    np.testing.assert_array_equal(out, token_log_probs(model, tokens, [0], context=8, stride=4))


def test_end_of_text_stands_before_each_document():
    model = Running()
    out = token_log_probs(model, [3, 4, 3, 4], [0, 2], context=8, end_of_text=5)
    np.testing.assert_array_equal(out[:2], out[2:])
    assert out[0] == pytest.approx(model.table[5].log_softmax(0)[3].item(), rel=1e-5)


def test_model_is_left_as_it_was():
    model = Running().train()
    model.dropout.eval()
    token_log_probs(model, [1, 0], [0], context=4)
    assert model.training and not model.dropout.training
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_model_is_left_as_it_was_after_an_error():
    model = Running().train()
    with pytest.raises(IndexError):
        token_log_probs(model, [V + 5, 0], [0], context=4)
    assert model.training and model.dropout.training and not torch.is_inference_mode_enabled()


def test_progress_counts_the_tokens():
    calls: list[tuple[int, int]] = []
    token_log_probs(
        Running(), np.zeros(30, int), [0, 3], context=8, batch=2, progress=lambda *c: calls.append(c)
    )
    assert calls[-1] == (30, 30) and calls == sorted(set(calls))


def test_no_tokens_have_no_log_probs():
    assert token_log_probs(Running(), [], [], context=8).shape == (0,)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_skips_or_stands_still_is_refused(stride):
    with pytest.raises(
        ValueError, match=rf"stride must lie in \[1, context\]; got stride {stride}, context 8"
    ):
        token_log_probs(Running(), [1], [0], context=8, stride=stride)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        token_log_probs(Running(), [1], [0], context=8, batch=0)


def test_bits_per_byte_and_perplexity_of_even_odds():
    log_probs = np.full(6, math.log(1 / 8))
    assert perplexity(log_probs) == pytest.approx(8)
    assert bits_per_byte(log_probs, 9) == pytest.approx(6 * 3 / 9)


def test_measures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="perplexity: expected at least one token"):
        perplexity(np.array([]))
    with pytest.raises(ValueError, match="bits_per_byte: n_bytes must be at least 1; got 0"):
        bits_per_byte(np.array([]), 0)
