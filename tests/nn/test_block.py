import pytest
import torch
import torch.nn.functional as F

from lmkern.nn import Block, KeyValueCache, Rotary


def test_matches_torchs_pre_norm_layer():
    torch.manual_seed(0)
    ours = Block(12, 3, 20, activation="gelu", eps=1e-4).double().eval()
    theirs = torch.nn.TransformerEncoderLayer(
        12,
        3,
        20,
        activation=F.gelu,
        layer_norm_eps=1e-4,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    ).eval()
    names = {
        "attention_norm": "norm1",
        "attention.qkv.": "self_attn.in_proj_",
        "attention.out": "self_attn.out_proj",
        "feed_forward_norm": "norm2",
        "feed_forward.up": "linear1",
        "feed_forward.down": "linear2",
    }
    state = {}
    for name, tensor in ours.state_dict().items():
        (prefix,) = (p for p in names if name.startswith(p))
        state[name.replace(prefix, names[prefix])] = torch.randn_like(tensor).mul_(0.3)
        tensor.copy_(state[name.replace(prefix, names[prefix])])
    theirs.load_state_dict(state)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, src_mask=mask), rtol=1e-10, atol=1e-10)


def test_residual_stream_stays_float32_under_autocast():
    block = Block(16, 2, 32, rotary=Rotary(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 8, 16)).dtype == torch.float32


def test_cache_gives_what_the_whole_gives():
    torch.manual_seed(0)
    block = Block(16, 4, 32, kv_heads=2, rotary=Rotary(4, 9)).eval()
    x = torch.randn(2, 9, 16)
    cache = KeyValueCache(2, 9)
    with torch.inference_mode():
        pieces = [block(part, cache=cache) for part in x.split((4, 1, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), block(x))


@pytest.mark.parametrize("silent", ["attention.out", "feed_forward.down"])
def test_dropout_falls_on_what_a_half_adds_in_training_only(silent: str) -> None:
    torch.manual_seed(0)
    block = Block(64, 2, 64, dropout=0.5)
    for parameter in block.get_submodule(silent).parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 8, 64)
    assert 0.4 < (block(x) == x).float().mean() < 0.6
    assert (block.eval()(x) != x).float().mean() > 0.99


def test_what_a_block_does_not_have_is_refused_by_name():
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="Block: norm must be 'layer' or 'rms'; got 'batch'"):
        Block(8, 2, 16, norm="batch")
    with pytest.raises(ValueError, match="Block: a memory is for a block with cross=True"):
        Block(8, 2, 16)(x, memory=x)
