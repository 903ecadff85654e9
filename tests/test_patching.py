from unittest.mock import Mock

import pytest
import torch
from torch import nn

import lmkern
import lmkern.nn
from lmkern.patching import RULES, Rule


class Model(nn.Module):
    """A model of its own around torch's modules, with tied weights, a hook and a norm of its own kind."""

    def __init__(self):
        super().__init__()

        class ScaledNorm(nn.LayerNorm):
            def forward(self, input):
                return 2 * super().forward(input)

        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.scaled = ScaledNorm(8)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.scaled(self.encoder(self.embedding(tokens)))))


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])


def _step(model, optimizer):
    loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_swaps_what_it_knows_and_says_what_it_leaves_and_why(capsys):
    model = Model()
    done = lmkern.patch(model)
    assert type(model.encoder) is lmkern.nn.TransformerEncoder
    assert type(model.encoder.layers[1].self_attn) is lmkern.nn.MultiheadAttention
    assert type(model.norm) is lmkern.nn.RMSNorm
    assert type(model.encoder.layers[1].linear2) is type(model.head) is lmkern.nn.Linear
    assert done.swapped["embedding"] == "Embedding"
    assert set(done.left) == {"scaled"}
    printed = capsys.readouterr().out
    assert "LayerNorm x 4" in printed
    assert "left scaled: ScaledNorm is a subclass of torch.nn.LayerNorm" in printed


def test_linear_maps_take_few_rows_with_their_own_parameters_and_hooks(monkeypatch):
    from lmkern.kernels.linear import cpu

    calls = []
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(args) or nn.functional.linear(*args))
    linear, seen = nn.Linear(4, 3), []
    linear.register_forward_hook(lambda *_: seen.append("hook"))
    weight, x = linear.weight, torch.randn(2, 4)
    expected = linear(x)
    done = lmkern.patch(linear, verbose=False)
    assert done.swapped == {"": "Linear"} and linear.weight is weight
    linear(x).sum().backward()
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
    assert len(calls) == 1 and len(seen) == 3
    done.undo()
    assert type(linear) is nn.Linear


def test_linear_maps_that_are_more_or_elsewhere_are_left():
    class Adapter(nn.Linear):
        pass

    model = nn.Sequential(Adapter(2, 3), nn.Linear(3, 3))
    # As if it lay on a GPU.
    model[1]._parameters["weight"] = Mock(device=torch.device("cuda"))
    done = lmkern.patch(model, verbose=False)
    assert not done.swapped
    assert done.left == {
        "0": "Adapter is a subclass of torch.nn.Linear and may compute something else",
        "1": "on cuda torch's own product serves",
    }


def test_only_modules_are_patched():
    with pytest.raises(TypeError, match=r"patch: expected a torch\.nn\.Module; got int"):
        lmkern.patch(3)


def test_quiet(capsys):
    lmkern.patch(Model(), verbose=False)
    assert capsys.readouterr().out == ""


def test_parameters_hooks_and_modes_stay_the_very_same():
    model = Model().eval()
    model.norm.train()
    seen = []
    model.encoder.layers[0].norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    lmkern.patch(model, verbose=False)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert model.head.weight is model.embedding.weight
    assert (model.norm.training, model.encoder.training) == (True, False)
    model(TOKENS)
    assert seen == ["norm1"]


def test_an_optimizer_made_before_trains_the_patched_model_as_the_original():
    torch.manual_seed(0)
    ours = Model()
    theirs = Model()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    lmkern.patch(ours, verbose=False)
    for _ in range(3):
        losses = [_step(*each) for each in zip((ours, theirs), optimizers, strict=True)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_undo_gives_the_original_bits_and_can_be_repeated():
    model = Model()
    types = [type(module) for module in model.modules()]
    expected = model(TOKENS)
    done = lmkern.patch(model, verbose=False)
    again = lmkern.patch(model, verbose=False)
    assert not again.swapped
    again.undo()
    assert type(model.norm) is lmkern.nn.RMSNorm
    done.undo()
    done.undo()
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model(TOKENS), expected)
    assert lmkern.patch(model, verbose=False).swapped == done.swapped


def test_a_rule_that_raises_leaves_everything_as_it_was(monkeypatch):
    def replace(module):
        raise RuntimeError("no")

    of_the_last = Rule("Linear", lambda module: module is model.head, replace)
    monkeypatch.setattr("lmkern.patching.RULES", [of_the_last, *RULES])
    model = Model()
    with pytest.raises(RuntimeError, match="no"):
        lmkern.patch(model, verbose=False)
    assert type(model.encoder) is nn.TransformerEncoder


def test_the_first_rule_that_matches_decides(monkeypatch):
    first = Rule("norms", lambda module: isinstance(module, nn.LayerNorm), lambda module: "not today")
    monkeypatch.setattr("lmkern.patching.RULES", [first, *RULES])
    done = lmkern.patch(Model(), verbose=False)
    assert done.left["encoder.layers.0.norm1"] == "not today"
    assert "encoder.layers.0.self_attn" in done.swapped


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_padded_inference_through_a_torch_encoder_that_hands_on_nested_tensors():
    class Encoder(nn.TransformerEncoder):
        pass

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = Encoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        done = lmkern.patch(encoder, verbose=False)
        assert "" in done.left
        y = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y, expected)
