"""The mini world: scenes follow from seeds, the benchmark is written once, training resumes."""

import dataclasses
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

import sfp
from sfp import mini
from sfp.clip.checkpoints.loading import load_clip
from sfp.clip.text import tokenize
from sfp.mini import scenes, train
from sfp.vocabulary import as_vocabulary


def digest(seed: int) -> str:
    image, labels = mini.scene(seed)
    return hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()


@pytest.mark.process
def test_scene_follows_from_its_seed_in_any_process():
    code = (
        "import cv2, hashlib; from sfp.mini import scene; cv2.setNumThreads(1); a, b = scene(7);"
        "print(hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    np.random.seed(3)  # global state must not matter
    assert digest(7) == digest(7) == other.stdout.strip() != digest(8)


@pytest.mark.parametrize("size", [64, 112, 224])
def test_labels_fit_the_picture(size):
    image, labels = mini.scene(1, size)
    assert image.shape == (size, size, 3)
    assert labels.shape == (size, size)
    assert image.dtype == labels.dtype == np.uint8
    assert labels.max() < len(mini.CLASSES)


@pytest.mark.slow
def test_every_class_appears_and_things_are_of_a_readable_size():
    counts = np.stack([np.bincount(mini.scene(s)[1].ravel(), minlength=18) for s in range(80)])
    assert (counts > 0).any(0).all()
    assert (counts[:, :12] > 1000).sum(1).mean() >= 1.5  # 2 % of the picture


def test_names_are_consistent():
    assert tuple(mini.ALIASES) == mini.CLASSES == mini.THINGS + mini.STUFF
    assert len(mini.PALETTE) == len(mini.CLASSES) == len(set(mini.PALETTE))
    spoken = [*mini.CLASSES, *(alias for aliases in mini.ALIASES.values() for alias in aliases)]
    assert len(set(spoken)) == len(spoken)


def test_captions_name_what_they_are_given():
    rng = np.random.default_rng(0)
    for names in (["tree"], ["cat", "sand"], ["sky", "water"], ["boat", "sun", "brick wall"]):
        text = scenes.caption(names, rng, ["a photo of {}."])
        assert "{" not in text
        for name in names:
            assert any(word in text for word in (name, *mini.ALIASES[name]))


def test_unknown_words_are_those_that_the_text_encoder_cannot_tell_apart():
    """Tokens that it never saw have one embedding, that of "zebra"."""
    words = ["cat", "Kitten", "the sea", "a  brick wall", "night", "dog", "person", "cats", "seal"]
    embeddings = sfp.load("mini").encode([*words, "zebra"])
    same = torch.nn.functional.cosine_similarity(embeddings[:-1], embeddings[-1:]) > 0.999
    expected = [word for word, unknown in zip(words, same, strict=True) if unknown]
    assert mini.unknown_words("mini", as_vocabulary(words)) == expected
    assert mini.unknown_words(mini.checkpoint(), as_vocabulary(words)) == expected
    assert mini.unknown_words(str(mini.checkpoint()), as_vocabulary(words)) == expected
    assert mini.unknown_words("ViT-B/16", as_vocabulary(words)) == []


def test_the_note_names_unknown_words_those_it_knows_and_real_weights():
    note = mini.vocabulary_note("mini", as_vocabulary(["cat", "dog", ["person", "ship"]], "rug"))
    assert note.startswith("rug, dog, person: unknown to the mini CLIP")
    for known in (as_vocabulary(["cat"]), None):
        assert mini.vocabulary_note("mini", known).startswith("the mini CLIP knows the words of")
        assert all(name in mini.vocabulary_note("mini", known) for name in mini.CLASSES)
    assert "sfp weights get ViT-B/16" in note
    assert mini.vocabulary_note("ViT-B/16", as_vocabulary(["dog"])) == ""
    many = mini.vocabulary_note("mini", as_vocabulary([f"word {i}" for i in range(1000)]))
    assert many.startswith("word 0, ")
    assert "word 9, and 990 more: unknown" in many


def test_prepare_writes_what_scene_draws_and_then_leaves_it(tmp_path):
    root = mini.prepare(tmp_path / "deep" / "mini", scenes=3, first_seed=50)
    image, labels = mini.scene(51)
    assert (cv2.imread(str(root / "images/51.png"))[..., ::-1] == image).all()
    assert (cv2.imread(str(root / "labels/51.png"), cv2.IMREAD_UNCHANGED) == labels).all()

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert mini.prepare(root, scenes=3, first_seed=50) == root
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert [path.name for path in root.parent.iterdir()] == ["mini"]


def test_prepare_repairs_and_replaces(tmp_path):
    root = mini.prepare(tmp_path / "mini", scenes=2, first_seed=0)
    good = (root / "images/1.png").read_bytes()
    (root / "images/1.png").write_bytes(good[:100])
    mini.prepare(root, scenes=2, first_seed=0)
    assert (root / "images/1.png").read_bytes() == good
    mini.prepare(root, scenes=1, first_seed=5)
    assert [path.name for path in (root / "labels").iterdir()] == ["5.png"]


def test_prepare_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: mini.prepare(tmp_path / "mini", 3, 0), range(8)))
    assert roots == {tmp_path / "mini"}
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert len(list((tmp_path / "mini/images").iterdir())) == 3


def test_prepare_shows_nothing_unfinished(tmp_path, monkeypatch):
    def crash(seed):
        raise KeyboardInterrupt

    scenes.fingerprint()  # drawn before drawing breaks
    monkeypatch.setattr(scenes, "scene", crash)
    with pytest.raises(KeyboardInterrupt):
        mini.prepare(tmp_path / "mini")
    assert not list(tmp_path.iterdir())


def test_prepare_never_deletes_a_strangers_files(tmp_path):
    mini.prepare(tmp_path, scenes=1, first_seed=0)  # into an empty folder
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="other files"):
        mini.prepare(tmp_path, scenes=2, first_seed=0)
    assert (tmp_path / "thesis.tex").exists()


TINY = train.Recipe(
    steps=20, scenes=24, layers=2, width=64, batch=8, pool=1, warmup=1, rate=3e-3, whole=0.1
)


@pytest.mark.slow
def test_training_learns_and_resumes_with_the_same_step(tmp_path):
    training = train.Training(TINY, tmp_path)
    losses = [training.advance()["loss"] for _ in range(12)]
    training.save()
    losses += [training.advance()["loss"] for _ in range(8)]
    assert np.mean(losses[-6:]) < 0.9 * losses[0]

    again = train.Training(TINY, tmp_path, resume=True)
    assert again.step == 12
    assert [again.advance()["loss"] for _ in range(8)] == pytest.approx(losses[12:], rel=1e-4)


@pytest.mark.slow
def test_run_ends_with_a_log_and_a_checkpoint(tmp_path):
    recipe = dataclasses.replace(TINY, steps=2)
    train.Training(recipe, tmp_path).run(log_every=1)
    log = (tmp_path / "train.log").read_text()
    assert "step 2 " in log
    assert "maskclip" in log
    assert (tmp_path / "mini.safetensors").exists()
    longer = train.Training(dataclasses.replace(recipe, steps=3), tmp_path, resume=True)
    assert len(longer.run()) == 1


@pytest.mark.slow
def test_export_sees_the_large_picture_as_training_sees_its_half(tmp_path):
    training = train.Training(TINY, tmp_path)
    small = torch.randn(2, 3, train.SIDE, train.SIDE)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    state = train.export(training.learner.clip, training.tokens.used)
    assert state["token_embedding.weight"].shape == (train.VOCABULARY, TINY.text_width)
    clip = load_clip(state, activation="quick_gelu")
    with torch.no_grad():
        torch.testing.assert_close(
            clip.encode_image(large), training.learner.clip.encode_image(small), atol=1e-2, rtol=0
        )
        ids = tokenize(["a photo of a cat."])
        mine = training.learner.clip.encode_text(training.tokens(["a photo of a cat."]))
        torch.testing.assert_close(clip.encode_text(ids), mine, atol=1e-2, rtol=0)
