"""Keys of caches: they must change with a model, and only then."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
from torch import nn

from sfp.clip.fingerprint import SAMPLES, SUMMED, _step, contents_digest, state_key


def noisy(state):
    generator = torch.Generator().manual_seed(1)
    return {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in state.items()}


def finetune(clip):
    clip.requires_grad_(True)
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.1)
    clip.encode_text(torch.tensor([[1, 2, 511]])).sum().backward()
    optimizer.step()
    clip.requires_grad_(False)


def replace(clip):
    clip.text.text_projection = nn.Parameter(clip.text_projection + 1, requires_grad=False)


def through_numpy(clip):
    clip.text_projection.numpy()[3, 5] += 1


def prune(clip):
    for block in clip.transformer.resblocks:
        block.attn.in_proj_weight.data[:8] = 0


def parametrize(clip):
    nn.utils.parametrize.register_parametrization(
        clip.transformer.resblocks[0].mlp.c_fc, "weight", nn.Tanh()
    )


def hook(clip):
    clip.ln_final.register_forward_hook(lambda *args: 2 * args[2])


def method(clip):
    clip.transformer.resblocks[0].forward = lambda x, causal: x


def inside_inference_mode(clip):
    with torch.inference_mode():
        clip.text_projection.add_(1)


TEXT_CHANGES = dict(
    load_state_dict=lambda c: c.load_state_dict(noisy(c.state_dict())),
    load_assigned=lambda c: c.load_state_dict(noisy(c.state_dict()), assign=True),
    in_place=lambda c: c.text_projection.mul_(1.5),
    one_number=lambda c: c.token_embedding.weight[7].add_(1),
    inference_mode=inside_inference_mode,
    data=lambda c: c.text_projection.data.mul_(-1),
    data_row=lambda c: c.token_embedding.weight.data[7].add_(1),
    data_column=lambda c: c.token_embedding.weight.data[:, 7].add_(1),
    data_assigned=lambda c: setattr(c.ln_final.bias, "data", c.ln_final.bias + 1),
    data_number=lambda c: c.text_projection.data[3, 5].add_(1),
    scalar=lambda c: c.logit_scale.data.add_(1),
    numpy=through_numpy,
    heads_pruned=prune,
    half_of_it=lambda c: c.transformer.half(),
    finetuned=finetune,
    replaced=replace,
    parametrized=parametrize,
    activation=lambda c: setattr(c.transformer.resblocks[0].mlp, "gelu", nn.GELU()),
    gelu_of_another_kind=lambda c: c.transformer.resblocks[0].mlp.gelu.__dict__.update(x="tanh"),
    heads=lambda c: setattr(c.transformer.resblocks[0].attn, "num_heads", 4),
    eps=lambda c: setattr(c.ln_final, "eps", 1e-3),
    block_removed=lambda c: c.transformer.resblocks.pop(1),
    normalisation=lambda c: setattr(c, "mean", (1.0, 2.0, 3.0)),
    to_empty=lambda c: c.to_empty(device="cpu").load_state_dict(noisy(c.state_dict())),
    half_and_back=lambda c: c.half().float(),
)
HERE_ONLY = dict(hook=hook, method=method)  # code, which has no contents


@pytest.mark.slow
@pytest.mark.parametrize("change", [*TEXT_CHANGES, *HERE_ONLY])
def test_every_change_is_seen(change):
    clip = tiny.clip()
    key, digests = state_key(clip), (clip.digest, clip.text_digest)
    assert state_key(clip) == key
    assert (clip.digest, clip.text_digest) == digests
    {**TEXT_CHANGES, **HERE_ONLY}[change](clip)
    assert state_key(clip) != key
    assert clip.digest != digests[0]
    assert clip.text_digest != digests[1]
    if change in TEXT_CHANGES:
        named = clip.digest, clip.text_digest
        assert named == (contents_digest(clip), contents_digest(clip, without=("visual",)))


def test_the_text_digest_minds_the_text_tower_only():
    clip = tiny.clip()
    digest, text_digest = clip.digest, clip.text_digest
    clip.visual.proj.data.mul_(2)
    assert clip.digest != digest
    assert clip.text_digest == text_digest
    assert state_key(clip.visual) == state_key(clip.visual)


@pytest.mark.slow
@pytest.mark.parametrize(
    "move",
    [
        lambda c: c.to("cpu"),
        lambda c: c.half(),
        lambda c: c.to(torch.bfloat16),
        lambda c: nn.ModuleList([c]).half()[0],
        lambda c: c.share_memory(),
        copy.deepcopy,
        lambda c: copy.deepcopy(c.half()),
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: c.requires_grad_(True),
    ],
)
def test_moving_and_rounding_once_keep_the_name_of_the_file(move):
    """Rounding too, since the precision is a part of every key; a second one is a change."""
    clip = tiny.clip()
    name = clip.digest
    moved = move(clip)
    assert moved.digest == moved.text_digest == name
    assert moved.to(torch.float16).to(torch.float32).digest != name


def test_a_changed_model_keeps_its_new_name_when_moved_or_copied():
    clip = tiny.clip()
    clip.text_projection.data.mul_(2)
    digest = clip.digest
    assert clip.to("cpu").digest == copy.deepcopy(clip).digest == digest
    clip.text_projection.data.mul_(2)
    assert copy.deepcopy(clip).digest not in (digest, tiny.clip().digest)


@pytest.mark.slow
@pytest.mark.process
def test_contents_are_equal_in_another_process():
    code = (
        "import tiny; from sfp.clip.fingerprint import contents_digest as d; print(d(tiny.clip()))"
    )
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert run.stdout.decode().strip() == contents_digest(tiny.clip()), run.stderr.decode()


def test_where_values_cannot_be_read_nothing_is_equal():
    class Marked(torch.Tensor):
        pass

    clip = tiny.clip()
    clip.text.text_projection = nn.Parameter(clip.text_projection.as_subclass(Marked), False)
    assert state_key(clip) != state_key(clip)
    assert contents_digest(clip) != contents_digest(clip)
    assert state_key(clip, without=("visual",)) != state_key(clip, without=("visual",))
    assert state_key(clip.visual) == state_key(clip.visual)


def test_under_transforms_and_fake_tensors_nothing_is_equal():
    from torch._subclasses.fake_tensor import FakeTensorMode

    clip = tiny.clip()
    key, seen = state_key(clip.visual), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen += [state_key(clip.visual), clip.digest]

    def call(proj):
        with torch.no_grad():
            seen.extend([state_key(clip.visual)])
        return proj

    torch.func.vmap(call)(torch.zeros(3, 1))
    assert key not in seen
    assert clip.digest not in seen
    assert state_key(clip.visual) == key


@pytest.mark.parametrize(
    "shape",
    [(768, 3, 16, 16), (2304, 768), (768, 3072), (49408, 512), (3, 7000), (7000, 3), (127, 129)],
)
def test_every_row_and_column_is_sampled(shape):
    count = torch.Size(shape).numel()
    assert count > SAMPLES
    columns = count // shape[0]
    places = torch.arange(0, count, _step(torch.Size(shape)))
    assert set((places // columns).tolist()) == set(range(shape[0]))
    assert set((places % columns).tolist()) == set(range(columns))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.cfloat]
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (301, 299), (SUMMED + 1,)])
def test_buffers_of_any_type(dtype, shape):
    module = nn.Module()
    module.register_buffer("x", torch.zeros(shape).to(dtype), persistent=False)
    key, digest = state_key(module), contents_digest(module)
    module.x.data.logical_not_() if dtype == torch.bool else module.x.data.add_(1)
    changed = module.x.numel() > 0
    assert (state_key(module) != key) == (contents_digest(module) != digest) == changed
