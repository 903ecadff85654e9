import numpy as np
import pytest
import torch

from lmkern.evaluation.documents import document_spans


def test_documents_tile_the_tokens():
    tokens, starts, ends = document_spans("f", [5, 6, 7, 8], [0, 1, 3])
    assert [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)] == [[5], [6, 7], [8]]


def test_no_documents_of_no_tokens():
    tokens, starts, ends = document_spans("f", [], [])
    assert len(tokens) == len(starts) == len(ends) == 0


def test_uint16_tensors_are_read_as_numbers():
    tokens, _, _ = document_spans("f", torch.tensor([0, 65535], dtype=torch.uint16), torch.tensor([0]))
    assert tokens.dtype == np.int64 and tokens.tolist() == [0, 65535]


@pytest.mark.parametrize("documents", [[], [1], [0, 2, 2], [0, 3, 1], [0, 4]])
def test_offsets_that_are_no_documents_are_refused(documents):
    with pytest.raises(ValueError, match="caller: documents must start at 0 and ascend"):
        document_spans("caller", [1, 2, 3, 4], documents)


@pytest.mark.parametrize(("tokens", "documents"), [([[1, 2]], [0]), ([0.5], [0]), ([1], [0.0]), ([1], 0)])
def test_shapes_and_types_are_checked_in_words(tokens, documents):
    with pytest.raises(ValueError, match="one row of integer"):
        document_spans("caller", tokens, documents)
