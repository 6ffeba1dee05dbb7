"""Tokenizers of other families against other packages, with small vocabularies trained here."""

from __future__ import annotations

import importlib.util
import io
import random
import sys

import packages
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfp.clip import tokenizer
from sfp.clip.checkpoints.published import WeightsError
from sfp.clip.text import encode_queries, text_bank
from sfp.clip.text_towers import TextConfig
from sfp.clip.tokenizers import (
    BERT,
    CLIPA,
    SIGLIP,
    SIGLIP2,
    TIPS,
    XLM,
    BytePairs,
    FileTokenizer,
    Rules,
    beside,
    canonical,
    whitespace,
)

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

PHRASE = (
    "a photo of the cat dog cars tree grass sky person riding bicycle traffic light wall "
    "don't 3 Straße naïve 木の 写真 buildings, (painting) - sign."
)
WORDS = PHRASE.split()
CONTEXT = 64
TEXTS = st.text(max_size=14) | st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def lines() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=7)) for _ in range(300)]


def pieces(path, kind="unigram", **ids):
    """A SentencePiece file."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=file,
        model_type=kind,
        vocab_size=400 if kind == "unigram" else 330,
        hard_vocab_limit=False,
        byte_fallback=kind == "bpe",
        minloglevel=2,
        **ids,
    )
    path.write_bytes(file.getvalue())
    return path


def bpe(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in Gemma's manner: spaces as underlines, bytes for what is unknown."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    special = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    made.train_from_iterator([line.lower() for line in lines()], trainer)
    import json

    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return pieces(
        tmp_path_factory.mktemp("siglip") / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )


def filled(rows: list[list[int]], pad: int, length: int) -> torch.Tensor:
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def check(ours: FileTokenizer, text: str, expected: list[int]) -> None:
    """The ids of a text, alone and before a longer one."""
    if len(expected) > ours.context:
        with pytest.raises(ValueError, match=f"reads {ours.context}"):
            ours([text])
        return
    if not expected:
        with pytest.raises(ValueError, match="no tokens"):
            ours([text])
        return
    pad = ours.rules.pad
    length = ours.context if ours.rules.full else len(expected)
    assert ours([text]).tolist() == filled([expected], pad, length).tolist()
    both = ours([text, "a photo of a cat"])
    assert both[0, : len(expected)].tolist() == expected
    assert (both[0, len(expected) :] == pad).all()


@pytest.fixture(scope="module")
def siglip_package(siglip):
    if importlib.util.find_spec("google.protobuf") is None:
        pytest.skip("transformers reads SentencePiece files by protobuf, which is not installed")
    return transformers.SiglipTokenizer(str(siglip))


@given(text=TEXTS)
@example(text="A  photo_of &amp; a CAT.")
@settings(max_examples=150)
def test_siglip(siglip, siglip_package, text):
    # transformers cleans too, but does not know underscores and broken encodings
    expected = siglip_package(canonical(text)).input_ids
    if not canonical(text):
        expected = [1]  # transformers would say one underline
    check(FileTokenizer(SIGLIP, CONTEXT, siglip), text, expected)


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    """Folder of a Gemma-like tokenizer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("siglip2")
    vocab, merges = bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    made = transformers.Siglip2Tokenizer(vocab, merges, add_bos_token=False, add_eos_token=True)
    made.save_pretrained(folder)
    return folder, made


@given(text=TEXTS)
@settings(max_examples=150)
def test_siglip2(siglip2, text):
    folder, package = siglip2
    expected = [*package(canonical(text), add_special_tokens=False).input_ids, 1]
    check(FileTokenizer(SIGLIP2, CONTEXT, folder / "tokenizer.json"), text, expected)


@pytest.fixture(scope="module")
def tips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tips")
    vocab, merges = bpe(["<pad>", "<unk>"])
    made = transformers.Tipsv2Tokenizer(vocab, merges)
    made.save_pretrained(folder)
    return folder, made


@given(text=TEXTS)
@settings(max_examples=150)
def test_tips(tips, text):
    folder, package = tips
    check(FileTokenizer(TIPS, CONTEXT, folder / "tokenizer.json"), text, package(text).input_ids)


@pytest.fixture(scope="module")
def xlm(tmp_path_factory):
    """A SentencePiece file in fairseq's manner, and the same as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("xlm")
    path = pieces(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    made = transformers.XLMRobertaTokenizer(vocab=vocab)
    made.save_pretrained(folder)
    return folder, made


@given(text=TEXTS)
@settings(max_examples=150)
def test_xlm(xlm, text):
    folder, package = xlm
    expected = package(whitespace(text)).input_ids
    check(FileTokenizer(XLM, CONTEXT, folder / "tokenizer.json"), text, expected)


@given(text=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join))
@settings(max_examples=60)
def test_xlm_by_sentencepiece(xlm, text):
    folder, package = xlm
    ours = FileTokenizer(XLM, CONTEXT, folder / "sentencepiece.bpe.model")
    check(ours, text, package(whitespace(text)).input_ids)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """vocab.txt, and the folder that transformers makes of it."""
    folder = tmp_path_factory.mktemp("bert")
    made = tokenizers.implementations.BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(lines(), vocab_size=200, show_progress=False)
    made.save_model(str(folder))
    plain = tmp_path_factory.mktemp("bert_json")
    package = transformers.BertTokenizer(str(folder / "vocab.txt"))
    package.save_pretrained(plain)
    return folder / "vocab.txt", plain, package


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@given(text=TEXTS)
@settings(max_examples=100)
def test_bert(bert, file, text):
    vocab, folder, package = bert
    path = vocab if file == "vocab.txt" else folder / file
    check(FileTokenizer(BERT, CONTEXT, path), text, package(whitespace(text)).input_ids)


@pytest.mark.slow
@given(text=TEXTS)
@settings(max_examples=100)
def test_clipa(bert, text):
    _, folder, _ = bert
    ours = FileTokenizer(CLIPA, CONTEXT, folder / "tokenizer.json")
    package = packages.open_clip("tokenizer").HFTokenizer(
        str(folder), context_length=CONTEXT, strip_sep_token=True
    )
    assert ours([text]).tolist() == package([text]).tolist()


@given(text=TEXTS)
@settings(max_examples=100)
def test_cleaning(text):
    module = packages.open_clip("tokenizer")
    assert canonical(text) == module.get_clean_fn("canonicalize")(text)
    assert whitespace(text) == module.get_clean_fn("whitespace")(text)


# -- what goes wrong -----------------------------------------------------------------------------


def test_missing_package(siglip, monkeypatch, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(siglip.read_bytes())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(WeightsError, match=r"spiece\.model .*sentencepiece.*sfp\[text\]"):
        FileTokenizer(SIGLIP, CONTEXT, path)(["a cat"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json .*tokenizers.*sfp\[text\]"):
        FileTokenizer(TIPS, CONTEXT, tmp_path / "tokenizer.json")(["a cat"])


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "vocab.txt"])
def test_damaged_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xff{")
    with pytest.raises(WeightsError, match=name):
        FileTokenizer(BERT, CONTEXT, path)(["a cat"])


def test_wrong_file(siglip):
    with pytest.raises(WeightsError, match=r"no token '\[CLS\]'"):
        FileTokenizer(BERT, CONTEXT, siglip)(["a cat"])


def test_beside(siglip, tmp_path):
    assert beside(tmp_path) is None
    (tmp_path / "spiece.model").write_bytes(siglip.read_bytes())
    assert beside(tmp_path).name == "spiece.model"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert beside(tmp_path).name == "tokenizer.json"


# -- the rest of the package ---------------------------------------------------------------------


def test_byte_pairs_filled_up():
    ids = BytePairs(12, full=True)(["a cat", "a dog on a roof"])
    assert ids.shape == (2, 12)
    assert (ids[:, :7] == tokenizer.tokenize(["a cat", "a dog on a roof"])).all()


def test_banks_know_the_tokenizer(siglip, tmp_path):
    """Another vocabulary file, or other rules, and what is cached counts no more."""
    torch.manual_seed(0)
    sizes = TextConfig(vocab=500, context=16, width=64, layers=1, embed_dim=32, rules=SIGLIP)
    from tiny import clip as tiny_clip

    from sfp.clip.model import CLIP

    model = CLIP.of(tiny_clip().visual, sizes.build()).requires_grad_(False).eval()
    with pytest.raises(WeightsError, match="without a tokenizer"):
        encode_queries(model, ["cat"], ["{}"])
    names = set()
    for rules in (SIGLIP, Rules(end=1, pad=0)):
        model.text.tokenizer = FileTokenizer(rules, 16, siglip)
        names.add(model.text_digest)
        bank = text_bank(model, ["cat", "dog"], ["a {}"], folder=tmp_path)
        assert torch.equal(bank, encode_queries(model, ["cat", "dog"], ["a {}"]))
    assert len(names) == len(list(tmp_path.iterdir())) == 2
