"""transformers' models on lmkern's kernels: `attn_implementation="lmkern"`, and the rules for `lmkern.patch`.

Importing this package registers "lmkern" in transformers' registries of attentions and of masks, and adds the
rules for its modules to `lmkern.patching.RULES`.
"""

from lmkern.huggingface.attention import NAME, lmkern_attention, lmkern_mask, register
from lmkern.huggingface.patches import MODULE_RULES

__all__ = ["MODULE_RULES", "NAME", "lmkern_attention", "lmkern_mask", "register"]
