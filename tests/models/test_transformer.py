import inspect
import math

import pytest
import torch

from lmkern.models import PositionalEncoder, Transformer


def _model(**options):
    torch.manual_seed(0)
    arguments = {"input_dim": 40, "output_dim": 30, "hidden_dim": 16, "nhead": 4, "num_layers": 2, **options}
    return Transformer(**arguments)


def _tokens(batch=3, length=9):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


def test_signature_is_the_tutorials():
    parameters = inspect.signature(Transformer).parameters
    assert list(parameters) == ["input_dim", "output_dim", "hidden_dim", "nhead", "num_layers", "dropout"]
    assert parameters["dropout"].default == 0.1
    assert list(inspect.signature(PositionalEncoder).parameters) == ["d_model", "dropout"]


def test_gives_the_logits_after_the_last_token():
    model = _model().eval()
    tokens = _tokens()
    assert model(tokens).shape == (3, 30)
    torch.testing.assert_close(model(tokens), model.every_position(tokens)[:, -1])


def test_is_causal():
    model = _model().eval()
    tokens = _tokens()
    logits = model.every_position(tokens)
    tokens[:, 5] = (tokens[:, 5] + 1) % 40
    changed = model.every_position(tokens)
    torch.testing.assert_close(changed[:, :5], logits[:, :5], rtol=0, atol=0)
    assert (changed[:, 5:] - logits[:, 5:]).abs().amax(dim=-1).min() > 1e-4


def test_batch_is_the_first_dimension():
    model = _model().eval()
    tokens = _tokens()
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1])[0], model(tokens)[row])


def test_every_position_is_encoded_by_its_own_row():
    encoder = PositionalEncoder(6, 0.0)
    y = encoder(torch.zeros(2, 50, 6))
    for position in (0, 1, 49):
        for column in range(6):
            angle = position / 10000 ** (2 * (column // 2) / 6)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert y[1, position, column].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(y[0], y[1])


def test_tokens_and_positions_are_of_one_size():
    model = _model(hidden_dim=64)
    seen = []
    model.positional_encoder.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    model(_tokens())
    assert seen[0].std().item() == pytest.approx(1.0, abs=0.1)


def test_order_of_the_tokens_matters():
    # One layer: a second would tell the order from the causal mask alone.
    model = _model(num_layers=1).eval()
    tokens = _tokens()
    assert (model(tokens) - model(tokens[:, [1, 0, *range(2, 9)]])).abs().max() > 1e-4


def test_dropout_is_a_probability_and_not_a_width():
    model = _model(dropout=0.25)
    assert model.blocks[0].feed_forward.up.out_features == 64
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} - {0.0} == {0.25}
    assert not torch.equal(model(_tokens()), model(_tokens()))


def test_loss_falls_on_one_batch():
    model = _model(output_dim=40, dropout=0.0)
    tokens = _tokens(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 18}, "hidden_dim must be a multiple of nhead; got 18, 4"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"num_layers": True}, "num_layers must be int; got True"),
        ({"dropout": 64}, r"dropout must lie in \[0, 1\); got 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=f"Transformer: {message}"):
        _model(**options)


def test_bad_input_is_refused_in_words():
    with pytest.raises(
        TypeError, match=r"Transformer: tokens must be a torch.Tensor \(B, N\) int64; got list"
    ):
        _model()([1, 2])
    with pytest.raises(
        ValueError, match=r"Transformer: tokens must be \(B, N\) int64 with N at least 1; got \(2, 0\)"
    ):
        _model()(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"PositionalEncoder: x must be \(B, N, 6\); got \(1, 2, 5\)"):
        PositionalEncoder(6, 0.0)(torch.zeros(1, 2, 5))
