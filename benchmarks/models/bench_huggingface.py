"""A training step of transformers' models, patched by lmkern, beside transformers' default (SDPA).

    python benchmarks/models/bench_huggingface.py gpt2 [--dropout 0.1] [--steps 5]
    python benchmarks/models/bench_huggingface.py gpt2 --memory ours     (or theirs: a process for each)

Random weights, new text each step, bf16 autocast, forward, backward and optimizer. Theirs: torch.optim.AdamW.
Ours: lmkern's, or --optimizer torch. The steps alternate in one process, and both live in one allocator, that
keeps freed memory (lmkern.memory); --memory leaves it as it is.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import torch

import lmkern
from lmkern.memory import keep_freed_memory
from lmkern.training.optimizer import AdamW

# bert-base-uncased's [MASK].
_BERT_MASK = 103


def make(name: str, dropout: float) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout))
    if name == "bert":
        return t.BertForMaskedLM(
            t.BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        )
    return t.T5ForConditionalGeneration(t.T5Config(dropout_rate=dropout, decoder_start_token_id=0))


def batch(name: str, step: int) -> dict[str, torch.Tensor]:
    """New text each step: Python's language reference, a token a byte."""
    from pydoc_data.topics import topics

    text = torch.tensor(list("\n".join(topics.values()).encode()))
    rows, columns = {"gpt2": (4, 1024), "bert": (8, 512), "t5": (8, 640)}[name]
    places = torch.arange(step * rows * columns, (step + 1) * rows * columns) % text.numel()
    tokens = text[places].view(rows, columns)
    if name == "gpt2":
        return {"input_ids": tokens, "labels": tokens}
    if name == "bert":
        hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.15
        return {
            "input_ids": tokens.masked_fill(hidden, _BERT_MASK),
            "labels": tokens.masked_fill(~hidden, -100),
        }
    return {"input_ids": tokens[:, :512].contiguous(), "labels": tokens[:, 512:].contiguous()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gpt2", "bert", "t5"))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optimizer", choices=("lmkern", "torch"), default="lmkern", help="of our side")
    parser.add_argument("--memory", choices=("ours", "theirs"))
    arguments = parser.parse_args()
    sides = [arguments.memory] if arguments.memory else ["theirs", "ours"]
    if not arguments.memory:
        keep_freed_memory()
    runs: dict[str, Any] = {}
    for side in sides:
        model = make(arguments.model, arguments.dropout)
        model.train()
        if side == "ours":
            lmkern.patch(model)
        ours = side == "ours" and arguments.optimizer == "lmkern"
        optimizer: Any = (AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=1e-4)
        runs[side] = model, optimizer
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for step in range(arguments.steps + 1):
        inputs = batch(arguments.model, step)
        for side, (model, optimizer) in runs.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times[side].append(time.perf_counter() - start)
            losses[side].append(loss.item())
            print(f"step {step} {side}: loss {loss.item():.4f}, {times[side][-1]:.2f} s", flush=True)
    medians = {side: statistics.median(seconds[1:] or seconds) for side, seconds in times.items()}
    if len(medians) == 2:
        print(
            f"{arguments.model}, dropout {arguments.dropout}: "
            f"{medians['theirs'] / medians['ours']:.2f} times as fast, losses within "
            f"{max(abs(a - b) for a, b in zip(losses['theirs'], losses['ours'], strict=True)):.1e}"
        )
    print(f"peak resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
