import pytest
import torch

from lmkern.nn import Embedding


def test_gives_rows_of_the_weight():
    embedding = Embedding(5, 3)
    tokens = torch.tensor([[4, 0], [2, 2]])
    torch.testing.assert_close(embedding(tokens), embedding.weight[tokens], rtol=0, atol=0)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_without_a_row_is_named(token):
    with pytest.raises(IndexError, match=rf"Embedding: tokens must lie in \[0, 5\); got .*{token}"):
        Embedding(5, 3)(torch.tensor([[2, token]]))


def test_nested_tokens_are_torchs():
    embedding = Embedding(5, 3)
    rows = [torch.tensor([4, 0]), torch.tensor([1, 2, 2])]
    nested = embedding(torch.nested.nested_tensor(rows, layout=torch.jagged))
    for ours, row in zip(nested.unbind(), rows, strict=True):
        torch.testing.assert_close(ours, embedding(row))
