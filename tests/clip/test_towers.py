"""Image towers of other families, each against the package that defines it."""

from __future__ import annotations

import copy
import functools
import random
import re

import pytest
import tiny
import torch
import towers
from torch import Tensor
from torch.nn import functional as F
from towers import FAMILIES, Family

import sfp
from sfp.clip.checkpoints import image_layouts
from sfp.clip.fingerprint import contents_digest, state_key
from sfp.clip.int8 import quantised
from sfp.clip.vit import VisionTransformer
from sfp.method import Readout
from sfp.registry import bind

pytestmark = pytest.mark.usefixtures("no_grad")
EACH = pytest.mark.parametrize("name", FAMILIES)
QUERIES = 5


def colours(image: Tensor, output: str | None = None) -> sfp.Tokens:
    """A stand-in for an external encoder: mean colours of 4 x 4 cells."""
    maps = F.adaptive_avg_pool2d(image.float(), (4, 4))
    return sfp.Tokens(maps.flatten(2).mT, (4, 4), prefix=0)


def ids(image: Tensor) -> Tensor:
    """Regions: columns of 8 pixels."""
    columns = torch.arange(image.shape[3]) // 8 + 1
    return columns.expand(len(image), *image.shape[2:])


colours.across = lambda entering, join: join(entering)  # type: ignore[attr-defined]
GUIDES = dict(dino=colours, sam=tiny.Sam(), clipseg=tiny.Scorer(), sam3=tiny.Sam3())


@functools.cache
@torch.random.fork_rng()
def family(name: str) -> Family:
    return FAMILIES[name]()


@functools.cache
def tower(name: str) -> VisionTransformer:
    return family(name).tower()


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=tolerance, rtol=0)


def compared(given: Family, ours: VisionTransformer, image: Tensor, **knobs) -> None:
    """Tokens of every block and the embedding."""
    rescale = knobs.pop("rescale", None)
    if rescale is not None:
        ours.rope.rescale = rescale
    try:
        expected, outputs = given.run(image)
        trace = ours.trace(image, **knobs)
        for i, tokens in enumerate([*trace.outputs, trace.leaving()][: len(outputs)]):
            close(tokens.data, outputs[i])
        close(trace.global_embedding(), expected)
        if not knobs:
            close(ours(image), expected)
    finally:
        if rescale is not None:
            ours.rope.rescale = False


@pytest.mark.slow
@EACH
def test_on_the_grid_of_training(name):
    compared(family(name), tower(name), tiny.images(2, *family(name).size))


@pytest.mark.slow
@EACH
def test_on_another_grid(name):
    given = family(name)
    compared(given, tower(name), tiny.images(2, *given.other), **given.knobs)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "MobileCLIP-B"])  # of fixed sizes
def test_other_sizes(name, monkeypatch):
    """Drawn at random: depth, heads, patches, grids, batches; a name always draws the same."""
    draw = random.Random(name)
    heads, head = draw.choice([(2, 4), (1, 24), (3, 8), (2, 12), (6, 16)])
    patch, cells = draw.choice([4, 5, 7, 14]), draw.randint(1, 6)
    sizes = dict(
        HEADS=heads, WIDTH=heads * head, DEPTH=draw.randint(1, 4), EMBED=8 * draw.randint(1, 5)
    )
    for key, value in dict(sizes, PATCH=patch, SIDE=patch * cells).items():
        monkeypatch.setattr(towers, key, value)
    given = FAMILIES[name]()
    ours = given.tower()
    compared(given, ours, tiny.images(draw.randint(1, 3), *given.size))
    # grids of one column are left out: PyTorch's antialiased `interpolate`, which the packages call,
    # is wrong for them in float32
    grid = (draw.randint(1, 8), draw.randint(7, 9))
    compared(given, ours, tiny.images(2, *(patch * cells for cells in grid)), **given.knobs)


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize("biases", [True, False])
def test_registers_and_biases(registers, biases):
    """As many as a configuration asks for; queries, keys and values may have no biases."""
    for given in (
        towers.tipsv2(num_register_tokens=registers, qkv_bias=biases),
        towers.transformers_radio(num_registers=registers, qkv_bias=biases),
    ):
        compared(given, given.tower(), tiny.images(2, *given.other))


# -- dense features --------------------------------------------------------------------------------

POOLED = [name for name in FAMILIES if name.startswith(("SigLIP", "NaFlex", "PE", "CoCa"))]


def tokens_of(name: str, count: int = 2, size: tuple[int, int] | None = None) -> sfp.Tokens:
    """What leaves the last block."""
    return tower(name).trace(tiny.images(count, *(size or family(name).size))).leaving()


@EACH
def test_equal_tokens_contribute_what_they_are_pooled_to(name):
    """Softmax over equal scores is a mean of equal values: what a single token contributes."""
    ours, leaving = tower(name), tokens_of(name)
    equal = leaving.with_data(leaving.data[:, -1:].expand_as(leaving.data))
    expected = ours.embedding(equal)
    close(ours.project(equal).data, expected[:, None].expand(-1, equal.data.shape[1], -1))


@pytest.mark.parametrize("name", ["SigLIP", "SigLIP timm", "NaFlex", "PE G"])
def test_an_image_of_one_patch(name):
    """Without a class token its feature is the image's embedding."""
    ours, image = tower(name), tiny.images(2, towers.PATCH, towers.PATCH)
    features = ours.project(ours.trace(image).leaving())
    close(features.data[:, 0], ours(image))


def by_the_query(heads: sfp.Heads, trace: sfp.Trace) -> Tensor:
    """Every token attends as the pool's learned query does."""
    vit, tokens = trace.vit, heads.k.shape[2]
    query = vit.pool.query.unflatten(0, (vit.pool.num_heads, 1, -1))
    return heads.similar(query, heads.k).softmax(-1).expand(-1, -1, tokens, -1)


def uniform(heads: sfp.Heads, trace: sfp.Trace) -> Tensor:
    tokens = heads.k.shape[2]
    return torch.full((1, 1, tokens, tokens), 1 / tokens)


@pytest.mark.parametrize("name", POOLED)
def test_attention_in_the_pool(name):
    """As the query attends, every patch is the image; by itself, what it contributes; TextRegion."""
    ours, image = tower(name), tiny.images(2, *family(name).size)

    def read(rule) -> Tensor:
        method = sfp.Method(readouts=[Readout(attention=rule, block="pool")])
        return method.features(ours, image)[0].data

    leaving = tokens_of(name)
    count = leaving.data.shape[1]
    close(read(by_the_query), ours(image)[:, None].expand(-1, count, -1))
    alone = ours.project(leaving).data
    close(read(dict(type="identity")), alone)
    # a constant key gives the mean of all values, which comes before everything that follows
    pool, normal = ours.pool, ours.ln_post(leaving.data)
    mean = ours.joint(pool.finish(pool.values(normal).mean(1)))
    close(read(uniform), mean[:, None].expand(-1, count, -1))


@pytest.mark.parametrize("keys", ["pool", "last"])
def test_rules_in_the_pool_see_the_keys_they_ask_for(keys):
    ours, image = tower("PE"), tiny.images(2, 40, 24)
    seen = []

    def rule(heads, trace):
        seen.append(heads)
        return heads.logits("q", "k").softmax(-1)

    readout = Readout(attention=rule, block="pool", pool_keys=keys)
    method = sfp.Method(readouts=[readout])
    features, trace = method.features(ours, image)
    (heads,) = seen
    if keys == "pool":
        normal = ours.ln_post(trace.leaving().data)
        width = ours.pool.width
        weight, bias = ours.pool.in_proj_weight[:width], ours.pool.in_proj_bias[:width]
        expected = F.linear(normal, weight, bias).unflatten(-1, (8, -1)).transpose(1, 2)
        close(heads.k, expected)
        assert heads.q is heads.k or torch.equal(heads.q, heads.k)
        weights = (expected @ expected.mT * expected.shape[-1] ** -0.5).softmax(-1)
    else:
        assert torch.equal(heads.k, trace.heads(len(ours.blocks) - 1).k)
        weights = trace.mean_attention(len(ours.blocks) - 1)[:, None]  # 4 heads, 8 in the pool
    values = ours.pool.heads(trace.leaving().with_data(ours.ln_post(trace.leaving().data))).v
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    close(features.data, ours.joint(ours.pool.finish(ours.pool.out_proj(mixed))))


def test_the_pool_without_its_mlp():
    ours, image = tower("SigLIP"), tiny.images(2, 40, 24)
    kept, trace = sfp.build_method("maskclip").features(ours, image)
    left, _ = sfp.build_method("maskclip", pool_mlp=False).features(ours, image)
    assert (kept.data - left.data).abs().max() > 0.1
    y = sfp.Method(readouts=[Readout(attention=dict(type="identity"))]).readouts[0](trace)
    values = ours.pool.values(ours.ln_post(y.data))
    close(left.data, values)
    for name in ("CoCa", "TIPSv2"):
        with pytest.raises(ValueError, match="pool_mlp=False: this tower has no MLP"):
            sfp.build_method("maskclip", pool_mlp=False).features(tower(name), image)


@pytest.mark.parametrize("name", ["EVA02", "PE", "PE G"])
def test_rotary_positions(name):
    """Scores depend on where two patches lie to each other; EVA's on shares of the image."""
    ours = tower(name)
    x = torch.randn(1, 1, 1, ours.rope.head_width).expand(-1, -1, 24 + ours.prefix, -1)
    y = torch.randn(1, 1, 1, ours.rope.head_width).expand(-1, -1, 24 + ours.prefix, -1)
    q, k = (ours.rope(z, (4, 6), ours.prefix)[0, 0, ours.prefix :] for z in (x, y))
    scores = (q @ k.T).unflatten(1, (4, 6)).unflatten(0, (4, 6))
    close(scores[:3, :5, :3, :5], scores[1:, 1:, 1:, 1:])  # all shifted by a row and a column
    prefix = slice(ours.prefix)
    assert torch.equal(ours.rope(x, (4, 6), ours.prefix)[:, :, prefix], x[:, :, prefix])
    twice = ours.rope.angles((8, 12)).unflatten(0, (8, 12))[::2, ::2].flatten(0, 1)
    same = torch.allclose(twice, ours.rope.angles((4, 6)))
    assert same == (name == "EVA02")
    block = ours.blocks[0]
    heads = block.heads(ours.embed(tiny.images(1, 32, 48)))
    plain = bind(dict(type="unrotated", rule=dict(type="self_self", pairs=["qk"])))(heads, None)
    q, k = block.attn.project(heads.x, "qk")
    close(plain, (q @ k.mT * heads.scale).softmax(-1))
    assert (plain - heads.logits("q", "k").softmax(-1)).abs().max() > 1e-3


def test_flattened_patches_are_a_convolution():
    given = family("NaFlex")
    weight = given.state["vision_model.embeddings.patch_embedding.weight"]
    bias = given.state["vision_model.embeddings.patch_embedding.bias"]
    image = tiny.images(1, 16, 24)
    cells = image.unfold(2, 8, 8).unfold(3, 8, 8)  # (1, 3, 2, 3, 8, 8)
    flat = cells.permute(0, 2, 3, 4, 5, 1).flatten(3)
    close(tower("NaFlex").conv1(image), F.linear(flat, weight, bias).permute(0, 3, 1, 2))


def test_what_stands_in_for_a_class_token():
    """The pool's query: its attention for the token's, what it gathers for the token itself."""
    ours = tower("SigLIP")
    trace = ours.trace(tiny.images(2, 40, 24))
    entering = trace.entering(1)
    normal = entering.with_data(ours.ln_post(entering.data))
    heads = ours.pool.heads(normal)
    query = ours.pool.query.unflatten(0, (ours.pool.num_heads, 1, -1))
    row = (query @ heads.k.mT * heads.scale).softmax(-1).mean(1)  # (B, 1, T)
    close(trace.cls_row(1), row)
    close(trace.mean_row_and_diagonal(1)[0], row[:, 0])
    close(entering.cls, row @ entering.data)
    assert torch.equal(entering.with_cls().data[:, :1], entering.cls)
    with pytest.raises(ValueError, match="no class token"):
        tower("EVA01").trace(tiny.images(1, 32, 32)).leaving().only_patches().cls  # noqa: B018


# -- every method on every tower -------------------------------------------------------------------


@functools.cache
def presets() -> dict[str, sfp.Method]:
    return {name: sfp.build_method(name) for name in sfp.list_methods()}


# why a method cannot be read in a pool: it reads several blocks, has no rule, or no readout to move
NOT_IN_A_POOL = "replaces only the last block|needs an attention rule|has its own reader"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "MobileCLIP-B"])  # two blocks only
def test_every_preset(name):
    """It runs, and logits are finite."""
    ours = tower(name)
    image = tiny.images(1, 5 * ours.patch, 3 * ours.patch)
    text = tiny.queries(QUERIES, width=ours.embed_dim)
    for preset, method in presets().items():
        logits, _ = method.logits(
            ours, image, text, guides=GUIDES, regions=ids(image), words=tiny.words(QUERIES)
        )
        assert logits.isfinite().all(), preset


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SigLIP", "PE", "CoCa"])
@pytest.mark.parametrize("keys", ["pool", "last"])
def test_every_preset_in_the_pool(name, keys):
    """It runs there or is refused when it is built, with the reason."""
    ours, ran = tower(name), set()
    image = tiny.images(1, 5 * ours.patch, 3 * ours.patch)
    text = tiny.queries(QUERIES, width=ours.embed_dim)
    for preset in sfp.list_methods():
        try:
            method = sfp.build_method(preset, block="pool", pool_keys=keys)
        except ValueError as error:
            assert re.search(NOT_IN_A_POOL, str(error)), preset  # noqa: PT017
            continue
        logits, _ = method.logits(
            ours, image, text, guides=GUIDES, regions=ids(image), words=tiny.words(QUERIES)
        )
        assert logits.isfinite().all(), preset
        ran.add(preset)
    assert ran >= {
        "maskclip",
        "sclip",
        "clearclip",
        "naclip",
        "scclip",
        "sfp",
        "proxyclip",
        "resclip",
    }


def test_towers_without_a_pool_refuse_it():
    method = sfp.build_method("naclip", block="pool")
    with pytest.raises(ValueError, match="this tower has no attention pool"):
        method.features(tower("TIPSv2"), tiny.images(1, 32, 32))


# -- precision and batches -------------------------------------------------------------------------


@pytest.mark.slow
@EACH
def test_batches_and_precision(name):
    """A batch is its single images; float64 agrees; half precision and 8 bits stay finite."""
    ours = tower(name)
    image = tiny.images(2, 5 * ours.patch, 3 * ours.patch)
    method = sfp.build_method("naclip")
    features = method.features(ours, image)[0].data
    close(features[:1], method.features(ours, image[:1])[0].data, 1e-5)
    exact = copy.deepcopy(ours).double()
    close(features.double(), method.features(exact, image.double())[0].data, 1e-5)
    close(ours(image).double(), exact(image.double()), 1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(ours).to(dtype)
        rough = method.features(half, image)[0].data
        assert rough.dtype == dtype
        close(rough.double(), features.double(), 0.1)
        assert half(image).isfinite().all()
    rounded = quantised(ours)
    close(method.features(rounded, image)[0].data, features, 0.15)


def test_the_fingerprint_sees_switches():
    ours = tower("PE")
    before = state_key(ours), contents_digest(ours)
    ours.rope.rescale = True
    try:
        assert state_key(ours) != before[0]
        assert contents_digest(ours) != before[1]
    finally:
        ours.rope.rescale = False
    assert (state_key(ours), contents_digest(ours)) == before
    assert contents_digest(family("PE").tower()) == before[1]


# -- sizes -----------------------------------------------------------------------------------------


def shapes(width: int, patch: int, side: int, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """A timm tower's tensors that sizes are read off, without values."""
    sizes = {"patch_embed.proj.weight": (width, 3, patch, patch), "pos_embed": (1, side**2, width)}
    sizes |= {name.replace("__", "."): size for name, size in more.items()}
    return {f"visual.trunk.{k}": torch.empty(v, device="meta") for k, v in sizes.items()}


def siglip_shapes(width: int, patch: int, side: int) -> dict[str, Tensor]:
    pool = {
        "attn_pool__latent": (1, 1, width),
        "attn_pool__q__weight": (width, width),
        "attn_pool__q__bias": (width,),
        "attn_pool__kv__weight": (2 * width, width),
        "attn_pool__kv__bias": (2 * width,),
    }
    return shapes(width, patch, side, **pool)


@pytest.mark.parametrize(
    ("width", "patch", "side", "heads", "activation"),
    [
        (768, 16, 14, 12, "gelu"),
        (768, 32, 8, 12, "gelu_tanh"),
        (1024, 16, 16, 16, "gelu"),
        (1024, 16, 32, 16, "gelu_tanh"),
        (1152, 14, 27, 16, "gelu"),
        (1152, 16, 24, 16, "gelu_tanh"),
        (1536, 16, 24, 16, "gelu_tanh"),
    ],
)
def test_what_sizes_tell_of_siglip_in_timm(width, patch, side, heads, activation):
    """timm's own model definitions, which say "gelu_tanh" for some sizes only."""
    _, config, settled = image_layouts.read(siglip_shapes(width, patch, side))
    assert settled
    assert width // config.head_width == heads
    assert config.activation == activation
    assert (config.image_size, config.eps) == (patch * side, 1e-6)


@pytest.mark.parametrize(
    ("width", "patch", "side", "heads"),
    [
        (768, 16, 14, 12),
        (1024, 14, 24, 16),
        (1408, 14, 16, 16),
        (1280, 14, 16, 16),
        (1792, 14, 16, 16),
    ],
)
def test_heads_of_timms_other_towers(width, patch, side, heads):
    """EVA02 and BiomedCLIP, EVA01 g, CLIP H, EVA02-E."""
    _, config, _ = image_layouts.read(shapes(width, patch, side))
    assert width // config.head_width == heads


def test_norms_stand_elsewhere_in_eva02_e():
    _, config, _ = image_layouts.read(shapes(1792, 14, 16))
    assert (config.post_norm, config.head_width) == (True, 112)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("EVA02", lambda row, column: (row * 16 / 5, column * 16 / 3)),
        ("PE", lambda row, column: (column + 1, row + 1)),
        ("PE G", lambda row, column: (column, row)),
    ],
)
def test_angles_by_the_books(name, place):
    """Each publisher's coordinates on a 5 x 3 grid, patch by patch and channel by channel."""
    rope = tower(name).rope
    quarter = rope.head_width // 4
    for n in range(15):
        row, column = divmod(n, 3)
        for i in range(quarter):
            frequency = 10000 ** (-i / quarter)
            first, second = place(row, column)
            assert float(rope.angles((5, 3))[n, i]) == pytest.approx(first * frequency)
            assert float(rope.angles((5, 3))[n, quarter + i]) == pytest.approx(second * frequency)
    x = torch.randn(1, 1, 15, rope.head_width, dtype=torch.float64)
    turned, angle = rope(x, (5, 3), 0), rope.angles((5, 3))
    a, b = x[..., ::2], x[..., 1::2]
    torch.testing.assert_close(turned[..., ::2], a * angle.cos() - b * angle.sin())
    torch.testing.assert_close(turned[..., 1::2], b * angle.cos() + a * angle.sin())
