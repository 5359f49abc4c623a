"""A tiny T5 tokenizer and a randomly initialised encoder, saved the way real ones are."""

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
# One neighbour per head; T5 gives every distance below 8 a bucket of its own.
OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
BUCKETS = 32


def _bucket(offset: int) -> int:
    """Index of T5's bidirectional position bucket of a key `offset` tokens after the query, |offset| < 8."""
    return abs(offset) + (BUCKETS // 2 if offset > 0 else 0)


def _initialise(model: T5EncoderModel, generator: torch.Generator) -> None:
    """Fill the weights so that each output token tells its own word and, per head, one neighbour's.

    Each block adds its attention to the word's embedding; the final norm brings the sum to unit RMS.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        elif "relative_attention_bias" in name:
            weight.zero_()
            for head, offset in enumerate(OFFSETS):
                # At weight e^8 the neighbour outvotes any number of tokens that a caption has.
                weight[_bucket(offset), head] = 8.0
        else:
            if "shared" in name or "embed_tokens" in name:
                scale = 1.0
            elif name.endswith((".q.weight", ".k.weight")):
                # T5 does not scale its logits: content must stay small beside the position bias.
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
    """Save in `folder` a tokenizer with one token per word of `captions` and an encoder `d_model` wide.

    Ids are 0 pad, 1 end, 2 unknown, then the words in order; the same arguments give the same bytes.
    `max_tokens` is the length that the tokenizer truncates to, its end token included.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    if not counts:
        raise ValueError("build_tiny_t5: the captions hold no word")
    vocab = [(token, 0.0) for token in SPECIAL]
    vocab += [(f"▁{word}", math.log(counts[word] / counts.total())) for word in sorted(counts)]
    # The default of 100 extra ids would grow the vocabulary, and an unset length reloads as 1e30.
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
    # Building the model draws from the global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = T5EncoderModel(config).float().eval()
        _initialise(model, torch.Generator().manual_seed(seed))

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
