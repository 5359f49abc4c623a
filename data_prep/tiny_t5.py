"""A tiny T5 tokenizer and a randomly initialized T5 encoder, saved in the same format as published ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils.logging import disable_progress_bar

SPECIAL = ("<pad>", "</s>", "<unk>")
HEADS = 8
# Each head attends to one neighbor; in T5 every distance below 8 has its own bucket.
OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
BUCKETS = 32


def _bucket(offset: int) -> int:
    """Return T5's bidirectional position bucket of a key ``offset`` tokens after the query, |offset| < 8."""
    return abs(offset) + (BUCKETS // 2 if offset > 0 else 0)


def _initialize(model: T5EncoderModel, generator: torch.Generator) -> None:
    """Initialize the weights so that each output token encodes its own word and, per head, that of one neighbor.

    Each block adds its attention output to the word's embedding; the final norm scales the sum to unit RMS.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        elif "relative_attention_bias" in name:
            weight.zero_()
            for head, offset in enumerate(OFFSETS):
                # With weight e^8, the neighbor dominates all other tokens of a caption.
                weight[_bucket(offset), head] = 8.0
        else:
            if "shared" in name or "embed_tokens" in name:
                scale = 1.0
            elif name.endswith((".q.weight", ".k.weight")):
                # T5 does not scale its logits, so the content term must be small compared with the position bias.
                scale = 0.1 / math.sqrt(weight.shape[1])
            else:
                scale = 1.0 / math.sqrt(weight.shape[1])
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def build_tiny_t5(
    folder: Path,
    captions: Iterable[str],
    seed: int,
    d_model: int = 64,
    layers: int = 1,
    max_tokens: int = 24,
) -> None:
    """Save a tokenizer with one token per word of ``captions`` and an encoder of width ``d_model`` in ``folder``.

    The ids are 0 pad, 1 end, 2 unknown, then the words in sorted order. The same arguments give identical files.
    The tokenizer truncates to ``max_tokens``, including its end token.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    if not counts:
        raise ValueError("build_tiny_t5: the captions contain no words")
    vocab = [(token, 0.0) for token in SPECIAL]
    vocab += [(f"▁{word}", math.log(counts[word] / counts.total())) for word in sorted(counts)]
    # The default of 100 extra ids would enlarge the vocabulary, and an unset length is loaded as 1e30.
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_tokens)

    config = T5Config(
        vocab_size=len(vocab),
        d_model=d_model,
        d_kv=max(1, d_model // HEADS),
        d_ff=2 * d_model,
        num_layers=layers,
        num_heads=HEADS,
        relative_attention_num_buckets=BUCKETS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    # Constructing the model would otherwise advance the caller's global random generator.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = T5EncoderModel(config).float().eval()
        _initialize(model, torch.Generator().manual_seed(seed))

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
