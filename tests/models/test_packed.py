"""Packed documents are read as if each were alone."""

import pytest
import torch
from torch import Tensor

from lmkern.models import GPT, Bert, BertConfig, GPTConfig, Llama, LlamaConfig
from lmkern.models.decoder import Decoder

SIZES = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32}
MODELS = {
    "rotary": lambda: GPT(GPTConfig(**SIZES)),
    "learned": lambda: GPT(GPTConfig(**SIZES, positions="learned")),
    "sinusoidal": lambda: GPT(GPTConfig(**SIZES, positions="sinusoidal")),
    "llama": lambda: Llama(LlamaConfig(**SIZES)),
}
# Together longer than the context; one of them empty, one as long as the context.
LENGTHS = (7, 1, 0, 24, 13)


def loud(model: Decoder) -> Decoder:
    """In float64, with weights so large that tokens of another document, or position, would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
    return model.double()


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """tokens and targets (1, N), and cu_seqlens."""
    tokens, targets = (torch.randint(61, (1, sum(LENGTHS))) for _ in range(2))
    return tokens, targets, torch.tensor((0, *LENGTHS)).cumsum(0)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return loud(MODELS[request.param]())


def test_logits_are_those_of_each_document_alone(model: Decoder) -> None:
    tokens, _, cu_seqlens = packed()
    alone = [model(document) for document in tokens.split(LENGTHS, dim=1) if document.numel()]
    for ends in (cu_seqlens, cu_seqlens.int()):
        together = model(tokens, cu_seqlens=ends)
        torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-11, atol=1e-11)
    assert (model(tokens[:, :24]) - together[:, :24])[:, 7:].abs().max() > 1e-2


def test_gradients_are_the_sum_of_each_document_alone(model: Decoder) -> None:
    tokens, targets, cu_seqlens = packed()
    parameters = list(model.parameters())
    loss = model.loss(tokens, targets, reduction="sum", cu_seqlens=cu_seqlens)
    pairs = zip(tokens.split(LENGTHS, dim=1), targets.split(LENGTHS, dim=1), strict=True)
    alone = sum(model.loss(x, y, reduction="sum") for x, y in pairs if x.numel())
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(each, parameters) for each in (loss, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_compiler_takes_them_whole() -> None:
    torch.manual_seed(0)
    model = loud(MODELS["rotary"]())
    tokens, targets, cu_seqlens = packed()
    torch.compiler.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, targets, cu_seqlens=cu_seqlens), model.loss(tokens, targets, cu_seqlens=cu_seqlens)
    )


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model = MODELS["llama"]()
    tokens, _, cu_seqlens = packed()
    with pytest.raises(ValueError, match=r"^Llama: .*one row, tokens \(1, N\), .*; got tokens \(2, 45\)$"):
        model(tokens.repeat(2, 1), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^Llama: .*without cache; got tokens \(1, 45\) and a cache$"):
        model(tokens, cu_seqlens=cu_seqlens, cache=model.new_cache(1))
    with pytest.raises(ValueError, match=r"^Llama: the context is 24 tokens; got a document of 45$"):
        model(tokens, cu_seqlens=torch.tensor((0, 45)))
    with pytest.raises(ValueError, match=r"^Llama: cu_seqlens must begin at 0, never fall and end at 45"):
        model(tokens, cu_seqlens=torch.tensor((0, 20)))
    with pytest.raises(ValueError, match=r"^Llama: cu_seqlens must be \(documents \+ 1,\) int32 or int64"):
        model(tokens, cu_seqlens=torch.tensor((0.0, 45.0)))
    x = torch.randn(1, 45, 32)
    with pytest.raises(ValueError, match=r"^SelfAttention: give a cache or cu_seqlens"):
        model.blocks[0](x, cu_seqlens=cu_seqlens, cache=model.new_cache(1).layers[0])


BERT = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 4, "width": 32, "labels": 3}


def bert(head: str) -> Bert:
    torch.manual_seed(0)
    return loud(Bert(BertConfig(**BERT, head=head)).eval())


@pytest.mark.parametrize("head", ["masked", "token", "sequence"])
def test_bert_reads_each_document_alone(head: str) -> None:
    model, (tokens, targets, _) = bert(head), packed()
    lengths = tuple(n for n in LENGTHS if n or head != "sequence")
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0)
    types = torch.randint(2, tokens.shape)
    if head == "sequence":
        targets = torch.tensor([0, 2, 1, 1])
        answers = targets.split(1)
    else:
        targets = targets % (61 if head == "masked" else 3)
        answers = targets.split(lengths, dim=1)
    documents = zip(tokens.split(lengths, 1), types.split(lengths, 1), answers, strict=True)
    alone = [(model(x, None, kind), model.loss(x, y, None, kind, reduction="sum"))
             for x, kind, y in documents if x.numel()]  # fmt: skip
    together = model(tokens, types=types, cu_seqlens=cu_seqlens)
    logits = torch.cat([each for each, _ in alone], 0 if head == "sequence" else 1)
    torch.testing.assert_close(together, logits, rtol=1e-11, atol=1e-11)
    parameters = list(model.parameters())
    loss = model.loss(tokens, targets, types=types, reduction="sum", cu_seqlens=cu_seqlens.int())
    ours, theirs = (
        torch.autograd.grad(each, parameters) for each in (loss, torch.stack([one for _, one in alone]).sum())
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_bert_refuses_what_makes_no_sense_by_name() -> None:
    model, (tokens, _, cu_seqlens) = bert("sequence"), packed()
    with pytest.raises(ValueError, match=r"^Bert: .*tokens \(1, N\), without mask; .*\(1, 45\) and a mask$"):
        model(tokens, tokens > 0, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^Bert: the context is 24 tokens; got a document of 25$"):
        model(tokens, cu_seqlens=torch.tensor([0, 20, 45]))
    with pytest.raises(ValueError, match=r"^Bert: the head 'sequence' .*; got an empty one, document 2 of 5"):
        model(tokens, cu_seqlens=cu_seqlens)
