"""Class names to features: tokens, the prompt ensemble, and the cache on disk."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from conformance import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sfp
from sfp.clip import text, tokenizer
from sfp.clip.templates import TEMPLATES
from sfp.clip.text import encode_queries, prompt_templates, text_bank, tokenize

pytestmark = pytest.mark.usefixtures("no_grad")

GOLDEN = json.loads((ROOT / "tokenizer.json").read_text())
FEW = ["a photo of a {}.", "{}", "there is a small {} in the scene, and it is a very fine one."]


@pytest.fixture(scope="module")
def clip() -> sfp.CLIP:
    return tiny.clip(**tiny.WORDS)


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"][:30])
def test_tokenizer(case):
    """OpenAI's ids. Their tokenizer can cut long texts off silently; ours says so instead."""
    assert len(case["ids"]) == min(case["full_len"], 77)
    if case["full_len"] > 77:
        assert case["raises_without_truncate"]
        with pytest.raises(
            ValueError, match=f"{case['full_len']} tokens, but CLIP reads at most 77"
        ):
            tokenize([case["text"]])
    else:
        assert tokenize([case["text"]]).tolist() == [case["ids"]]


@pytest.fixture(scope="module")
def mmseg_utils():
    """Of mmsegmentation, whose tokenizer is OpenAI's but for how it spells the two marks."""
    utils = pytest.importorskip("mmseg.utils")
    importlib.import_module("mmseg.utils.tokenizer")
    return utils


MARKS = re.compile(r"<\|?(start|end)_?of_?text\|?>", re.IGNORECASE)
PARTS = (
    *("Cat", "it's", "WE'LL", " naïve", "日本", "&amp;lt;", "\u00a0\x1c", "\u017f", "İ", "ÃŽ"),
    *("<|endof", "12"),
)
PIECES = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4))).map("".join)


@pytest.mark.slow
@given(st.one_of(st.text(), PIECES))
def test_tokenizer_is_mmsegs(mmseg_utils, words):
    assume(not MARKS.search(words))  # the two agree on everything but these
    assert tokenizer.encode(words) == mmseg_utils.tokenizer._tokenizer.encode(words)


def test_other_spellings_of_the_marks_are_words():
    assert tokenizer.encode("a <|EndOfText|>") == [320, tokenizer.END]
    assert tokenizer.END not in tokenizer.encode("<end_of_text>")


@pytest.mark.parametrize("case", GOLDEN["context_length_cases"], ids=lambda c: str(c)[:40])
def test_shorter_contexts(case):
    context = case["context_length"]
    needed = tokenize([case["text"]], 1000).shape[1]
    if needed > context:
        with pytest.raises(ValueError, match=f"{needed} tokens, but CLIP reads at most {context}"):
            tokenize([case["text"]], context)
    else:
        ids = tokenize([case["text"]], context)[0].tolist()
        assert ids + [0] * (context - len(ids)) == case["ids"]


def test_a_batch_is_padded_to_its_longest():
    texts = [case["text"] for case in GOLDEN["cases"] if case["full_len"] <= 77]
    ids = tokenize(texts)
    assert ids.shape == (
        len(texts),
        max(c["full_len"] for c in GOLDEN["cases"] if c["text"] in texts),
    )
    assert ids.dtype == torch.int64
    for row, text_ in zip(ids, texts, strict=True):
        alone = tokenize([text_])[0]
        assert torch.equal(row[: len(alone)], alone)
        assert not row[len(alone) :].any()


# -- templates -----------------------------------------------------------------------------------


def test_templates():
    assert len(prompt_templates("imagenet")) == 80
    assert prompt_templates(("{} one", "two {}")) == ["{} one", "two {}"]


def test_sets_of_templates_are_mmsegs(mmseg_utils):
    theirs = mmseg_utils.get_templates.PREDEFINED_TEMPLATES
    assert {name: list(TEMPLATES[name]) for name in theirs} == theirs


@pytest.mark.parametrize(
    "templates",
    [["a photo"], ["{}", "a {} and {}"], ["a {name}"], ["a {} {"], [3], [""]],
    ids=str,
)
def test_templates_that_are_wrong(templates):
    with pytest.raises(ValueError, match="template") as error:
        prompt_templates(templates)
    assert repr(templates[-1]) in str(error.value)
    assert "{}" in str(error.value)


def test_no_such_templates():
    with pytest.raises(ValueError, match="'imagnet'; did you mean 'imagenet'"):
        prompt_templates("imagnet")
    with pytest.raises(ValueError, match="empty"):
        prompt_templates([])


# -- features ------------------------------------------------------------------------------------


def full_encoding(clip: sfp.CLIP, prompt: str) -> Tensor:
    """One prompt over the whole context of 77, with torch's own attention and an explicit mask."""
    ids = torch.zeros(1, 77, dtype=torch.long)
    row = tokenize([prompt])[0]
    ids[0, : len(row)] = row
    x = clip.token_embedding(ids) + clip.positional_embedding
    mask = torch.full((77, 77), -torch.inf).triu(1)
    for block in clip.transformer.resblocks:
        attention = nn.MultiheadAttention(64, 1, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
    return clip.ln_final(x[0, int(row.argmax())]) @ clip.text_projection


@pytest.mark.slow
def test_cut_contexts_give_the_full_features(clip):
    prompts = [c["text"] for c in GOLDEN["cases"] if c["full_len"] <= 77]
    assert {min(c["full_len"], 77) for c in GOLDEN["cases"]} >= {3, 5}
    expected = F.normalize(torch.stack([full_encoding(clip, p) for p in prompts]), dim=-1)
    together = F.normalize(clip.encode_text(tokenize(prompts)), dim=-1)
    assert (together - expected).abs().max() <= 1e-6
    alone = torch.cat([clip.encode_text(tokenize([p])) for p in prompts])
    assert (F.normalize(alone, dim=-1) - expected).abs().max() <= 1e-6
    padded = torch.zeros(len(prompts), 77, dtype=torch.long)
    ids = tokenize(prompts)
    padded[:, : ids.shape[1]] = ids
    assert torch.equal(clip.encode_text(padded), clip.encode_text(ids))


def naive_bank(clip: sfp.CLIP, queries: list[str], templates: list[str]) -> Tensor:
    """Class by class and prompt by prompt, over the whole context."""
    bank = []
    for query in queries:
        prompts = [full_encoding(clip, template.format(query)) for template in templates]
        bank.append(F.normalize(F.normalize(torch.stack(prompts), dim=-1).mean(0), dim=-1))
    return torch.stack(bank)


@pytest.mark.parametrize("batch", [512, 7])
def test_the_bank_is_the_naive_loop(clip, monkeypatch, batch):
    monkeypatch.setattr(text, "BATCH", batch)
    queries = ["cat", "television monitor", "sky", "people in jackets, on skis"]
    bank = encode_queries(clip, queries, FEW)
    assert (bank - naive_bank(clip, queries, FEW)).abs().max() <= 1e-6
    assert bank.dtype == torch.float32
    torch.testing.assert_close(bank.norm(dim=-1), torch.ones(4))


def test_the_whole_ensemble(clip):
    bank = encode_queries(clip, ["brick wall"], prompt_templates("imagenet"))
    expected = naive_bank(clip, ["brick wall"], prompt_templates("imagenet"))
    assert (bank - expected).abs().max() <= 1e-6


def test_equal_names_have_equal_features_to_the_last_bit(clip, monkeypatch):
    """Two classes of COCO-Object share "bed": the tie must not be broken by rounding."""
    monkeypatch.setattr(text, "BATCH", 4)
    bank = encode_queries(clip, ["bed", "cat", "bed", "a long dining table", "bed"], FEW)
    assert torch.equal(bank[0], bank[2])
    assert torch.equal(bank[0], bank[4])
    assert not torch.equal(bank[0], bank[1])


def test_names_with_braces_and_percent_signs(clip):
    bank = encode_queries(clip, ["{cat}", "100 % wool"], FEW)
    assert torch.equal(bank, encode_queries(clip, ["{cat}", "100 % wool"], FEW))
    assert bank.isfinite().all()


def test_a_checkpoint_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"has 512 tokens.*ids up to 49407.*query_features"):
        encode_queries(tiny.clip(), ["cat"], FEW)


def test_a_name_that_is_too_long(clip):
    with pytest.raises(
        ValueError, match="tokens, but CLIP reads at most 77: 'a photo of a word word"
    ):
        encode_queries(clip, ["cat", "word " * 80], FEW)


def test_half_precision_is_close(clip):
    import copy

    half = copy.deepcopy(clip).to(torch.bfloat16)
    bank = encode_queries(half, ["cat", "dog"], FEW)
    assert bank.dtype == torch.float32
    torch.testing.assert_close(bank.norm(dim=-1), torch.ones(2))
    cosine = (bank * encode_queries(clip, ["cat", "dog"], FEW)).sum(-1)
    assert cosine.min() > 0.999


# -- the cache -----------------------------------------------------------------------------------

QUERIES = ["cat", "dog", "cat"]


@pytest.fixture
def stopped(monkeypatch):
    """Turns encoding off, once it is called."""

    def never(*args):
        raise AssertionError("encoded, not read")

    return lambda: monkeypatch.setattr(text, "encode_queries", never)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_second_call_reads(clip, tmp_path, stopped):
    folder = tmp_path / "deep" / "text"
    bank = text_bank(clip, QUERIES, FEW, folder=folder)
    assert torch.equal(bank, encode_queries(clip, QUERIES, FEW))
    assert only(folder).suffix == ".safetensors"
    stopped()
    assert torch.equal(text_bank(clip, QUERIES, FEW, folder=folder), bank)
    assert torch.equal(text_bank(clip, tuple(QUERIES), tuple(FEW), folder=folder), bank)


def test_the_cache_folder_is_the_users(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "mine"))
    text_bank(clip, QUERIES, FEW)
    assert only(tmp_path / "mine" / "text")
    monkeypatch.delenv("SFP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    text_bank(clip, QUERIES, FEW)
    assert only(tmp_path / ".cache" / "sfp" / "text")


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "header", "other", "shape", "folder"])
def test_a_damaged_file_is_built_again(clip, tmp_path, damage):
    bank = text_bank(clip, QUERIES, FEW, folder=tmp_path)
    path = only(tmp_path)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "header":
        path.write_bytes(data.replace(b"features", b"fxatures"))
    elif damage == "shape":
        from safetensors.torch import save_file

        save_file({"features": torch.ones(3, 31)}, path, metadata={"sha256": "0"})
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(dict(empty=b"", cut=data[: len(data) // 2], other=b"x" * 100)[damage])
    if damage == "folder":  # cannot be replaced: only the time is lost
        with pytest.warns(UserWarning, match="text features are not cached"):
            assert torch.equal(text_bank(clip, QUERIES, FEW, folder=tmp_path), bank)
        return
    assert torch.equal(text_bank(clip, QUERIES, FEW, folder=tmp_path), bank)
    assert path.read_bytes() == data


def test_the_key_depends_on_all_that_matters(clip, tmp_path):
    half = tiny.clip(**tiny.WORDS).to(torch.bfloat16)
    other = tiny.clip(1, **tiny.WORDS)
    banks = [
        text_bank(model, queries, templates, folder=tmp_path)
        for model, queries, templates in [
            (clip, QUERIES, FEW),
            (half, QUERIES, FEW),
            (other, QUERIES, FEW),
            (clip, ["dog", "cat", "bird"], FEW),
            (clip, ["dog", "cat", "dog"], FEW),
            (clip, QUERIES, FEW[:1]),
            (clip, ["cat, dog", "cat"], FEW),
            (clip, ["cat", "dog, cat"], FEW),
        ]
    ]
    assert len(list(tmp_path.iterdir())) == len(banks)
    same = [b for b in banks if b.shape == banks[0].shape]
    for a, b in itertools.combinations(same, 2):
        assert not torch.equal(a, b)


def test_models_that_differ_in_activation_only(tmp_path):
    """The file is the same, and so is its hash: the features are not."""
    path = tiny.save(tmp_path / "clip.safetensors", **tiny.WORDS)
    folder = tmp_path / "text"
    quick = text_bank(sfp.load_clip(path), QUERIES, FEW, folder=folder)
    exact = text_bank(sfp.load_clip(path, activation="gelu"), QUERIES, FEW, folder=folder)
    assert not torch.allclose(quick, exact, atol=1e-5)


def test_features_of_an_autocast_region_are_those_of_the_model(clip, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        text_bank(clip, QUERIES, FEW, folder=tmp_path)
    bank = text_bank(clip, QUERIES, FEW, folder=tmp_path)
    assert torch.equal(bank, encode_queries(clip, QUERIES, FEW))


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_folder_that_cannot_be_written(clip, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "text" if place == "below a file" else tmp_path / "file"
    with pytest.warns(UserWarning, match="text features are not cached: "):
        bank = text_bank(clip, QUERIES, FEW, folder=folder)
    assert torch.equal(bank, encode_queries(clip, QUERIES, FEW))


def test_a_full_disk_leaves_nothing_behind(clip, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "save_file", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        text_bank(clip, QUERIES, FEW, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_users_may_read_the_cache(clip, tmp_path):
    mask = os.umask(0o022)
    try:
        text_bank(clip, QUERIES, FEW, folder=tmp_path)
    finally:
        os.umask(mask)
    assert only(tmp_path).stat().st_mode & 0o777 == 0o644


def test_no_warning_when_all_is_well(clip, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_bank(clip, QUERIES, FEW, folder=tmp_path)


def test_features_are_ordinary_tensors(clip, tmp_path):
    """Not inference tensors, which later code could not differentiate through."""
    for _ in range(2):  # computed, read
        bank = text_bank(clip, QUERIES, FEW, folder=tmp_path)
        assert not bank.is_inference()
        assert not bank.requires_grad


def test_templates_follow_the_model_unless_somebody_says_otherwise():
    """TIPSv2's authors use nine, seven of CLIP's 80 among them."""
    clip = tiny.clip(**tiny.WORDS)
    names = ["cat", "dog"]
    bank = functools.partial(text_bank, clip, names)
    assert torch.equal(bank(), bank("imagenet"))
    assert torch.equal(sfp.load(clip).engine.encode(names), bank("imagenet"))
    clip.text.templates = "tipsv2"
    assert torch.equal(bank(), bank("tipsv2"))
    assert torch.equal(sfp.load(clip).engine.encode(names), bank("tipsv2"))
    assert torch.equal(sfp.load(clip, templates="vild").engine.encode(names), bank("vild"))
    nine = set(TEMPLATES["tipsv2"])
    assert len(nine) == 9
    assert nine - set(TEMPLATES["imagenet"]) == {"a photo of {}s."}
