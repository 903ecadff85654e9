import copy
import math

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from lmkern.models import GPT, GPTConfig
from lmkern.nn import sinusoidal_positions

SIZES = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 4, "width": 32}
VARIANTS = {
    "rotary": {},
    "learned-bias": {"positions": "learned", "bias": True},
    "sinusoidal-swiglu": {"positions": "sinusoidal", "activation": "swiglu", "feed_forward": 48},
    "grouped-heads": {"kv_heads": 2},
    "one-kv-head": {"kv_heads": 1, "activation": "relu_squared"},
}


def _model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **options}))


def _loud(model):
    """Large random weights: at GPT-2's initial size, differences between positions hide in rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
    return model


def _tokens(batch=3, length=17):
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS, name="model")
def model_of_each_variant(request):
    return _model(**VARIANTS[request.param])


def test_tokens_to_logits_for_every_length(model):
    for length in (1, 5, 24):
        logits = model(_tokens(2, length))
        assert logits.shape == (2, length, 61)
        assert logits.dtype == torch.float32


def test_a_later_token_changes_no_earlier_logit(model):
    _loud(model)
    tokens = _tokens()
    logits = model(tokens)
    tokens[:, 9] = (tokens[:, 9] + 1) % 61
    changed = model(tokens)
    torch.testing.assert_close(changed[:, :9], logits[:, :9], rtol=0, atol=0)
    assert (changed[:, 9:] - logits[:, 9:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_the_tokens_matters(variant):
    # One layer: a second would tell the order from the causal mask alone.
    model = _loud(_model(**VARIANTS[variant], layers=1))
    tokens = _tokens()
    swapped = tokens[:, [1, 0, *range(2, 17)]]
    assert (model(swapped)[:, 2:] - model(tokens)[:, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [(1,) * 17, (9, 1, 1, 6), (17,)])
def test_logits_through_the_cache_are_those_of_the_whole(model, pieces):
    _loud(model)
    tokens = _tokens()
    cache = model.new_cache(3)
    assert cache.length == 0
    with torch.inference_mode():
        logits = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == 17


def test_initial_loss_is_that_of_a_guess(model):
    tokens = _tokens(8, 24)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(61), abs=0.15)


def test_loss_falls_on_one_batch(model):
    tokens = _tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * math.log(61)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = _loud(_model())
    tokens, targets = _tokens(), _tokens(3, 17).flip(1)
    targets[0, :5] = -100
    log_probs = model(tokens).double().log_softmax(-1)
    counted = targets != -100
    each = -log_probs[counted].gather(-1, targets[counted][:, None])
    loss = model.loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-5)
    assert model.loss(tokens, targets, reduction="sum").item() == pytest.approx(each.sum().item(), rel=1e-5)


def test_head_and_embedding_are_one_parameter():
    model = _model()
    for tied in (model, copy.deepcopy(model), _model().to(torch.bfloat16)):
        assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.state_dict().values())
    model(_tokens()).sum().backward()
    assert model.head.weight.grad is model.embedding.weight.grad


def test_head_and_embedding_stay_one_parameter_from_meta_and_where_parameters_are_replaced():
    model, outer = _model(), torch.nn.ModuleDict({"inner": _model().to("meta")})
    outer.to_empty(device="cpu")
    empty = outer["inner"]
    assert empty.head.weight is empty.embedding.weight
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(_tokens()), model(_tokens()), rtol=0, atol=0)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.head.weight is model.embedding.weight


def test_a_state_dict_of_parameters_has_them_by_every_name():
    model = _model()
    state = model.state_dict(keep_vars=True)
    assert state["head.weight"] is state["embedding.weight"] is model.embedding.weight
    model.load_state_dict(state)


def test_a_head_that_is_parametrized_is_tied_no_more():
    model = _model()
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", torch.nn.Identity())
    model.double().load_state_dict(model.state_dict())
    assert "head.parametrizations.weight.original" in model.state_dict()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_tied_model_is_cut_into_a_pipeline():
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    model, tokens = _model().eval(), _tokens()
    cut = {"blocks.1": pipelining.SplitPoint.BEGINNING}
    pipe = pipelining.pipeline(model, mb_args=(tokens,), split_spec=cut)
    assert pipe.num_stages == 2
    torch.testing.assert_close(pipe(tokens)[0], model(tokens))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_holds_the_tied_matrix_once_and_loads_strictly(assign):
    model, other = _loud(_model()), _model()
    state = model.state_dict()
    assert "head.weight" not in state
    assert not other.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign).missing_keys
    assert other.head.weight is other.embedding.weight
    torch.testing.assert_close(other(_tokens()), model(_tokens()), rtol=0, atol=0)


def test_untied_weights_are_refused():
    model = _model()
    state = model.state_dict()
    state["head.weight"] = state["embedding.weight"] + 1
    with pytest.raises(ValueError, match=r"GPT: head\.weight and embedding\.weight are one matrix here"):
        model.load_state_dict(state)


def test_state_dict_holds_the_tied_matrix_once_inside_another_module():
    outer = torch.nn.ModuleDict({"inner": _model()})
    assert "inner.head.weight" not in outer.state_dict()
    outer.load_state_dict(outer.state_dict())


def test_a_head_of_ones_own_is_saved_and_stays() -> None:
    model, other = _loud(_model()), _model()
    for each in (model, other):
        each.head.weight = torch.nn.Parameter(torch.randn_like(each.embedding.weight))
    state = model.state_dict()
    assert not torch.equal(state["head.weight"], state["embedding.weight"])
    other.load_state_dict(state)
    assert other.head.weight is not other.embedding.weight
    torch.testing.assert_close(other(_tokens()), model(_tokens()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: torch.nn.Sequential(head),
        lambda head: torch.nn.Identity(),
        lambda head: prune.l1_unstructured(head, "weight", 0.5),
        parametrizations.weight_norm,
    ],
)
def test_a_changed_head_has_a_state_dict_that_loads(change) -> None:
    models = []
    for _ in range(2):
        models.append(_model())
        models[-1].head = change(models[-1].head)
    model, other = models
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())


def test_initialisation_is_gpt2s_and_repeats():
    model = _model(width=128, layers=8, bias=True, positions="learned")
    again = _model(width=128, layers=8, bias=True, positions="learned")
    for (name, parameter), repeated in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, repeated)
        if parameter.dim() == 1:
            assert (parameter == float("norm.weight" in name)).all(), name
        else:
            residual = name.endswith(("out.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.1), name


def test_flops_count_every_product_once():
    model = _model(kv_heads=2, positions="learned", activation="swiglu", feed_forward=48)
    block = 32 * (32 + 2 * 16) + 32 * 32 + 32 * 96 + 48 * 32
    products = 2 * block + 61 * 32
    assert model.flops_per_token(24) == 6 * products + 12 * 2 * 32 * 24 / 2


def _stream(model, tokens):
    """What enters the first block, (B, N, E)."""
    seen = []
    with model.blocks[0].register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0])):
        model(tokens)
    return seen[0].detach()


def test_dropout_acts_in_training_only():
    model = _loud(_model(dropout=0.3))
    tokens = _tokens()
    assert 0.2 < (_stream(model, tokens) == 0).float().mean() < 0.4
    model.eval()
    assert (_stream(model, tokens) != 0).all()
    assert torch.equal(model(tokens), model(tokens))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} - {0.0} == {0.3}


def test_sinusoidal_positions_do_not_drown_the_tokens():
    model = _model(positions="sinusoidal", width=256)
    table = sinusoidal_positions(24, 256)
    assert (_stream(model, _tokens(4, 24)) - table).std() > 0.3 * table.std()


def test_eps_reaches_every_norm():
    norms = [m for m in _model(eps=0.25).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.25] * 5


def test_loss_of_a_bfloat16_model_is_float32():
    tokens = _tokens()
    assert _model().bfloat16().loss(tokens, tokens).dtype == torch.float32


def test_bfloat16_autocast_is_near_float32_with_float32_gradients(model):
    tokens = _tokens(4, 24)
    expected = model.loss(tokens[:, :-1], tokens[:, 1:])
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 33}, "width must be a multiple of heads; got width 33, heads 4"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads; got heads 4, kv_heads 3"),
        ({"width": 36}, r"rotary positions need an even head_dim \(width / heads\); got 9"),
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"heads": 0}, "heads must be at least 1; got 0"),
        ({"kv_heads": -1}, "kv_heads must be at least 0; got -1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"eps": 0.0}, "eps must be positive; got 0.0"),
        ({"layers": True}, "layers must be int; got True"),
        ({"kv_heads": False}, "kv_heads must be int; got False"),
        ({"dropout": False}, "dropout must be float; got False"),
        ({"positions": "alibi"}, "positions must be one of rotary, learned, sinusoidal; got 'alibi'"),
        ({"activation": "tanh"}, "activation must be one of gelu, .*; got 'tanh'"),
    ],
)
def test_config_that_does_not_fit_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=f"GPTConfig: {message}"):
        GPTConfig(**{**SIZES, **options})


def test_what_is_no_config_is_refused_in_words():
    with pytest.raises(TypeError, match=r"GPT: config must be a GPTConfig; got list\. Give GPT\(GPTConfig"):
        GPT([1, 2])


def test_bad_tokens_are_refused_in_words():
    model = _model()
    with pytest.raises(ValueError, match=r"GPT: tokens must be \(B, N\) int64; got \(5,\) torch.int64"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"GPT: tokens must be \(B, N\) int64; got \(1, 5\) torch.float32"):
        model(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="GPT: the context is 24 tokens; got 25, and 0 in the cache"):
        model(_tokens(1, 25))
    with pytest.raises(ValueError, match=r"GPT.loss: targets must be int64 of tokens' shape \(3, 17\)"):
        model.loss(_tokens(), _tokens(3, 16))
    with pytest.raises(
        TypeError, match=r"GPT: tokens must be a torch.Tensor \(B, N\) int64; got list\. Give "
    ):
        model([1, 2])
    for tokens, targets, what in (([1], _tokens(), "tokens"), (_tokens(), [1], "targets")):
        with pytest.raises(TypeError, match=rf"GPT.loss: {what} must be a torch.Tensor.*; got list"):
            model.loss(tokens, targets)
    with pytest.raises(IndexError, match=r"tokens must lie in \[0, 61\); got 61 to 61"):
        model(torch.full((1, 1), 61))


def test_a_cache_that_does_not_fit_is_refused_and_unchanged():
    model = _model()
    cache = model.new_cache(2)
    with torch.inference_mode():
        model(_tokens(2, 20), cache=cache)
        with pytest.raises(ValueError, match="GPT: the context is 24 tokens; got 5, and 20 in the cache"):
            model(_tokens(2, 5), cache=cache)
        with pytest.raises(ValueError, match="GPT: the cache is for a batch of 2"):
            model(_tokens(3, 1), cache=cache)
        assert cache.length == 20
        model(_tokens(2, 4), cache=cache)
    with pytest.raises(ValueError, match=r"GPT\.new_cache: batch must be at least 1; got 0"):
        model.new_cache(0)
