"""T5 tokenizers, from a ``tokenizer.json`` or from the ``spiece.model`` of Google's T5 and PixArt-α's pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_dit.data.hub import T5, Source, loading, read_json
from megatron_dit.runtime.content import content_of
from megatron_dit.runtime.errors import UserError

FAST, PIECES = "tokenizer.json", "spiece.model"


class _Backend(Protocol):
    vocabulary: int  # vocabulary size; ids are below it

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Return each caption's ids, ending with T5's end token and truncated to the maximum given on construction."""
        ...


class Tokenizer:
    """Converts captions to token ids. ``path`` is the file that the tokenizer was read from."""

    def __init__(self, path: Path, backend: _Backend) -> None:
        self.path, self._backend = path, backend

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        # Captions from JSON may contain lone surrogates, which neither library accepts.
        return self._backend.encode([text.encode("utf-8", "replace").decode() for text in captions])

    def check(self, name: str, config: Any) -> None:
        """Raise UserError unless the ids are those of a T5 of ``config``."""
        if self._backend.vocabulary > config.vocab_size:
            raise UserError(
                f"text encoder {name} has embeddings of {config.vocab_size:,} tokens, but {self.path} has "
                f"{self._backend.vocabulary:,} tokens; use the tokenizer that belongs to the encoder"
            )
        (empty,) = self.encode([""])
        if empty != [config.eos_token_id]:
            raise UserError(
                f"{self.path} encodes an empty caption as {empty}, expected T5's end token {config.eos_token_id}; it "
                "belongs to another model, use T5's tokenizer"
            )


class _Fast:
    """Tokenizer from a ``tokenizer.json``, which describes it completely."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer as Library

        self._tokenizer = Library.from_file(str(path))
        # The file may contain the padding settings of the program that saved it.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(captions))]


class _SentencePiece:
    """Tokenizer from a ``spiece.model``. transformers' conversion of it gives different ids for some Unicode text."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces: Any = SentencePieceProcessor(model_file=str(path))
        self._most = max_tokens - 1
        self.vocabulary: int = self._pieces.vocab_size()

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        end = self._pieces.eos_id()
        return [[*ids[: self._most], end] for ids in self._pieces.encode(list(captions))]


def open_tokenizer(source: Source, max_tokens: int) -> Tokenizer:
    """Open the tokenizer of a text encoder.

    It is searched for in the encoder's folder and, in a pipeline, in the corresponding tokenizer folder
    (``tokenizer_3`` for ``text_encoder_3``). Raise UserError if there is none that can be read.
    """
    places = [source]
    if source.last.startswith("text_encoder"):
        places.append(source.sibling(source.last.replace("text_encoder", "tokenizer", 1)))
    with loading(T5, source.name):
        for place in places:
            for name, kind in ((FAST, _Fast), (PIECES, _SentencePiece)):
                path = place.file(name)
                if path is not None:
                    return Tokenizer(path, _read(path, kind, max_tokens))
    folders = " or ".join(place.name for place in places)
    raise UserError(
        f"text encoder {source.name} has no tokenizer ({FAST} or {PIECES} in {folders}); give a folder that has one, "
        "such as that of the complete pipeline"
    )


def _read(path: Path, kind: type[_Fast | _SentencePiece], max_tokens: int) -> _Backend:
    if path.name == FAST:
        read_json(path)
    try:
        return kind(path, max_tokens)
    except ImportError:
        raise
    except Exception as error:  # both libraries raise plain Exception
        found = content_of(path)
        description = "damaged" if found.name in ("unknown", "json") else found.description
        raise UserError(f"{path} is not a valid tokenizer (it is {description}); {found.remedy}") from error
