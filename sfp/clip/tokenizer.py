"""OpenAI's byte-pair tokenizer: from text to the ids that CLIP's text tower was trained on.

Ids 0 to 255 are single bytes, 256 to 511 the same bytes at the end of a word, followed by one id per
merge in the order of training, and two ids for the start and end of a text. The merges in
`merges.txt.gz` are OpenAI's, under the licence in `merges.LICENSE`.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (ACL 2016); Radford et
al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).
"""

from __future__ import annotations

import functools
import gzip
import html
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain, pairwise

import ftfy
import regex
import torch
from torch import Tensor

START, END = 49406, 49407
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
# a word is a start or end token, an English contraction, letters, a digit, or other characters
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def encode(text: str) -> list[int]:
    """Ids of a text, without marks at start and end.

    Broken encodings are mended, HTML entities resolved, runs of white space count as one space, and
    capitals do not matter. The spelt-out marks `<|startoftext|>` and `<|endoftext|>` become their ids,
    as they do at OpenAI.

    Example:
        >>> encode("a photo of a Cat.")
        [320, 1125, 539, 320, 2368, 269]
    """
    clean = html.unescape(html.unescape(ftfy.fix_text(text)))
    clean = regex.sub(r"\s+", " ", clean).strip().lower()
    return list(chain.from_iterable(map(_encode_word, WORD.findall(clean))))


def tokenize(texts: Sequence[str], context: int = 77) -> Tensor:
    """OpenAI's byte-pair ids with start and end marks, zero-padded to the longest: (B, L) int64.

    Raises:
        ValueError: if a text needs more than `context` ids.
    """
    rows = [[START, *encode(text), END] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > context:
            raise ValueError(
                f"text of {len(row)} tokens, but CLIP reads at most {context}: {text[:60]!r}..."
            )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


@functools.lru_cache(maxsize=1 << 16)
def _encode_word(word: str) -> tuple[int, ...]:
    """Ids of a word: its bytes, merged pair by pair, in the order in which merges were learnt."""
    if word in SPECIAL:
        return (SPECIAL[word],)
    byte_ids, merges = _tables()
    ids = [byte_ids[byte] for byte in word.encode()]
    ids[-1] += 256
    while True:
        # later merges have larger ids, so the id is the rank as well
        pairs = [merges[pair] for pair in pairwise(ids) if pair in merges]
        if not pairs:
            return tuple(ids)
        ids = _replace(ids, min(pairs), merges)


def _replace(ids: list[int], new: int, merges: dict[tuple[int, int], int]) -> list[int]:
    """`ids` with every pair that merges to `new` replaced, from left to right."""
    result: list[int] = []
    for item in ids:
        if result and merges.get((result[-1], item)) == new:
            result[-1] = new
        else:
            result.append(item)
    return result


@functools.cache
def _tables() -> tuple[list[int], dict[tuple[int, int], int]]:
    """Ids of the 256 bytes, and the id of each merged pair of ids."""
    # the file spells bytes as characters: printable ones as they are, others from U+0100 on
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    order = visible + hidden
    characters = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    vocabulary |= {f"{character}</w>": 256 + i for i, character in enumerate(characters)}
    merges = {}
    text = gzip.decompress((files("sfp.clip") / "merges.txt.gz").read_bytes()).decode()
    for line in text.splitlines():
        first, second = line.split(" ")
        number = len(vocabulary)
        vocabulary[first + second] = number
        merges[vocabulary[first], vocabulary[second]] = number
    byte_ids = [i for i, _ in sorted(enumerate(order), key=lambda item: item[1])]
    return byte_ids, merges
