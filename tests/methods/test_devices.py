"""GPU problems detected on a CPU: tensors on the wrong device, and synchronisation with the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

import sfp
from sfp.engine import Engine, Queries
from sfp.export import ExportError, Static
from sfp.registry import list_methods
from sfp.tokens import Tokens

ON_THE_HOST = {  # by method: what it does there by design
    "activesam": "instances of each query are counted, and queries",
    "cliptrase": "DBSCAN, and its clusters one by one",
    "corrclip": "a token per region, of which each window has another number",
    "lavg": "a mask per region",
    "lposs": "a sparse graph of patches",
    "lposs_plus": "the same",
    "freecp": "boxes around components of masks",
    "ov_stitcher": "a token per region, as corrclip",
    "region_memory": "a token per region, as corrclip",
    "s2c2seg": "classes of each window are counted",
    "sam3": "instances of each query are counted",
    "segearth_ov3": "the same",
    "textregion": "a mask per region",
}


def guide(image: Tensor, **options: str) -> Tokens:
    """A stand-in for an encoder, of which every method takes what it asks for."""
    grid = (image.shape[2] // 8, image.shape[3] // 8)
    patches = torch.arange(1, 1 + grid[0] * grid[1], device=image.device)[:, None]
    angles = patches * torch.arange(1, 25, device=image.device)
    return Tokens(angles.sin().expand(len(image), -1, -1), grid, 0)


guide.across = lambda entering, join: join(entering)  # its last block changes nothing


def logits(method: sfp.Method, within: Callable) -> Tensor:
    clip, image, text = tiny.clip(), tiny.images(2, 96, 64), tiny.queries(5)
    ids = (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0.5).long()
    method.operate(clip.visual)
    with torch.inference_mode(), within():
        found, _ = method.logits(
            clip.visual,
            image,
            text,
            index=range(5),
            guides=dict(dino=guide, sam=tiny.Sam(), clipseg=tiny.Scorer(), sam3=tiny.Sam3()),
            words=tiny.words(5),
            regions=ids,
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_no_operator_depends_on_values(name):
    method = sfp.build_method(name)
    if name in ON_THE_HOST:
        with pytest.raises(ExportError, match="decides on the host"):
            logits(method, Static)
    else:
        assert logits(method, Static).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_every_tensor_says_where_it_is_made(name):
    """With another default device, a tensor that does not say so meets those of the images."""
    method = sfp.build_method(name)
    found = logits(method, lambda: torch.device("meta"))
    expected = logits(method, torch.enable_grad)
    # other kernels run there, and propagation over a graph makes much of rounding
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sfp", "sfp_paper"])
def test_the_engine_too(name):
    engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32, pamr_steps=2, area_thd=0.1)
    queries = Queries(tiny.queries(5), (0, 1, 1, 2, 3))
    image = (tiny.images(1, 90, 130)[0] * 40 + 120).clamp(0, 255).byte()

    def labels() -> Tensor:
        (sheets,) = engine.logits([sfp.build_method(name)], [image], [(300, 280)], queries)
        return engine.label(image, sheets[0], queries.index, scores=True).labels

    with torch.device("meta"):
        found = labels()
    assert torch.equal(found, labels())
