"""What `lmkern.patch` knows of transformers' models."""

from __future__ import annotations

from lmkern.huggingface.attention import register
from lmkern.huggingface.attention_modules import is_attention, swap_attention
from lmkern.huggingface.feed_forward import feeds_forward, swap_feed_forward
from lmkern.huggingface.loss import has_loss, swap_loss
from lmkern.huggingface.rms_norm import is_rms_norm, swap_rms_norm
from lmkern.patching import RULES, Rule

MODULE_RULES = [
    Rule("loss without logits", has_loss, swap_loss),
    Rule("attention", is_attention, swap_attention),
    Rule("RMS norm", is_rms_norm, swap_rms_norm),
    Rule("feed-forward", feeds_forward, swap_feed_forward),
]

register()
RULES[:0] = MODULE_RULES
