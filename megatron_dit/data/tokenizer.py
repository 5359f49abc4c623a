"""T5's tokenizers: a ``tokenizer.json``, or the ``spiece.model`` that Google's T5 and PixArt-α's pipelines have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_dit.data.pretrained import T5, Source, loading, read_json
from megatron_dit.errors import UserError
from megatron_dit.runtime.content import content_of

FAST, PIECES = "tokenizer.json", "spiece.model"


class _Backend(Protocol):
    vocabulary: int  # ids are below it

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids with T5's end token last, at most as many as the tokenizer was opened for."""
        ...


class Tokenizer:
    """Ids of captions. ``path`` is the file that it was read from."""

    def __init__(self, path: Path, backend: _Backend) -> None:
        self.path, self._backend = path, backend

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        # JSON may hold halves of surrogate pairs, which neither library takes.
        return self._backend.encode([text.encode("utf-8", "replace").decode() for text in captions])

    def check(self, name: str, config: Any) -> None:
        """Raise UserError unless the ids are those of a T5 of ``config``."""
        if self._backend.vocabulary > config.vocab_size:
            raise UserError(
                f"text encoder {name} has embeddings of {config.vocab_size:,} tokens, but {self.path} has "
                f"{self._backend.vocabulary:,}: give the tokenizer that belongs to it"
            )
        (empty,) = self.encode([""])
        if empty != [config.eos_token_id]:
            raise UserError(
                f"{self.path} encodes an empty caption as {empty}, not as T5's end token {config.eos_token_id}: it is "
                "the tokenizer of another model"
            )


class _Fast:
    """A ``tokenizer.json``, which describes the tokenizer completely."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer as Library

        self._tokenizer = Library.from_file(str(path))
        # A file may have kept the padding of the program that saved it.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(captions))]


class _SentencePiece:
    """A ``spiece.model``. transformers' conversion of it gives other ids for some Unicode text."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces: Any = SentencePieceProcessor(model_file=str(path))
        self._most = max_tokens - 1
        self.vocabulary: int = self._pieces.vocab_size()

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        end = self._pieces.eos_id()
        return [[*ids[: self._most], end] for ids in self._pieces.encode(list(captions))]


def open_tokenizer(source: Source, max_tokens: int) -> Tokenizer:
    """The tokenizer in a text encoder's folder, or beside it in a pipeline (``tokenizer_3`` for ``text_encoder_3``).

    Raises UserError if there is none, or none that can be read.
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
        f"text encoder {source.name} has no tokenizer ({FAST} or {PIECES} in {folders}): give a folder that has one, "
        "such as the whole pipeline"
    )


def _read(path: Path, kind: type[_Fast | _SentencePiece], max_tokens: int) -> _Backend:
    if path.name == FAST:
        read_json(path)
    try:
        return kind(path, max_tokens)
    except ImportError:
        raise
    except Exception as error:  # both libraries raise bare exceptions
        found = content_of(path)
        description = "damaged" if found.name in ("unknown", "json") else found.description
        raise UserError(f"{path} is no tokenizer (it is {description}): {found.remedy}") from error
