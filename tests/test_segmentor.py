"""The segmentor: against mmseg's own sliding window, alone and in mmseg's entry points."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model, show_result_pyplot
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp import mini
from sfp.functional.pamr import pamr

pytestmark = pytest.mark.usefixtures("no_grad")

CONFIG = Path(__file__).parents[1] / "configs" / "cfg_mini.py"
NAMES = [["sky", "wall", "tree"], "cat", ["tv", "screen"], "boat"]  # seven queries, four classes
WINDOWS = dict(slide_crop=64, slide_stride=32)
INDEX = [0, 0, 0, 1, 2, 2, 3]


def segmentor(method: str = "sclip", clip: sfp.CLIP | None = None, **settings):
    settings = dict(WINDOWS, query_features=tiny.queries(7)) | settings
    return sfp.OpenVocabSegmentor(clip or tiny.clip(), NAMES, method, **settings)


def sample(**meta) -> SegDataSample:
    return SegDataSample(metainfo=meta)


def predict(model, images: list[Tensor], samples: list[SegDataSample]):
    return model(images, samples, mode="predict")


def logits_by_hand(model, image: Tensor, size: tuple[int, int]) -> Tensor:
    """mmseg's sliding window around the method, upsampled window by window: (Q, H, W)."""

    def network(window: Tensor, metas: object) -> Tensor:
        features, _ = model.method.features(model.clip.visual, window)
        low = torch.cosine_similarity(
            features.as_map()[:, None], tiny.queries(7)[None, :, :, None, None], dim=2
        )
        return F.interpolate(low, window.shape[2:], mode="bilinear")

    if not model.engine.slide_crop:
        features, _ = model.method.features(model.clip.visual, image[None])
        low = torch.cosine_similarity(
            features.as_map()[:, None], tiny.queries(7)[None, :, :, None, None], dim=2
        )
        return F.interpolate(low, size, mode="bilinear")[0]

    class Host:
        class test_cfg:
            stride = (model.engine.slide_stride,) * 2
            crop_size = (model.engine.slide_crop,) * 2

        out_channels = 7
        encode_decode = staticmethod(network)

    logits = EncoderDecoder.slide_inference(Host, image[None], [{}])
    return F.interpolate(logits, size, mode="bilinear")[0]


def scores_by_hand(logits: Tensor, scale: float, area_thd: float | None = None) -> Tensor:
    probs = (scale * logits).softmax(0)
    scores = torch.stack(
        [probs[[q for q, c in enumerate(INDEX) if c == k]].amax(0) for k in range(4)]
    )
    if area_thd is not None:
        counts = scores.argmax(0).flatten().bincount(minlength=4)
        scores[1:][counts[1:] <= area_thd * counts[1:].sum()] = 0
    return scores


def check(result: SegDataSample, scores: Tensor, prob_thd: float = 0.0) -> None:
    torch.testing.assert_close(result.seg_logits.data, scores, atol=2e-5, rtol=0)
    best, labels = scores.max(0)
    labels[best < prob_thd] = 0
    assert result.pred_sem_seg.data.shape == (1, *scores.shape[1:])
    assert result.pred_sem_seg.data.dtype == torch.int64
    wrong = (result.pred_sem_seg.data[0] != labels).float().mean()
    assert wrong < 2e-3  # ties


# -- sizes, windows, batches ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "sfp"])
@pytest.mark.parametrize(
    ("size", "ori"),
    [
        ((64, 64), (64, 64)),
        ((96, 150), (77, 130)),
        ((150, 96), (301, 200)),
        ((40, 200), (40, 200)),  # lower than the crop
        ((30, 24), (90, 72)),  # smaller than the crop on both sides
        ((65, 71), (65, 71)),  # one pixel more than a window
    ],
    ids=str,
)
def test_against_mmsegs_sliding_window(method, size, ori):
    model, image = segmentor(method), tiny.images(1, *size)[0]
    (result,) = predict(model, [image], [sample(ori_shape=ori)])
    check(result, scores_by_hand(logits_by_hand(model, image, ori), 40))


@pytest.mark.parametrize("size", [(64, 64), (96, 150), (150, 40)], ids=str)
def test_a_whole_image_at_once(size):
    model, image = segmentor("sfp", slide_crop=0), tiny.images(1, *size)[0]
    (result,) = predict(model, [image], [sample(ori_shape=(100, 120))])
    check(result, scores_by_hand(logits_by_hand(model, image, (100, 120)), 40))


def test_one_window_is_the_whole_image():
    image = tiny.images(1)[0]
    at_once, windows = (
        predict(segmentor(slide_crop=crop), [image], [sample(ori_shape=(64, 64))])[0]
        for crop in (0, 64)
    )
    torch.testing.assert_close(at_once.seg_logits.data, windows.seg_logits.data)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfp", "clip_surgery"])
def test_images_of_different_sizes_in_one_batch(method):
    sizes = [(96, 150), (64, 64), (150, 96), (30, 24), (96, 150)]
    pictures = [tiny.images(1, *s, seed=i)[0] for i, s in enumerate(sizes)]
    samples = [sample(ori_shape=(s[0] * 2, s[1] + 7)) for s in sizes]
    model = segmentor(method, area_thd=0.1, prob_thd=0.3)
    together = predict(model, pictures, samples)
    assert [id(s) for s in together] == [id(s) for s in samples]
    for picture, size, result in zip(pictures, sizes, together, strict=True):
        (alone,) = predict(model, [picture], [sample(ori_shape=(size[0] * 2, size[1] + 7))])
        torch.testing.assert_close(alone.seg_logits.data, result.seg_logits.data)
        wrong = alone.pred_sem_seg.data != result.pred_sem_seg.data
        assert wrong.float().mean() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("window_batch", [1, 4, 1000])
def test_windows_in_any_portions(window_batch):
    image, shape = tiny.images(1, 130, 150)[0], sample(ori_shape=(130, 150))
    (expected,) = predict(segmentor(), [image], [shape.clone()])
    (result,) = predict(segmentor(window_batch=window_batch), [image], [shape.clone()])
    torch.testing.assert_close(result.seg_logits.data, expected.seg_logits.data)


def test_a_tensor_batch_and_no_samples():
    pictures = tiny.images(2, 64, 100)
    results = segmentor()(pictures, mode="predict")
    for picture, result in zip(pictures, results, strict=True):
        (alone,) = predict(segmentor(), [picture], [sample(ori_shape=(64, 100))])
        torch.testing.assert_close(alone.seg_logits.data, result.seg_logits.data)


def test_an_image_smaller_than_a_patch():
    """Zeros around it make the one patch that there has to be; they take no part in the result."""
    image = tiny.images(1, 7, 90)[0]
    (result,) = predict(segmentor(), [image], [sample(ori_shape=(7, 90))])
    (padded,) = predict(segmentor(), [F.pad(image, (0, 0, 0, 1))], [sample(ori_shape=(8, 90))])
    torch.testing.assert_close(result.seg_logits.data, padded.seg_logits.data[:, :7])
    (dot,) = predict(segmentor(), [torch.ones(3, 1, 1)], [sample(ori_shape=(5, 6))])
    assert dot.seg_logits.data.isfinite().all()
    assert len(dot.pred_sem_seg.data.unique()) == 1


def test_an_original_shape_with_channels():
    (result,) = predict(segmentor(), [tiny.images(1)[0]], [sample(ori_shape=(70, 80, 3))])
    assert result.pred_sem_seg.shape == (70, 80)


# -- modes ---------------------------------------------------------------------------------------


def test_modes():
    model, image = segmentor(), tiny.images(1, 70, 90)[0]
    (logits,) = model([image])
    torch.testing.assert_close(logits, logits_by_hand(model, image, (70, 90)), atol=1e-5, rtol=0)
    with pytest.raises(NotImplementedError, match="training-free"):
        model([image], [sample()], mode="loss")
    with pytest.raises((RuntimeError, ValueError), match="tenser"):
        model([image], mode="tenser")
    features = model.extract_feat(tiny.images(2, 64, 80))
    assert features.data.shape == (2, 80, 32)
    assert features.grid == (8, 10)


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thresholds_and_synonyms():
    image, clip = tiny.images(1, 100, 120, seed=2)[0], tiny.clip()
    logits = logits_by_hand(segmentor(clip=clip), image, (100, 120))
    for scale, area, prob in product((10.0, 50.0), (None, 0.0, 0.2, 0.5), (0.0, 0.4, 0.7)):
        model = segmentor(clip=clip, prob_thd=prob, area_thd=area, logit_scale=scale)
        (result,) = predict(model, [image], [sample(ori_shape=(100, 120))])
        check(result, scores_by_hand(logits, scale, area), prob)


def test_thresholds_act():
    """The settings above are not without effect on that picture."""
    image = tiny.images(1, 100, 120, seed=2)[0]

    def labels(**settings) -> Tensor:
        (result,) = predict(segmentor(**settings), [image], [sample(ori_shape=(100, 120))])
        return result.pred_sem_seg.data

    plain = labels()
    assert len(plain.unique()) > 2
    assert (labels(prob_thd=0.7) != plain).any()
    assert (labels(area_thd=0.5) != plain).any()


def test_without_scores():
    image, shape = tiny.images(1, 90, 70)[0], sample(ori_shape=(45, 35))
    (full,) = predict(segmentor(), [image], [shape.clone()])
    (lean,) = predict(segmentor(scores=False), [image], [shape.clone()])
    assert "seg_logits" not in lean
    assert torch.equal(full.pred_sem_seg.data, lean.pred_sem_seg.data)


def test_pixel_adaptive_refinement():
    """At the original size, guided by the image resized to it."""
    image, ori = tiny.images(1, 80, 96)[0], (60, 100)
    model = segmentor(pamr_steps=3, pamr_dilations=(2, 4))
    (result,) = predict(model, [image], [sample(ori_shape=ori)])
    guide = F.interpolate(image[None], ori, mode="bilinear")
    logits = logits_by_hand(model, image, ori)
    refined = pamr(guide, logits[None], steps=3, dilations=(2, 4))[0]
    assert (refined - logits).abs().max() > 1e-3
    check(result, scores_by_hand(refined, 40))


# -- padding and flips ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["padding_size", "img_padding_size"])
def test_padding_is_taken_off(key):
    """(left, right, top, bottom), as mmseg's preprocessor records it."""
    image, model = tiny.images(1, 70, 90)[0], segmentor()
    padded = F.pad(image, (3, 11, 5, 2), value=7.0)
    (expected,) = predict(model, [image], [sample(ori_shape=(140, 180))])
    meta = dict(ori_shape=(140, 180), **{key: (3, 11, 5, 2)})
    (result,) = predict(model, [padded], [sample(**meta)])
    assert torch.equal(result.seg_logits.data, expected.seg_logits.data)
    (result,) = predict(model, [padded], [sample(**{key: (3, 11, 5, 2)})])
    assert result.pred_sem_seg.shape == (70, 90)  # without `ori_shape`: what was not padded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "axes"),
    [("horizontal", (2,)), ("vertical", (1,)), ("diagonal", (1, 2))],
)
@pytest.mark.parametrize("pamr_steps", [0, 3])
def test_flips_are_turned_back(direction, axes, pamr_steps):
    """As mmcv flips; the refinement is guided by the picture as the labels lie."""
    model = segmentor(pamr_steps=pamr_steps, pamr_dilations=(2, 4))
    flipped = tiny.images(1, 70, 90)[0]
    (expected,) = predict(model, [flipped], [sample(ori_shape=(100, 60))])
    meta = dict(ori_shape=(100, 60), flip=True, flip_direction=direction)
    (result,) = predict(model, [flipped], [sample(**meta)])
    torch.testing.assert_close(
        result.seg_logits.data, expected.seg_logits.data.flip(axes), atol=1e-4, rtol=0
    )
    (ignored,) = predict(
        model, [flipped], [sample(ori_shape=(100, 60), flip=False, flip_direction=direction)]
    )
    assert torch.equal(ignored.seg_logits.data, expected.seg_logits.data)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(query_features=torch.ones(4, 32)), r"\(4, 32\): expected \(7, 32\)"),
        (dict(query_features=torch.ones(7, 31)), r"\(7, 31\): expected \(7, 32\)"),
        (dict(precision="fp8"), "unknown precision 'fp8'; .*valid: auto, bf16, fp16, fp32"),
        (dict(slide_stride=65), "slide_stride=65 must be between 1 and slide_crop=64"),
        (dict(slide_stride=0), "slide_stride=0 must be"),
        (dict(slide_crop=-1), "slide_crop=-1"),
        (dict(window_batch=0), "window_batch=0"),
        (dict(pamr_steps=-1), "pamr_steps=-1"),
        (dict(method=dict(type="sfp", pm="dbscn")), "did you mean 'dbscan'"),
        (dict(classes=[]), "class list is empty"),
        (dict(templates="imagnet"), "'imagnet'"),
    ],
    ids=str,
)
def test_settings_that_are_wrong(settings, message):
    settings = dict(
        dict(WINDOWS, weights=tiny.clip(), classes=NAMES, query_features=tiny.queries(7)),
        **settings,
    )
    with pytest.raises(ValueError, match=message):
        sfp.OpenVocabSegmentor(**settings)


def test_query_features_need_not_be_normalised():
    image, shape = tiny.images(1)[0], sample(ori_shape=(64, 64))
    (expected,) = predict(segmentor(), [image], [shape.clone()])
    loud = sfp.OpenVocabSegmentor(
        tiny.clip(), NAMES, "sclip", query_features=5 * tiny.queries(7).half(), slide_crop=64,
        slide_stride=32,
    )  # fmt: skip
    (result,) = predict(loud, [image], [shape.clone()])
    torch.testing.assert_close(result.seg_logits.data, expected.seg_logits.data, atol=2e-2, rtol=0)


def test_words_are_encoded_once_when_needed(monkeypatch):
    from sfp.clip import text

    model = sfp.OpenVocabSegmentor(
        tiny.clip(**tiny.WORDS), NAMES, "clip", templates=["a {}.", "{}"], **WINDOWS
    )
    assert model.query_features is None
    predict(model, [tiny.images(1)[0]], [sample(ori_shape=(64, 64))])
    expected = text.encode_queries(
        model.clip, ["sky", "wall", "tree", "cat", "tv", "screen", "boat"], ["a {}.", "{}"]
    )
    torch.testing.assert_close(model.text_features(), expected)
    assert "query_features" not in model.state_dict()
    monkeypatch.setattr(text, "encode_queries", None)
    predict(model, [tiny.images(1)[0]], [sample(ori_shape=(64, 64))])


# -- precision, moves, copies --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["clip", "sclip", "sfp"])
def test_half_precision_on_a_cpu(method, precision):
    image, shape = tiny.images(1, 70, 90)[0], sample(ori_shape=(70, 90))
    (expected,) = predict(segmentor(method, logit_scale=10.0), [image], [shape.clone()])
    model = segmentor(method, precision=precision, logit_scale=10.0)
    assert model.clip.visual.proj.dtype == dict(bf16=torch.bfloat16, fp16=torch.float16)[precision]
    (result,) = predict(model, [image], [shape.clone()])
    assert result.seg_logits.data.dtype == torch.float32
    assert result.seg_logits.data.isfinite().all()
    off = (result.seg_logits.data - expected.seg_logits.data).abs().median()
    assert off < dict(bf16=0.02, fp16=0.003)[precision]


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("cpu").eval()]
)
def test_precision_is_the_settings_not_the_callers(move):
    """`precision` decides: other casts are undone, and nothing breaks."""
    image, shape = tiny.images(1, 70, 90)[0], sample(ori_shape=(70, 90))
    model = segmentor()
    (expected,) = predict(model, [image], [shape.clone()])
    moved = move(model)
    assert moved is model
    (result,) = predict(model, [image], [shape.clone()])
    assert model.clip.visual.proj.dtype == torch.float32
    torch.testing.assert_close(
        result.seg_logits.data.float(), expected.seg_logits.data, atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("method", ["sfp", "gclip"])
def test_copies(method):
    model = sfp.OpenVocabSegmentor(
        tiny.clip(**tiny.WORDS), NAMES, method, templates=["{}"], **WINDOWS
    )
    image, shape = tiny.images(1, 70, 90)[0], sample(ori_shape=(70, 90))
    (expected,) = predict(model, [image], [shape.clone()])
    twin = copy.deepcopy(model)  # after a prediction has filled its caches
    twin.to(torch.float32)
    for p in model.clip.parameters():
        p.zero_()
    (result,) = predict(twin, [image], [shape.clone()])
    assert torch.equal(result.seg_logits.data, expected.seg_logits.data)


def test_gradients_of_the_image():
    """A prediction leaves nothing behind that autograd refuses, such as inference tensors."""
    model = sfp.OpenVocabSegmentor(
        tiny.clip(**tiny.WORDS), NAMES, "clip", templates=["{}"], **WINDOWS
    )
    predict(model, [tiny.images(1)[0]], [sample(ori_shape=(64, 64))])
    with torch.enable_grad():
        image = tiny.images(1).requires_grad_()
        logits, _ = model.method.logits(model.clip.visual, image, model.text_features())
        logits.sum().backward()
    assert image.grad.abs().max() > 0


def test_several_segmentors_in_one_process():
    """Two methods over one CLIP, turn by turn."""
    clip, image, shape = tiny.clip(), tiny.images(1)[0], sample(ori_shape=(64, 64))
    models = [segmentor(name, clip) for name in ("gclip", "sfp", "clip_surgery", "clip")]
    first = [predict(m, [image], [shape.clone()])[0].seg_logits.data for m in models]
    again = [predict(m, [image], [shape.clone()])[0].seg_logits.data for m in models[::-1]][::-1]
    alone = [
        predict(segmentor(name), [image], [shape.clone()])[0].seg_logits.data
        for name in ("gclip", "sfp", "clip_surgery", "clip")
    ]
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# -- preprocessing -------------------------------------------------------------------------------


def test_the_preprocessor_normalises_each_image():
    mean, std = torch.tensor([122.771, 116.746, 104.094]), torch.tensor([68.501, 66.632, 70.323])
    bgr = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in ((20, 30), (30, 20))]
    before = [x.clone() for x in bgr]
    build = MODELS.build(dict(type="ImagePreprocessor"))
    data = build(dict(inputs=bgr, data_samples=[sample(), sample()]))
    for x, y, z in zip(bgr, data["inputs"], before, strict=True):
        expected = ((x.flip(0).permute(1, 2, 0).float() - mean) / std).permute(2, 0, 1)
        torch.testing.assert_close(y, expected)
        assert torch.equal(x, z)
    rgb = MODELS.build(dict(type="ImagePreprocessor", bgr_to_rgb=False, mean=[0] * 3, std=[1] * 3))
    assert torch.equal(rgb(dict(inputs=bgr))["inputs"][1], bgr[1].float())


# -- mmseg's entry points ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A random CLIP that reads words: patch 32, 224 pixels, like a small ViT-B/32."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return str(tiny.save(path, **dict(tiny.WORDS, patch=32, image_size=224)))


@pytest.fixture
def config(weights) -> Config:
    config = Config.fromfile(str(CONFIG))
    config.merge_from_dict({"model.weights": weights, "test_dataloader.dataset.scenes": 3})
    return config


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Files of different sizes and forms."""
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(120, 200, 3), (300, 224, 3), (90, 90)]):
        coarse = rng.integers(0, 256, (6, 8, *size[2:]), np.uint8)
        paths.append(str(tmp_path / f"picture {i}.png"))
        cv2.imwrite(paths[-1], cv2.resize(coarse, size[1::-1], interpolation=cv2.INTER_CUBIC))
    return paths


@pytest.mark.slow
def test_init_model_and_inference_model(config, pictures):
    model = init_model(config, device="cpu")
    assert model.dataset_meta["classes"] == mini.CLASSES
    result = inference_model(model, pictures[0])
    assert result.pred_sem_seg.shape == (120, 200)
    labels = result.pred_sem_seg.data
    assert 0 <= labels.min() <= labels.max() < 18
    results = inference_model(model, pictures)
    assert [r.pred_sem_seg.shape for r in results] == [(120, 200), (300, 224), (90, 90)]
    assert torch.equal(results[0].pred_sem_seg.data, labels)
    array = inference_model(model, cv2.imread(pictures[0]))
    assert torch.equal(array.pred_sem_seg.data, labels)
    arrays = inference_model(model, [cv2.imread(path) for path in pictures])
    for a, b in zip(arrays, results, strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)


def test_init_model_from_a_path(weights, pictures):
    model = init_model(str(CONFIG), device="cpu", cfg_options={"model.weights": weights})
    assert inference_model(model, pictures[0]).pred_sem_seg.shape == (120, 200)


def test_words_of_ones_own(config, pictures, tmp_path):
    """A list in place of the class file, and a picture of the result."""
    config.model.classes = [["a red thing", "something red"], "a blue thing", "anything"]
    model = init_model(config, device="cpu")
    result = inference_model(model, pictures[0])
    assert set(result.pred_sem_seg.data.unique().tolist()) <= {0, 1, 2}
    drawn = show_result_pyplot(
        model, cv2.imread(pictures[0]), result, show=False, out_file=str(tmp_path / "drawn.png")
    )
    assert drawn.shape == (120, 200, 3)
    assert cv2.imread(str(tmp_path / "drawn.png")).shape == (120, 200, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # "weights is None", which ours are not
def test_inferencer(config, pictures, tmp_path):
    expected = inference_model(init_model(copy.deepcopy(config), device="cpu"), pictures)
    inferencer = MMSegInferencer(model=config, device="cpu")
    out = inferencer(pictures, out_dir=str(tmp_path / "out"), return_vis=True, batch_size=2)
    for path, labels, one, vis in zip(
        pictures, out["predictions"], expected, out["visualization"], strict=True
    ):
        assert np.array_equal(labels, one.pred_sem_seg.data[0].numpy())
        assert (tmp_path / "out" / "vis" / Path(path).name).is_file()
        assert vis.shape[:2] == labels.shape
    assert len(list((tmp_path / "out" / "pred").iterdir())) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_inferencer_names_our_classes(config, pictures):
    """It sets Cityscapes' names and colours on every model without a checkpoint file of mmseg's."""
    inferencer = MMSegInferencer(model=config, device="cpu")
    assert inferencer.model.dataset_meta["classes"] == mini.CLASSES
    out = inferencer(pictures[0], return_vis=True, opacity=1.0, with_labels=False)
    palette = np.array(inferencer.model.dataset_meta["palette"])
    assert len({tuple(colour) for colour in palette.tolist()}) == 18
    assert np.array_equal(out["visualization"], palette[out["predictions"]])


@pytest.mark.slow
def test_runner_with_batches(config, tmp_path):
    """Two images a batch, of different sizes: the same counts as one by one."""
    summaries = []
    for batch_size in (1, 2):
        one = copy.deepcopy(config)
        one.work_dir = str(tmp_path / str(batch_size))
        one.experiment_name = f"batches of {batch_size}"
        one.test_dataloader.update(batch_size=batch_size, num_workers=0)
        one.log_level = "ERROR"
        with DefaultScope.overwrite_default_scope("mmseg"):
            runner = Runner.from_cfg(one)
            dataset = runner.test_dataloader.dataset
            for i, path in enumerate(sorted(Path(dataset.data_root).glob("*/*.png"))):
                if i % 3 == 1:  # one image and its labels lose some rows
                    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:180])
            runner.test()
        (metric,) = runner.test_evaluator.metrics
        summaries.append(metric.summary)
    for key, value in summaries[0].items():
        np.testing.assert_equal(summaries[1][key], value)


@pytest.mark.slow
def test_the_mini_world(tmp_path, monkeypatch):
    """The shipped checkpoint reads its world: better than chance, and SFP runs on it.

    Chance is 100 / 18 % of the pixels right. The checkpoint's own figures are in sfp/mini; this says
    only that names, weights, pixels and labels fit together.
    """
    root = mini.prepare(tmp_path / "scenes", scenes=6, first_seed=910_000)
    config = Config.fromfile(str(CONFIG))
    scores = {}
    for method in ("clip", "sclip", "sfp", "sfp_paper"):
        config.model.pop("method")
        config.model.method = dict(type=method)
        model = init_model(config, device="cpu")
        right = pixels = 0
        intersect, union = np.zeros(18), np.zeros(18)
        files = sorted((root / "images").iterdir())
        for path, result in zip(
            files, inference_model(model, [str(f) for f in files]), strict=True
        ):
            ours = result.pred_sem_seg.data[0].numpy()
            truth = cv2.imread(str(root / "labels" / path.name), cv2.IMREAD_UNCHANGED)
            right += (ours == truth).sum()
            pixels += truth.size
            for k in range(18):
                intersect[k] += ((ours == k) & (truth == k)).sum()
                union[k] += ((ours == k) | (truth == k)).sum()
        scores[method] = (right / pixels, (intersect[union > 0] / union[union > 0]).mean())
    for accuracy, miou in scores.values():
        assert accuracy > 2 / 18, scores
        assert miou > 1 / 18, scores


# -- mmsegmentation's own doors ------------------------------------------------------------------


def test_the_base_config_serves_the_inferencer():
    """Its pipeline stands where `MMSegInferencer` looks for one."""
    config = Config.fromfile(str(CONFIG.with_name("base_config.py")))
    config.model.update(weights="mini", classes=["cat", ["sofa", "couch"], "floor", "wall"])
    found = MMSegInferencer(model=config, device="cpu")(np.zeros((60, 80, 3), np.uint8))
    assert found["predictions"].shape == (60, 80)


@pytest.mark.slow
@pytest.mark.parametrize("scores", [True, False])
def test_test_time_augmentation(tmp_path, scores):
    """Mirrored twins and another scale are averaged; one class is no sigmoid."""
    from mmengine.dataset import Compose, pseudo_collate
    from mmseg.models import SegTTAModel

    path = str(tmp_path / "a.png")
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    sizes = [dict(type="Resize", scale_factor=f, keep_ratio=True) for f in (1.0, 1.5)]
    flips = [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)]
    keys = ("img_path", "ori_shape", "img_shape", "flip", "flip_direction")
    pack = dict(type="PackSegInputs", meta_keys=keys)
    augment = dict(type="TestTimeAug", transforms=[sizes, flips, [pack]])
    with DefaultScope.overwrite_default_scope("mmseg"):
        steps = Compose([dict(type="LoadImageFromFile"), augment])
        info = dict(img_path=path, seg_fields=[], reduce_zero_label=False)
        data = pseudo_collate([steps(info)])
        for names in (["sky", "grass"], ["sky"]):
            model = sfp.OpenVocabSegmentor("mini", names, scores=scores)
            (sample,) = SegTTAModel(module=model).test_step(data)
            assert sample.pred_sem_seg.data.squeeze().shape == (70, 90)
            assert sample.pred_sem_seg.data.max() < len(names)
