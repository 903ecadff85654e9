"""The loss is that of what the head says, whatever stands in the head's place."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.models import GPT, T5, Bert, BertConfig, GPTConfig, T5Config


class Adapted(nn.Linear):
    """A head with something added, as adapters have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


MODELS = {
    "gpt": lambda: GPT(GPTConfig(vocab_size=11, context=8, layers=1, heads=2, width=8)),
    "t5": lambda: T5(T5Config(vocab_size=11, layers=1, heads=2, width=8)),
    "bert": lambda: Bert(BertConfig(vocab_size=11, context=8, layers=1, heads=2, width=8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_head(name: str) -> None:
    torch.manual_seed(0)
    model, heard = MODELS[name]().eval(), []
    model.head.register_forward_hook(lambda *seen: heard.append(seen[0]))
    tokens = torch.randint(1, 11, (2, 5))
    second = (model.shift_right(tokens),) if name == "t5" else ()
    for cls in (nn.Linear, Adapted):
        model.head.__class__ = cls
        heard.clear()
        loss = model.loss(tokens, tokens)
        assert heard == [model.head]
        torch.testing.assert_close(
            loss, F.cross_entropy(model(tokens, *second).flatten(0, 1), tokens.flatten())
        )
