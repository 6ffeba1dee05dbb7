"""The image tower's linear layers and in-place operations, which must not affect observers."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sfp.clip import blocks, dispatch, int8, onednn
from sfp.functional.precision import cpu_has

sides = st.integers(1, 40)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=3), sides, sides, st.booleans(), st.integers(0, 99))
def test_linear(outer, wide, out, strided, seed):
    random = torch.Generator().manual_seed(seed)
    step = 2 if strided else 1
    x, weight, bias = (
        torch.randn(*shape, step * last, generator=random)[..., ::step]
        for *shape, last in ((*outer, wide), (out, wide), (out,))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = onednn.linear(x, weight, bias)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_operators_are_there():
    """On the machines of CI; elsewhere `F.linear` takes their place."""
    assert torch.backends.mkldnn.is_available() == onednn.works()
    assert int8.works() == (cpu_has("int8") is not False)


def absent(*args):
    raise AttributeError("no such operator")


def of_another_signature(*args):
    raise RuntimeError("expected at most 5 arguments")


@pytest.mark.parametrize(
    "broken", [absent, of_another_signature, lambda x, w, *_: torch.zeros(len(x), len(w))]
)
def test_operators_that_are_absent_raise_or_are_wrong(broken, monkeypatch):
    """Another version of PyTorch may do any of that with a private name."""
    layer = int8.Int8Linear(torch.randn(8, 16), torch.randn(8))
    x = torch.randn(3, 16)
    expected = layer(x)
    monkeypatch.setattr(onednn, "_product", broken)
    monkeypatch.setattr(torch, "_int_mm", broken)
    for works in (onednn.works, int8.works):
        works.cache_clear()
        assert not works()
    try:
        weight, bias = torch.randn(5, 16), torch.randn(5)
        assert torch.equal(onednn.linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(layer(x), expected)
    finally:
        monkeypatch.undo()
        onednn.works.cache_clear()
        int8.works.cache_clear()


@pytest.mark.parametrize("name", ["in_proj_bias", "out_proj.bias", "c_fc.bias", "c_proj.bias"])
def test_gradients_of_a_single_bias(name, monkeypatch):
    """Equal to those of PyTorch's own layers, though nothing else wants gradients."""
    block = tiny.clip().visual.blocks[0].requires_grad_(False)
    (bias,) = (p for n, p in block.named_parameters() if n.endswith(name))
    bias.requires_grad_(True)
    x = torch.randn(2, 5, block.ln_1.normalized_shape[0])
    grads = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            block(x).square().sum().backward()
        grads.append(bias.grad.clone())
        bias.grad = None
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


class Reference(nn.Module):
    """The tower by PyTorch's own layers, nothing in place."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, image):
        t = self.tower
        maps = F.conv2d(image, t.conv1.weight, stride=t.patch)
        cls = t.class_embedding.expand(len(image), 1, -1)
        x = t.ln_pre(torch.cat([cls, maps.flatten(2).mT], 1) + t.positional_embedding)
        for block in t.blocks:
            y = block.ln_1(x)
            qkv = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias)
            q, k, v = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            out = block.attn.out_proj
            x = x + F.linear(mixed, out.weight, out.bias)
            fc, proj = block.mlp.c_fc, block.mlp.c_proj
            hidden = F.linear(block.ln_2(x), fc.weight, fc.bias)
            x = x + F.linear(hidden * torch.sigmoid(1.702 * hidden), proj.weight, proj.bias)
        return t.ln_post(x[:, 0]) @ t.proj


class EveryFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class EveryOperator(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def by_make_fx(model, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(model)(x)
    assert "_linear_pointwise" not in graph.code
    assert "_int_mm" not in graph.code
    return graph(x + 0)


def by_fake_tensors(model, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    state = {k: mode.from_tensor(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    with mode:
        y = torch.func.functional_call(model, state, (mode.from_tensor(x),))
    assert y.shape == (len(x), y.shape[1])
    return model(x)


def on_the_meta_device(model, x):
    assert copy.deepcopy(model).to("meta")(x.to("meta")).is_meta
    return model(x)


def under(mode):
    def run(model, x):
        with mode as seen:
            y = model(x)
        for name in getattr(seen, "names", ()):
            assert "_linear_pointwise" not in name
            assert "_int_mm" not in name
        return y

    return run


def by_jit_trace(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants
        traced = torch.jit.trace(model, x)
    assert "_linear_pointwise" not in str(traced.inlined_graph)
    return traced(x)


def by_functional_call(model, x):
    parameters = {k: v.detach().clone() for k, v in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (x,))


@sdpa_kernel(SDPBackend.MATH)  # the fused one has no such derivatives
def by_jvp(model, x):
    y, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-3
    slope = (model(x + step) - model(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=0.05, atol=0.05 * float(slope.abs().max()))
    return y


@sdpa_kernel(SDPBackend.MATH)
def by_forward_ad(model, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        assert tangent is not None
        return y.clone()


def by_grad(model, x):
    torch.func.grad(lambda x: model(x).sum())(x)
    return model(x)


RUNS = dict(
    flop_counter=under(FlopCounterMode(display=False)),
    dispatch_mode=under(EveryOperator()),
    function_mode=under(EveryFunction()),
    default_device=under(torch.device("cpu")),
    make_fx=by_make_fx,
    fake_tensors=by_fake_tensors,
    meta=on_the_meta_device,
    export=lambda m, x: torch.export.export(m, (x,)).module()(x),
    jit_trace=by_jit_trace,
    vmap=lambda m, x: torch.func.vmap(lambda one: m(one[None])[0])(x),
    functional_call=by_functional_call,
    functionalize=lambda m, x: torch.func.functionalize(m)(x),
    subclass=lambda m, x: m(x.as_subclass(Marked)).as_subclass(torch.Tensor),
    inference_mode=under(torch.inference_mode()),
)
FLOAT_RUNS = dict(jvp=by_jvp, forward_ad=by_forward_ad, grad=by_grad)


@pytest.fixture(scope="module")
def tower():
    return tiny.clip(layers=2).visual


@pytest.mark.slow
@pytest.mark.parametrize("run", [*RUNS, *FLOAT_RUNS])
@torch.no_grad()
def test_whatever_looks_on_sees_plain_operations(tower, run):
    x = tiny.images(2)
    y = {**RUNS, **FLOAT_RUNS}[run](tower, x)
    torch.testing.assert_close(y, Reference(tower)(x), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_8_bits_too(tower, run):
    if run == "function_mode":
        pytest.skip("functions are called by their names, the private one not")
    rounded, x = int8.quantised(tower), tiny.images(2)
    torch.testing.assert_close(RUNS[run](rounded, x), rounded(x), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_autocast(tower):
    """Linear layers run in bfloat16, as `F.linear` does there."""
    x, types = tiny.images(2), []
    handle = tower.blocks[0].mlp.c_fc.register_forward_hook(lambda m, i, y: types.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = tower(x), Reference(tower)(x)
    handle.remove()
    assert types == [torch.bfloat16]
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def test_flops_are_those_of_plain_layers(tower):
    x = tiny.images(2)
    assert count(lambda: tower(x)) == count(lambda: Reference(tower)(x)) > 0
    assert count(lambda: int8.quantised(tower)(x)) == count(lambda: tower(x))


@torch.no_grad()
def test_a_profiler_counts_flops_too(tower):
    def counted(model):
        with torch.profiler.profile(with_flops=True) as profiler:
            model(tiny.images(2))
        return sum(event.flops or 0 for event in profiler.key_averages() if "mm" in event.key)

    assert counted(tower) == counted(Reference(tower)) > 0


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "place", ["", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "attn.out_proj"]
)
@torch.no_grad()
def test_what_a_hook_has_kept_stays(tower, place, rounded):
    model = int8.quantised(tower) if rounded else tower
    kept, copies = [], []

    def keep(module, inputs, output):
        kept.extend([*inputs, output])
        copies.extend([x.clone() for x in (*inputs, output)])

    x = tiny.images(2)
    plain = model(x)
    handle = model.blocks[0].get_submodule(place).register_forward_hook(keep)
    hooked = model(x)
    handle.remove()
    assert kept
    for tensor, copied in zip(kept, copies, strict=True):
        assert torch.equal(tensor, copied)
    torch.testing.assert_close(hooked, plain)


@torch.no_grad()
def test_what_a_global_hook_or_a_replaced_method_has_kept_stays(tower):
    block, kept = copy.deepcopy(tower.blocks[0]), []

    def forward(x):
        y = F.linear(x, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        kept.append((y, y.clone()))
        return y

    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, y: kept.append((y, y.clone()))
    )
    x = torch.randn(2, 5, 64)
    block(x)
    handle.remove()
    block.mlp.c_fc.forward = forward
    block(x)
    assert len(kept) > 6
    for tensor, copied in kept:
        assert torch.equal(tensor, copied)


@torch.no_grad()
def test_a_layer_of_ones_own_keeps_its_output(tower):
    class Cached(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = y

        def forward(self, x):
            return self.y

    block = copy.deepcopy(tower.blocks[0])
    block.mlp.c_fc, block.mlp.c_proj = Cached(torch.randn(2, 5, 256)), Cached(torch.randn(2, 5, 64))
    copies = block.mlp.c_fc.y.clone(), block.mlp.c_proj.y.clone()
    block(torch.randn(2, 5, 64))
    assert torch.equal(block.mlp.c_fc.y, copies[0])
    assert torch.equal(block.mlp.c_proj.y, copies[1])


@torch.no_grad()
def test_the_normal_path_is_in_place():
    """Or its speed would be lost without a sign."""
    block = tiny.clip(layers=1).visual.blocks[0]
    assert dispatch.unshared(block.mlp.c_fc, block.mlp.gelu)
    assert dispatch.unshared(block.attn.out_proj)
    assert dispatch.unshared(block.mlp, block.mlp.c_proj)
    with torch.autocast("cpu"):
        assert not dispatch.unshared(block.attn.out_proj)
    x = torch.randn(2, 5)
    y = blocks.QuickGELU().forward_(x)
    assert y.data_ptr() == x.data_ptr()


def test_no_gradients_of_8_bits(tower):
    layer = int8.Int8Linear(torch.randn(8, 16), torch.randn(8))
    with pytest.raises(RuntimeError, match="8-bit models have no gradients"):
        layer(torch.randn(3, 16, requires_grad=True))


@torch.no_grad()
def test_a_tower_says_that_it_is_8_bit(tower):
    rounded = int8.quantised(tower)
    assert rounded.is_int8
    assert copy.deepcopy(rounded).is_int8
    assert not tower.is_int8
    assert int8.quantised(rounded) is rounded
