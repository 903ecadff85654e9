"""`lmkern generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lmkern.cli.options import parse
from lmkern.cli.show import text_streams


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a run's model continue a prompt; the text appears as it is drawn.

    The same seed, model and options give the same text. It ends where the model ends the document, or at
    --max-new-tokens.

    example:
      lmkern generate runs/mine --prompt "The first" --max-new-tokens 100
      lmkern generate runs/mine --temperature 0 --prompt "def"
    """

    run_folder: Positional[Path]
    """The folder that `lmkern train` or `lmkern demo` wrote."""
    prompt: str = ""
    """What the text begins with. Default: nothing."""
    max_new_tokens: int = 200
    """Tokens to draw at most."""
    temperature: float = 0.8
    """Below 1 bolder towards the likely, above 1 more random, 0 always the likeliest."""
    top_k: int = 0
    """Draw from the k likeliest tokens only. 0: from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability. 1: from all."""
    seed: int = 0
    """Decides the draw."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are rounded to and computed in: half the memory with 16 bits, and less time where a
    processor multiplies them."""

    def run(self) -> int:
        """Print the prompt and its continuation."""
        from lmkern.jobs.steps import continue_text

        text_streams()
        pieces = continue_text(
            self.run_folder,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            dtype=self.dtype,
        )
        sys.stdout.write(self.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return "generation writes no files"


def command(argv: Sequence[str]) -> Generate:
    """The command line as a Generate."""
    return parse(Generate, "generate", argv)
