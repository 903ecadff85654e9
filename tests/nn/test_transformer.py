import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lmkern.nn

WIDTH, HEADS, HIDDEN = 16, 2, 24


def _layer(**options):
    torch.manual_seed(0)
    return lmkern.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, **options)


def _transformer(**options):
    torch.manual_seed(0)
    return lmkern.nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, batch_first=True, **options)


def _padding(*lengths):
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    "name",
    [
        "Transformer",
        "TransformerDecoder",
        "TransformerDecoderLayer",
        "TransformerEncoder",
        "TransformerEncoderLayer",
    ],
)
def test_constructors_take_torchs_arguments(name):
    ours, theirs = getattr(lmkern.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    expected = inspect.signature(theirs.__init__).parameters
    assert list(inspect.signature(ours.__init__).parameters) == list(expected)


def test_starts_as_torchs_does_and_loads_both_ways():
    torch.manual_seed(0)
    theirs = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, batch_first=True)
    torch.manual_seed(0)
    ours = lmkern.nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, batch_first=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())
    assert all(type(module).__module__.startswith("lmkern") for module in ours.encoder.layers)
    assert type(ours.decoder.layers[0].multihead_attn) is lmkern.nn.MultiheadAttention


def test_what_the_caller_gives_stays_as_it_is():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True), 1)
    model = lmkern.nn.Transformer(WIDTH, HEADS, 1, 1, custom_encoder=encoder, batch_first=True)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.decoder) is lmkern.nn.TransformerDecoder


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
def test_inference_with_padding_is_torchs_at_the_tokens(norm_first):
    ours = lmkern.nn.TransformerEncoder(_layer(norm_first=norm_first), 2).eval()
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=norm_first),
        2,
        enable_nested_tensor=not norm_first,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, padding = torch.randn(3, 6, WIDTH), _padding(6, 2, 4)
    with torch.no_grad():
        y, expected = (module(x, src_key_padding_mask=padding) for module in (ours, theirs))
    torch.testing.assert_close(y[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_sequences_are_those_alone_and_take_no_masks(layout):
    layer, rows = _layer().eval(), [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    y = layer(nested)
    assert y.layout is layout
    for ours, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(ours, layer(row))
    for mask in ({"src_mask": torch.zeros(5, 5)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="nested sequences take no src_mask"):
            layer(nested, **mask)
    with pytest.raises(ValueError, match="nested sequences need batch_first=True"):
        lmkern.nn.TransformerEncoderLayer(WIDTH, HEADS)(nested)


def test_sequence_of_padding_alone_is_finite_and_so_are_its_gradients():
    layer = _layer(dropout=0.0)
    x = torch.randn(2, 4, WIDTH, requires_grad=True)
    padding = torch.tensor([[True] * 4, [False] * 4])
    attended = layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    assert torch.equal(attended[0], layer.self_attn.out_proj.bias.expand(4, WIDTH))
    y = layer(x, src_key_padding_mask=padding)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()


def test_dropout_falls_in_training_only_and_repeats_with_the_seed():
    model = _transformer(dropout=0.3)
    src, tgt = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(src, tgt))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_each_dropout_is_applied(name, norm_first):
    layer = _layer(dropout=0.0, norm_first=norm_first)
    x = torch.randn(2, 4, WIDTH)
    expected = layer(x)
    getattr(layer, name).p = 0.5
    assert not torch.allclose(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), expected)


def test_hooks_inside_a_layer_are_called():
    layer = _layer(dropout=0.0)
    x, seen = torch.randn(2, 4, WIDTH), []
    expected = layer(x)
    for name in ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout1", "dropout2"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(layer(x), expected)
    assert sorted(seen) == sorted(
        ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout1", "dropout2"]
    )


def test_norms_may_be_of_another_kind():
    layer = _layer(dropout=0.0, norm_first=True)
    layer.norm1 = layer.norm2 = lmkern.nn.RMSNorm(WIDTH)
    x = torch.randn(2, 4, WIDTH)
    h = x + layer.self_attn(*(layer.norm1(x),) * 3, need_weights=False)[0]
    expected = h + layer.linear2(layer.linear1(layer.norm2(h)).relu())
    torch.testing.assert_close(layer(x), expected)


def test_state_dict_that_does_not_fit_is_listed_and_nothing_is_loaded():
    model = _layer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in before.items()}
    given["linear1.weight"] = torch.zeros(3, WIDTH)
    del given["norm1.weight"]
    given["norm9.weight"] = torch.zeros(WIDTH)
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(given)
    text = str(raised.value)
    assert "TransformerEncoderLayer.load_state_dict: nothing was loaded" in text
    for line in ("linear1.weight: (24, 16) | (3, 16)", "norm1.weight: (16,) | -", "norm9.weight: - | (16,)"):
        assert line in text
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    del given["linear1.weight"]
    assert model.load_state_dict(given, strict=False).unexpected_keys == ["norm9.weight"]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"src_mask": torch.zeros(3, 4)}, r"attn_mask must be \(4, 4\) or \(4, 4, 4\); got \(3, 4\)"),
        ({"src_key_padding_mask": torch.zeros(2, 3)}, r"key_padding_mask must be \(2, 4\); got \(2, 3\)"),
        ({"src_mask": torch.zeros(4, 4, dtype=torch.int32)}, "boolean .* got torch.int32"),
    ],
)
def test_masks_that_do_not_fit_are_named(masks, message):
    with pytest.raises(ValueError, match=message):
        _layer()(torch.zeros(2, 4, WIDTH), **masks)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_stacks_name_a_mask_of_whole_numbers(dtype):
    mask, x = torch.zeros(4, 4, dtype=dtype), torch.zeros(2, 4, WIDTH)
    for masks in ({"src_mask": mask}, {"tgt_mask": mask}):
        with pytest.raises(ValueError, match=f"attn_mask must be boolean .* got {dtype}"):
            _transformer()(x, x, **masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast_keeps_the_residual_stream_wide(dtype, norm_first):
    layer = _layer(dropout=0.0, norm_first=norm_first)
    torchs = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    torchs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y, torchs_y = layer(x), torchs(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    exact, ours, theirs = (
        torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        for module, out in ((layer, expected), (layer, y), (torchs, torchs_y))
    )
    assert all(gradient.dtype == torch.float32 for gradient in ours)
    # Where terms cancel, 16 bits may leave little of a gradient: torch's layer is the measure.
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        assert (one - wanted).norm() <= 2 * (other - wanted).norm() + 1e-2


def test_activation_checkpointing_gives_the_same_gradients_with_dropout():
    layer = _layer(dropout=0.2)
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    gradients = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(call(x).square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_inductor_compiles_it_whole_and_once_for_every_batch():
    torch.compiler.reset()
    model = _transformer(dropout=0.0)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for batch in (3, 2, 5):
        src, tgt = torch.randn(batch, 6, WIDTH), torch.randn(batch, 5, WIDTH)
        padding = torch.zeros(batch, 6, dtype=torch.bool)
        padding[0, 4:] = True
        for tensor in (src, tgt, padding):
            torch._dynamo.mark_dynamic(tensor, 0)
        options = {"tgt_mask": mask, "tgt_is_causal": True, "src_key_padding_mask": padding}
        results = []
        for module in (compiled, model):
            y = module(src, tgt, **options)
            results.append((y, torch.autograd.grad(y.square().sum(), list(model.parameters()))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_exports_the_inference_forward():
    model = _transformer().eval()
    src, tgt = torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)
    padding = _padding(6, 4)
    options = {"tgt_is_causal": True, "memory_key_padding_mask": padding}
    with torch.no_grad():
        exported = torch.export.export(model, (src, tgt), options)
        torch.testing.assert_close(exported.module()(src, tgt, **options), model(src, tgt, **options))


def test_vmap_maps_the_forward():
    layer = _layer(dropout=0.0, norm_first=True)
    x = torch.randn(3, 2, 4, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))
