"""Tokenizers: from texts to the token ids that a text tower was trained on.

OpenAI's byte pairs are part of this package (`tokenizer.py`). Every other family has its own vocabulary
file beside its weights, which is read by the package that defines the format: `tokenizers` for
tokenizer.json and vocab.txt, `sentencepiece` for *.model. Start and end tokens, padding and cleaning
follow the family's `Rules` here, since such files define them in different ways or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import html
import string
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

import ftfy
import torch
from torch import Tensor

from sfp.clip import tokenizer
from sfp.clip.checkpoints.published import WeightsError
from sfp.files import sha256_file

JSON_FILES = ("tokenizer.json", "vocab.txt")  # read by `tokenizers`
PIECE_FILES = (  # read by `sentencepiece`
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
FILES = JSON_FILES + PIECE_FILES

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def whitespace(text: str) -> str:
    """Repairs broken encodings, resolves HTML entities, and collapses white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def canonical(text: str) -> str:
    """Like `whitespace`; also lower case, underscores as spaces, and no ASCII punctuation.

    The form of SigLIP's prompts in training (Zhai et al., "Sigmoid Loss for Language Image
    Pre-Training", ICCV 2023; big_vision's `prompt_engineering.py`).
    """
    bare = html.unescape(html.unescape(ftfy.fix_text(text))).strip().replace("_", " ")
    return " ".join(bare.translate(_PUNCTUATION).lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "whitespace": whitespace,
    "canonical": canonical,
}


@dataclass(frozen=True)
class Rules:
    """How a family turns texts into ids, given a vocabulary.

    Attributes:
        start, end: tokens before and after every text, by id or by name; None for none.
        pad: id of padding.
        full: whether texts are padded to the context, for towers that see padding; otherwise only to
            the longest of a batch.
        clean: name of the function, a key of `CLEANERS`, that is applied to texts first.
        shift: number added to the ids of a SentencePiece file; 1 in fairseq's XLM family, where the
            first ids are <s>, <pad>, </s> and <unk>.
    """

    start: int | str | None = None
    end: int | str | None = None
    pad: int = 0
    full: bool = False
    clean: str = "none"
    shift: int = 0


SIGLIP = Rules(end=1, pad=1, full=True, clean="canonical")
SIGLIP2 = Rules(end=1, pad=0, full=True, clean="canonical")  # Gemma's vocabulary
XLM = Rules(start=0, end=2, pad=1, clean="whitespace", shift=1)
TIPS = Rules(pad=0, clean="lower")
BERT = Rules(start="[CLS]", end="[SEP]", pad=0, clean="whitespace")
# [SEP] is replaced by padding, and texts are padded to the context
CLIPA = Rules(start="[CLS]", end=0, pad=0, full=True, clean="whitespace")


class Tokenizer:
    """Base class of tokenizers, from texts to ids.

    Attributes:
        context: maximal length of a text in tokens.
        digest: identifies everything that the ids depend on.
    """

    context: int
    digest: str

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L) int64, L at most `context`.

        Raises:
            ValueError: if a text is too long or has no tokens; the message names it.
            WeightsError: if the vocabulary, or the package for reading it, is missing.
        """
        raise NotImplementedError


class BytePairs(Tokenizer):
    """OpenAI's tokenizer, with start and end tokens.

    Args:
        context: maximal length of a text in tokens.
        full: whether texts are padded to this length with zeros.
    """

    def __init__(self, context: int, full: bool = False) -> None:
        self.context, self.full = context, full
        self.digest = f"OpenAI byte pairs {context} {full}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L)."""
        ids = tokenizer.tokenize(texts, self.context)
        return torch.nn.functional.pad(ids, (0, self.context - ids.shape[1])) if self.full else ids


class FileTokenizer(Tokenizer):
    """A tokenizer from a vocabulary file and a family's rules.

    Args:
        rules: rules of the family.
        context: maximal length of a text in tokens.
        path: file for `tokenizers` or `sentencepiece`, depending on its name (`FILES`).
    """

    def __init__(self, rules: Rules, context: int, path: Path) -> None:
        self.rules, self.context, self.path = rules, context, path
        self._sha256 = sha256_file(path)
        words = [str(astuple(rules)), str(context), _reader(path).__name__, self._sha256]
        self.digest = hashlib.sha256(" ".join(words).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L)."""
        rules, vocabulary = self.rules, _open(self.path, self._sha256, self.rules.shift)
        marks = [[] if m is None else [self._id(m)] for m in (rules.start, rules.end)]
        clean = CLEANERS[rules.clean]
        rows = [marks[0] + vocabulary.encode(clean(text)) + marks[1] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not len(row):
                raise ValueError(f"text {text!r} has no tokens in {self.path}")
            if len(row) > self.context:
                raise ValueError(
                    f"text of {len(row)} tokens, but this model reads at most {self.context}: "
                    f"{text[:60]!r}..."
                )
        length = self.context if rules.full else max(map(len, rows))
        return torch.tensor([row + [rules.pad] * (length - len(row)) for row in rows])

    def _id(self, mark: int | str) -> int:
        if isinstance(mark, int):
            return mark
        found = _open(self.path, self._sha256, self.rules.shift).id(mark)
        if found is None:
            raise WeightsError(f"{self.path} has no token {mark!r}: it belongs to another model")
        return found


class MissingTokenizer(Tokenizer):
    """Replaces a tokenizer whose file was not found; images can be encoded without it.

    Args:
        message: error message for calls, with what to do.
    """

    digest = "missing"

    def __init__(self, message: str) -> None:
        self.message, self.context = message, 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raises `WeightsError`."""
        raise WeightsError(self.message)


class _Vocabulary(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def id(self, token: str) -> int | None: ...


class _Json:
    """tokenizer.json, or BERT's vocab.txt."""

    def __init__(self, path: Path, shift: int) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise _no_package(path, "tokenizers") from error
        if path.suffix == ".txt":  # the format of BERT's uncased models
            made = tokenizers.implementations.BertWordPieceTokenizer(str(path), lowercase=True)
            self._tokenizer = made._tokenizer
        else:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()  # files may enable it
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _Pieces:
    """A SentencePiece model."""

    def __init__(self, path: Path, shift: int) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise _no_package(path, "sentencepiece") from error
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._shift = shift

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        if not self._shift:
            return ids
        unknown = self._model.unk_id()
        return [3 if i == unknown else i + self._shift for i in ids]

    def id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() else found


def _reader(path: Path) -> type[_Json] | type[_Pieces]:
    return _Pieces if path.suffix == ".model" else _Json


@functools.lru_cache(maxsize=8)
def _open(path: Path, sha256: str, shift: int) -> _Vocabulary:
    try:
        return _reader(path)(path, shift)
    except WeightsError:
        raise
    except Exception as error:  # both packages pass on any error of their C++ and Rust parts
        raise WeightsError(
            f"cannot read the tokenizer {path}: {type(error).__name__}: {error}. Download it again"
        ) from error


def _no_package(path: Path, package: str) -> WeightsError:
    return WeightsError(
        f"the tokenizer {path} is read by the package {package}, which is not installed: "
        "pip install 'sfp[text]'"
    )


def beside(folder: Path) -> Path | None:
    """The tokenizer file in a folder, preferably one that an installed package can read, or None."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    return next((path for path in found if _is_readable(path)), found[0] if found else None)


def _is_readable(path: Path) -> bool:
    from importlib.util import find_spec

    return find_spec("sentencepiece" if _reader(path) is _Pieces else "tokenizers") is not None
