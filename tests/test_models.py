"""MAE and M-MAE: every listed model, every term against its definition, and the contracts."""

import argparse
import itertools
import math
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from tiny import MMAE, batch, names_of, small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import models_layers
from models_decoders import DecoderTrunk
from models_layers import (
    EncoderBlock,
    QueryBlock,
    attend,
    embed_patches,
    make_block,
    split_ids,
    take,
)
from models_mmae import MaskedAutoencoderViT
from models_zoo import create_model, list_models, model_arguments
from util.errors import BadInput
from util.mask.patches import patchify
from util.mask.pos_embed import COORDINATES
from util.train.checkpoint import load_file, load_weights

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Biases, norms, gammas and phases away from their first values."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1 or "phase" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads that wait for each other take longer than one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """Models are built in float64, so that rounding cannot hide a fault."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- Every listed model ------------------------------------------------------------------------


def official_shapes(
    embed_dim: int,
    depth: int,
    patch_size: int,
    decoder_embed_dim: int = 512,
    decoder_depth: int = 8,
    img_size: int = 224,
    **_: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the official weights, written down from MAE's `models_mae.py`."""
    values, tokens = 3 * patch_size**2, 1 + (img_size // patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, tokens, embed_dim),
        "mask_token": (1, 1, decoder_embed_dim),
        "decoder_pos_embed": (1, tokens, decoder_embed_dim),
        "patch_embed.proj.weight": (embed_dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (embed_dim,),
    }

    def linear(name: str, into: int, out: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, dim: int) -> None:
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    for trunk, dim, number in (
        ("blocks", embed_dim, depth),
        ("decoder_blocks", decoder_embed_dim, decoder_depth),
    ):
        for i in range(number):
            norm(f"{trunk}.{i}.norm1", dim)
            linear(f"{trunk}.{i}.attn.qkv", dim, 3 * dim)
            linear(f"{trunk}.{i}.attn.proj", dim, dim)
            norm(f"{trunk}.{i}.norm2", dim)
            linear(f"{trunk}.{i}.mlp.fc1", dim, 4 * dim)
            linear(f"{trunk}.{i}.mlp.fc2", 4 * dim, dim)
    norm("norm", embed_dim)
    linear("decoder_embed", embed_dim, decoder_embed_dim)
    norm("decoder_norm", decoder_embed_dim)
    linear("decoder_pred", decoder_embed_dim, values)
    return shapes


@pytest.mark.parametrize(
    ("name", "encoder", "millions"),
    [
        ("mae_vit_base_patch16", (768, 12, 12, 16), 111.9),
        ("mae_vit_large_patch16", (1024, 24, 16, 16), 329.5),
        ("mae_vit_huge_patch14", (1280, 32, 16, 14), 657.1),
    ],
)
def test_published_models_have_the_official_parameters(
    name: str, encoder: tuple[int, ...], millions: float
) -> None:
    with torch.device("meta"):
        model = create_model(name)
    embed_dim, depth, heads, patch_size = encoder
    expected = official_shapes(embed_dim, depth, patch_size)
    assert {key: tuple(p.shape) for key, p in model.state_dict().items()} == expected
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {16}
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(math.prod(shape) for shape in expected.values())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def short(name: str, **settings: object) -> nn.Module:
    """A listed model of 2 x 3 patches; of a large one two blocks, for making all takes long."""
    known = model_arguments(name)
    settings |= {"img_size": (2 * known["patch_size"], 3 * known["patch_size"])}
    if known["embed_dim"] >= 768:
        settings |= {key: 2 for key in known if key.endswith("depth")}
    return create_model(name, **settings)


@pytest.mark.parametrize("terms", [{}, MMAE], ids=["mae", "mmae"])
@pytest.mark.parametrize("name", names_of(MaskedAutoencoderViT))
def test_every_parameter_gets_a_gradient(name: str, terms: dict[str, object]) -> None:
    if model_arguments(name).get("positions") == "learned":
        terms = {k: v for k, v in terms.items() if k != "pos_offset"}  # an offset of the code
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(short(name, **terms))
    model, other = models
    assert model.grid == (2, 3)
    model(*batch(model, B=2))["loss"].backward()

    # What does not learn is a constant, such as a position code, and no draw of the start.
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    fixed = dict(other.named_parameters())
    assert [n for n, p in model.named_parameters() if n in frozen and not p.equal(fixed[n])] == []
    gradients = {n: p.grad for n, p in model.named_parameters() if n not in frozen}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []
    keys = {}
    for n in [n for n in gradients if n.endswith("qkv.bias")]:
        # A key's bias adds the same to all scores of a query, which the softmax takes away again.
        q, keys[n], v = gradients.pop(n).chunk(3)
        gradients |= {f"{n} q": q, f"{n} v": v}
    assert [n for n, g in gradients.items() if not g.any()] == []
    largest = max(g.norm() for g in gradients.values())
    assert [n for n, g in keys.items() if g.norm() > 1e-6 * largest] == []


def test_every_listed_mae_is_made_as_its_name_says() -> None:
    names = [re.fullmatch(r"mae_vit_[a-z]+_patch(\d+)", name) for name in list_models()]
    assert sum(map(bool, names)) == 12
    with torch.device("meta"):
        for found in filter(None, names):
            name, patch = found[0], int(found[1])
            model = create_model(name, in_chans=1, norm_pix_loss=True)
            assert model.patch_size == (patch, patch)
            assert model.in_chans == 1
            assert model.norm_pix_loss
            assert model.decoder_pred.out_features == patch**2
            frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
            assert frozen == {"pos_embed", "decoder_pos_embed"}


def test_arguments_of_a_name_are_a_copy() -> None:
    model_arguments("mae_vit_base_patch16")["depth"] = 1
    assert model_arguments("mae_vit_base_patch16")["depth"] == 12


# ---- The terms, against their definition -------------------------------------------------------


def plain_code(
    dim: int, grid: tuple[int, int], offset: str, phase: Tensor | None, shift: Tensor | None
) -> Tensor:
    """sin and cos of w_k c + phi number by number, as docs/method.md and MAE's code define them."""
    (gh, gw), quarter = grid, dim // 4
    code = torch.empty(gh * gw, dim)
    for y, x, k in itertools.product(range(gh), range(gw), range(quarter)):
        for half, axis, c, size in ((0, 1, x, gw), (2, 0, y, gh)):  # the column comes first
            if offset != "none":
                c = c - (size - 1) / 2
            if shift is not None:
                c = c + float(shift[axis])
            angle = c / 10000 ** (k / quarter) + (0 if phase is None else phase[axis, k])
            angle = torch.as_tensor(angle, dtype=code.dtype)
            code[y * gw + x, half * quarter + k] = angle.sin()
            code[y * gw + x, (half + 1) * quarter + k] = angle.cos()
    return code


def plain_mae(
    model: MaskedAutoencoderViT, images: Tensor, mask: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and predictions as MAE's paper tells it, image by image: every patch is embedded, every
    token decoded in its place by full blocks, and what is not needed is dropped at the end."""

    def code(part: Tensor, phase: Tensor | None, b: int) -> Tensor:
        own_shift = None if shift is None else shift[b]
        return plain_code(part.shape[-1], model.grid, model.pos_offset, phase, own_shift)

    losses, preds = [], []
    for b, hidden in enumerate(mask):
        x = model.patch_embed.proj(images[b]).flatten(1).T + code(
            model.pos_embed, model.pos_phase, b
        )
        x = torch.cat([model.cls_token[0], x[~hidden]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        tokens = model.mask_token[0].expand(len(hidden), -1).clone()
        tokens[~hidden] = x[1:]
        tokens = tokens + code(model.decoder_pos_embed, model.decoder_pos_phase, b)
        x = torch.cat([x[:1], tokens])[None]
        for block in model.decoder_blocks:
            x = Block.forward(block, x)
        preds.append(model.decoder_pred(model.decoder_norm(x))[0, 1:][hidden])
        ph, pw = model.patch_size
        cut = images[b].unfold(1, ph, ph).unfold(2, pw, pw)  # [C, gh, gw, ph, pw]
        target = cut.permute(1, 2, 3, 4, 0).flatten(0, 1).flatten(1)[hidden]
        if model.norm_pix_loss:
            variance = target.var(dim=-1, correction=1, keepdim=True)
            target = (target - target.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
        losses.append((preds[-1] - target).square().mean(dim=-1))
    return torch.cat(losses).mean(), torch.stack(preds)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("lscale_init", [None, 0.1])
@pytest.mark.parametrize("pos_offset", COORDINATES)
@pytest.mark.parametrize(
    ("img_size", "patch_size", "in_chans"),
    [((8, 8), 4, 3), ((15, 8), (5, 2), 1), ((6, 21), (3, 7), 2), ((5, 6), (1, 2), 5)],
)
def test_forward_is_the_definition(
    float64: None,
    img_size: tuple[int, int],
    patch_size: int | tuple[int, int],
    in_chans: int,
    pos_offset: str,
    lscale_init: float | None,
    norm_pix_loss: bool,
) -> None:
    sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
    terms = {"pos_offset": pos_offset, "lscale_init": lscale_init}
    model = randomised(small(**sizes, **terms, norm_pix_loss=norm_pix_loss))
    images, mask = batch(model, B=2)
    shift = torch.rand(2, 2) - 0.5 if pos_offset == "jitter" else None
    out = model(images, mask, shift=shift)
    loss, pred = plain_mae(model, images, mask, shift)
    torch.testing.assert_close(out["pred"], pred, **EXACT)
    torch.testing.assert_close(out["loss"], loss, **EXACT)
    assert torch.equal(out["mask"], mask)
    ours, plain = gradients_of(model, out["loss"]), gradients_of(model, loss)
    torch.testing.assert_close(ours, plain, **EXACT)


def off_and_on(**terms: object) -> tuple[MaskedAutoencoderViT, MaskedAutoencoderViT]:
    return small(), small(**terms)


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    out = model(*batch(model))
    return out["loss"], out["pred"]


def test_terms_off_is_mae() -> None:
    plain, off = off_and_on(lscale_init=None, pos_offset="none")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2}
    official = official_shapes(**sizes, decoder_embed_dim=16, decoder_depth=2)
    assert off.state_dict().keys() == official.keys()
    assert all(map(torch.equal, off.state_dict().values(), plain.state_dict().values()))
    assert all(map(torch.equal, outputs(off), outputs(plain)))
    assert off.no_weight_decay().isdisjoint(dict(off.named_parameters()))


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_branches_that_begin_small_begin_as_with_lscale(decoder: str, float64: None) -> None:
    """The study's control: the same function and no LScale to learn."""
    begins, scaled = (
        small(decoder=decoder, branch_init=0.1),
        small(decoder=decoder, lscale_init=0.1),
    )
    assert begins.state_dict().keys() == small(decoder=decoder).state_dict().keys()
    for a, b in zip(outputs(begins), outputs(scaled), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    apart = small(decoder=decoder), begins
    assert not torch.allclose(*(outputs(model)[1] for model in apart), rtol=0.01)


GAMMAS = {
    f"{trunk}.{i}.ls{n}.gamma"
    for trunk in ("blocks", "decoder_blocks")
    for i in (0, 1)
    for n in "12"
}
PHASES = {"pos_phase", "decoder_pos_phase"}


@pytest.mark.parametrize("lscale_init", [None, 0.1])
@pytest.mark.parametrize("pos_offset", COORDINATES)
def test_a_term_adds_its_parameters_and_leaves_the_others(
    lscale_init: float | None, pos_offset: str
) -> None:
    off, on = (m.state_dict() for m in off_and_on(lscale_init=lscale_init, pos_offset=pos_offset))
    own = (GAMMAS if lscale_init else set()) | (PHASES if pos_offset == "learned" else set())
    assert on.keys() - off.keys() == own
    assert off.keys() <= on.keys()
    changed = {name for name in off if not torch.equal(off[name], on[name])}
    assert changed == (set() if pos_offset == "none" else {"pos_embed", "decoder_pos_embed"})
    for name in own:
        assert (on[name] == (0 if name in PHASES else lscale_init)).all()


@pytest.mark.parametrize(
    ("terms", "same_as"),
    [
        ({"lscale_init": 1.0}, {}),
        ({"pos_offset": "learned"}, {"pos_offset": "center"}),
        ({"pos_offset": "jitter"}, {"pos_offset": "center"}),
        ({"lscale_init": 1.0, "pos_offset": "learned"}, {"pos_offset": "center"}),
    ],
    ids=str,
)
def test_a_neutral_term_changes_nothing(
    terms: dict[str, object], same_as: dict[str, object]
) -> None:
    on, off = small(**terms), small(**same_as)
    assert all(map(torch.equal, outputs(on), outputs(off)))


@pytest.mark.parametrize(
    "terms",
    [{"lscale_init": 0.1}, {"pos_offset": "center"}, MMAE],
    ids=["lscale", "center", "both"],
)
def test_a_term_changes_the_prediction(terms: dict[str, object]) -> None:
    off, on = off_and_on(**terms)
    assert (outputs(on)[1] - outputs(off)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(PHASES))
def test_a_phase_moves_its_own_part_alone(name: str) -> None:
    model = small(pos_offset="learned")
    before = {part: model.position_code(part).clone() for part in ("encoder", "decoder")}
    nn.init.constant_(getattr(model, name), 0.5)
    own, other = ("decoder", "encoder") if "decoder" in name else ("encoder", "decoder")
    assert (model.position_code(own) - before[own]).abs().min() > 0
    assert torch.equal(model.position_code(other), before[other])
    assert model.no_weight_decay() == PHASES


def test_lscale_folds_into_the_weights_before_it(float64: None) -> None:
    scaled, folded = randomised(small(lscale_init=0.1)), small()
    weights = scaled.state_dict()
    for name in GAMMAS:
        gamma, block = weights.pop(name), name.rsplit(".", 2)[0]
        before = f"{block}.{'attn.proj' if 'ls1' in name else 'mlp.fc2'}"
        weights[f"{before}.weight"] = weights[f"{before}.weight"] * gamma[:, None]
        weights[f"{before}.bias"] = weights[f"{before}.bias"] * gamma
    folded.load_state_dict(weights, strict=True)
    torch.testing.assert_close(outputs(scaled), outputs(folded), **EXACT)


def test_jitter_shifts_only_when_given_a_shift() -> None:
    jitter, center = small(pos_offset="jitter"), small(pos_offset="center")
    images, mask = batch(jitter)
    still, no_shift = jitter(images, mask), torch.zeros(3, 2)
    torch.testing.assert_close(jitter(images, mask, shift=no_shift)["pred"], still["pred"])
    one = torch.tensor([[0.0, 0.0], [0.3, -0.2], [0.0, 0.0]])
    moved = jitter(images, mask, shift=one)["pred"] - still["pred"]
    assert (moved.abs().amax(dim=(1, 2)) > 1e-4).tolist() == [False, True, False]
    for other in COORDINATES.keys() - {"jitter"}:
        with pytest.raises(BadInput, match=f"{other}.*no shift"):
            small(pos_offset=other)(images, mask, shift=no_shift)
    assert torch.equal(still["pred"], center(images, mask)["pred"])


# ---- Layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lscale_init", [None, 0.1])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
def test_query_block_is_block_and_slice(
    float64: None, num_queries: int, lscale_init: float | None
) -> None:
    torch.manual_seed(0)
    block = randomised(make_block(24, 3, 4.0, lscale_init, QueryBlock))
    assert block.state_dict().keys() == make_block(24, 3, 4.0, lscale_init).state_dict().keys()
    x, weight = torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, num_queries, 24)
    ours, full = block(x, num_queries), Block.forward(block, x)[:, -num_queries:]
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-12)
    inputs = (x, *block.parameters())
    pairs = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, full)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-12)


def test_decoder_trunk_is_blocks_and_slice(float64: None) -> None:
    trunk = DecoderTrunk(16, 3, 2, 4.0, None)
    x = torch.randn(2, 6, 16)
    full = x
    for block in trunk:
        full = Block.forward(block, full)
    torch.testing.assert_close(trunk(x, 4), full[:, -4:], rtol=0, atol=1e-12)


def operations(counted: FlopCounterMode) -> set[str]:
    return {str(op) for op in counted.get_flop_counts()["Global"]}


def attention_of(kind: Any, heads: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Attention and the gradients of queries, keys and values."""
    own = [x.detach().clone().requires_grad_() for x in heads]
    mixed = kind(*own)
    return [mixed, *torch.autograd.grad(mixed, own, weight)]


@pytest.mark.parametrize(("device", "dtype", "shape", "newer", "expected"), [
    ("cuda", torch.bfloat16, (2, 4, 50, 64), True, True),
    ("cuda", torch.float16, (2, 4, 64, 32), True, True),
    ("cuda", torch.bfloat16, (2, 4, 65, 64), True, False),
    ("cuda", torch.bfloat16, (2, 4, 50, 20), True, False),  # its kernel takes multiples of 8
    ("cuda", torch.bfloat16, (2, 4, 50, 64), False, False),
    ("cuda", torch.float32, (2, 4, 50, 64), True, False),
    ("cpu", torch.bfloat16, (2, 4, 50, 64), True, False),
])  # fmt: skip
def test_few_tokens_on_a_gpu_have_a_kernel_of_their_own(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], newer: bool, expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """torch's memory-efficient one, and every other switched on again after it."""
    asked: list[bool] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kinds = ("mem_efficient", "cudnn", "flash", "math")
        on = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds]
        asked.append(on == [True, False, False, False])
        return q

    monkeypatch.setattr(models_layers, "newer_gpu", lambda: newer)
    monkeypatch.setattr(models_layers.F, "scaled_dot_product_attention", attention)
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(3))
        assert models_layers.few_tokens(q, k) == expected
        attend(q, k, v)
    assert asked == [expected]
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(("M", "N", "d"), [(13, 13, 32), (37, 50, 24), (197, 197, 64)])
def test_plain_attention_is_no_less_exact_than_the_fused_one(M: int, N: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, M, d), (2, 3, N, d), (2, 3, N, d), (2, 3, M, d)]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    *heads, weight = drawn
    with FlopCounterMode(display=False) as counter:
        ours = attention_of(attend, heads, weight)
    assert operations(counter) == {"aten.bmm"}  # two products forward, four backward
    fused = attention_of(F.scaled_dot_product_attention, heads, weight)
    exact = attention_of(
        F.scaled_dot_product_attention, [x.double() for x in heads], weight.double()
    )
    for found, torchs, true in zip(ours, fused, exact, strict=True):
        errors = [(x - true).norm().item() / true.norm().item() for x in (found, torchs)]
        assert errors[0] < max(0.005, 1.1 * errors[1])


def test_which_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products in bf16 on a CPU, for a backward pass of few tokens; else torch's kernel."""
    kernel = F.scaled_dot_product_attention
    calls: list[tuple[int, ...]] = []

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    heads = torch.randn(3, 1, 2, 5, 8)
    cases = [
        (torch.float32, True, False),
        (torch.float64, True, False),
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
    ]
    block = EncoderBlock(16, 2)
    for dtype, grad, plain in cases:
        for form in ("attend", "block"):
            calls.clear()
            with torch.set_grad_enabled(grad):
                if form == "attend":
                    attend(*heads.to(dtype))
                else:
                    block.to(dtype)(torch.randn(1, 5, 16, dtype=dtype))
            assert (not calls) == plain, (dtype, grad, form)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.float()(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    assert not calls  # autocast is bf16 as well
    monkeypatch.setattr(models_layers, "MOST_PLAIN_PAIRS", 24)
    attend(*heads.bfloat16())
    block(torch.randn(1, 5, 16))
    assert len(calls) == 2


@pytest.mark.parametrize("patch_size", [(4, 4), (3, 5), (1, 2)])
@pytest.mark.parametrize("in_chans", [1, 2, 5])
def test_embedding_given_patches_is_the_convolution(
    float64: None, in_chans: int, patch_size: tuple[int, int]
) -> None:
    proj = nn.Conv2d(in_chans, 12, patch_size, patch_size)
    images = torch.randn(2, in_chans, 2 * patch_size[0], 3 * patch_size[1])
    ours = embed_patches(proj, patchify(images, patch_size))
    torch.testing.assert_close(ours, proj(images).flatten(2).mT, rtol=0, atol=1e-12)


def test_split_and_take_keep_raster_order() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 1, 1, 1]]).bool()
    visible, masked = split_ids(mask, 2)
    assert visible.tolist() == [[1, 3], [0, 1]]
    assert masked.tolist() == [[0, 2, 4], [2, 3, 4]]
    x = torch.arange(10).reshape(2, 5, 1)
    assert take(x, visible).flatten(1).tolist() == [[1, 3], [5, 6]]
    assert take(x[:1], visible).flatten(1).tolist() == [[1, 3], [0, 1]]  # one code for all images


# ---- Contracts of forward ----------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_hidden_pixels_reach_the_loss_alone(norm_pix_loss: bool) -> None:
    model = small(**MMAE, norm_pix_loss=norm_pix_loss)
    images, mask = batch(model)
    noise = torch.randn(images.shape)
    hidden = mask.reshape(-1, 1, *model.grid).repeat_interleave(4, 2).repeat_interleave(4, 3)
    out = model(images, mask)
    other_hidden = model(torch.where(hidden, noise, images), mask)
    assert torch.equal(other_hidden["pred"], out["pred"])
    assert (other_hidden["loss"] - out["loss"]).abs() > 1e-3
    other_visible = model(torch.where(hidden, images, noise), mask)
    assert (other_visible["pred"] - out["pred"]).abs().amax(dim=(1, 2)).min() > 1e-3

    ids_visible, _ = split_ids(mask, 2)
    latents = [
        model.forward_encoder(patchify(x, (4, 4)), ids_visible)
        for x in (images, torch.where(hidden, noise, images))
    ]
    assert torch.equal(*latents)


def test_images_of_a_batch_do_not_meet(float64: None) -> None:
    model = small(**MMAE)
    images, mask = batch(model, B=4)
    out = model(images, mask)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(images[order], mask[order])
    torch.testing.assert_close(shuffled["pred"], out["pred"][order], **EXACT)
    torch.testing.assert_close(shuffled["loss"], out["loss"], **EXACT)
    alone = [model(images[i : i + 1], mask[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat([o["pred"] for o in alone]), out["pred"], **EXACT)
    torch.testing.assert_close(sum(o["loss"] for o in alone) / 4, out["loss"], **EXACT)


@pytest.mark.parametrize("visible", [1, 2, 5])
def test_given_count_is_the_counted(visible: int) -> None:
    model = small(**MMAE)
    images, mask = batch(model, visible=visible)
    given, counted = model(images, mask, visible), model(images, mask)
    assert given["pred"].shape == (3, 6 - visible, 48)
    assert torch.equal(given["pred"], counted["pred"])
    assert torch.equal(given["loss"], counted["loss"])


def test_recomputing_activations_changes_no_number() -> None:
    model = small(**MMAE)
    images, mask = batch(model)
    calls: list[int] = []
    for layer in (model.blocks[0].norm2, model.decoder_blocks[-1].norm2):
        layer.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for enable in (False, True):
        calls.clear()
        model.set_grad_checkpointing(enable)
        out = model(images, mask)
        results.append((out["loss"], out["pred"], gradients_of(model, out["loss"])))
        assert len(calls) == (4 if enable else 2)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_target_and_loss_stay_float32_under_autocast() -> None:
    model = small(**MMAE)
    images, mask = batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, mask)
    assert out["pred"].dtype == torch.bfloat16
    target = patchify(images, (4, 4))[mask].reshape(3, 4, 48)
    expected = (out["pred"].float() - target).square().mean()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out["loss"], model(images, mask)["loss"], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "terms",
    [{}, MMAE, {"pos_offset": "jitter"}, {"cls_tokens": 3, "positions": "learned"}],
    ids=["mae", "mmae", "jitter", "pixio"],
)
def test_no_host_sync_when_the_count_is_given(terms: dict[str, object]) -> None:
    with FakeTensorMode():  # has no values: whatever asks for one raises
        model = small(**terms)
        mask = torch.zeros(2, 6, dtype=torch.bool)
        shift = torch.zeros(2, 2) if "jitter" in terms.values() else None
        out = model(torch.zeros(2, 3, 8, 12), mask, num_visible=2, shift=shift)
        out["loss"].backward()
        assert out["pred"].shape == (2, 4, 48)
        with pytest.raises(DynamicOutputShapeException):
            model(torch.zeros(2, 3, 8, 12), mask)


@pytest.mark.parametrize(
    "terms",
    [{}, MMAE, {"pos_offset": "jitter"}, {"cls_tokens": 3, "positions": "learned"}],
    ids=["mae", "mmae", "jitter", "pixio"],
)
def test_compiles_as_one_graph(terms: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = small(**terms, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, mask = batch(model)
    shift = torch.rand(3, 2) if "jitter" in terms.values() else None
    eager = model(images, mask, num_visible=2, shift=shift)
    graph = compiled(images, mask, num_visible=2, shift=shift)
    torch.testing.assert_close(graph, eager)
    torch.testing.assert_close(
        gradients_of(model, graph["loss"]), gradients_of(model, eager["loss"])
    )


def test_flops_of_base_at_224() -> None:
    """Matrix products of one image, forward and backward; attention's own are not counted."""

    def by_formula(embedded: int, last_queries: int, predicted: int) -> int:
        D, E, V, K, N = 768, 512, 768, 50, 197
        products = 12 * K * 12 * D**2 + K * D * E  # encoder blocks, and into the decoder
        products += 7 * N * 12 * E**2  # all decoder blocks but the last
        products += N * 2 * E**2 + last_queries * 10 * E**2  # its keys and values; all else
        products += predicted * E * V
        # Two operations a product, forward and for both gradients; an image needs no gradient.
        return 6 * products + 4 * embedded * V * D

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = create_model("mae_vit_base_patch16")
        mask = torch.ones(1, 196, dtype=torch.bool)
        model(torch.empty(1, 3, 224, 224), mask, num_visible=49)["loss"].backward()
    counts = counter.get_flop_counts()["Global"]
    # torch 2.15 counts fused attention on CPU; the figures of the issue are without it.
    counted = sum(n for op, n in counts.items() if "scaled_dot_product" not in str(op))
    assert counted == by_formula(embedded=49, last_queries=147, predicted=147)
    assert counted <= 55.1e9  # 55.02
    official = by_formula(embedded=196, last_queries=197, predicted=197)
    assert official / 1e9 == pytest.approx(56.3, abs=0.05)


# ---- Initialisation ----------------------------------------------------------------------------


def test_initialisation_is_maes() -> None:
    torch.manual_seed(0)
    model = create_model("mae_vit_base_patch16", depth=1, decoder_depth=1, **MMAE)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
        assert token.abs().max() > 0.045  # normal, not uniform of that deviation
    matrices = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)
    assert matrices["blocks.0.attn.qkv"].shape == (3 * 768, 768)  # one matrix: its bound is smaller
    for name, weight in matrices.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.999 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert not model.pos_embed[:, 0].any()
    assert not model.decoder_pos_embed[:, 0].any()
    for frozen in (model.pos_embed, model.decoder_pos_embed):
        assert not frozen.requires_grad


# ---- Official weights --------------------------------------------------------------------------


def official_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = official_shapes(**model_arguments("mae_vit_micro_patch8"))
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_official_layout_loads(tmp_path: Path) -> None:
    weights = official_weights()
    namespace = argparse.Namespace(model="mae_vit_micro_patch8", blr=1.5e-4, dist_url="env://")
    torch.save({"model": weights, "args": namespace, "epoch": 799}, tmp_path / "official.pth")
    state = load_file(tmp_path / "official.pth")
    assert state["args"] == namespace
    model = create_model("mae_vit_micro_patch8")
    load_weights(model, state["model"], "official.pth")
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert not model.pos_embed.requires_grad


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "official.pth", tmp_path / "made"
    trap = argparse.Namespace(blr=Malicious(made))
    torch.save({"model": official_weights(), "args": trap}, path)
    with pytest.raises(BadInput, match=r"official\.pth is not readable"):
        load_file(path)
    assert not made.exists()
    pickle.loads(pickle.dumps(trap))
    assert made.exists(), "the trap does not work, so the test shows nothing"


def test_weights_that_do_not_fit_are_named() -> None:
    model, weights = create_model("mae_vit_micro_patch8"), official_weights()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    del weights["norm.bias"], weights["blocks.3.mlp.fc1.weight"]
    weights["head.weight"] = torch.zeros(2, 3)
    weights["decoder_pred.bias"] = torch.zeros(7)
    with pytest.raises(BadInput) as caught:
        load_weights(model, weights, "other.pth")
    message = str(caught.value)
    missing, unexpected, misshapen = message.split("; ")[1:]
    assert "other.pth" in message
    assert missing == "missing 2: blocks.3.mlp.fc1.weight, norm.bias"
    assert unexpected == "unexpected 1: head.weight"
    assert misshapen == "other shapes 1: decoder_pred.bias (7,) where the model has (192,)"
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


# ---- Errors for people -------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"lscale_init": 0}, "lscale_init 0"),
    ({"branch_init": -1.0}, "branch_init"),
    ({"branch_init": float("nan")}, "branch_init"),
    ({"lscale_init": 0.0}, "None leaves LScale out"),
    ({"decoder_depth": 0}, "at least one block, not 0"),
    ({"img_size": 10}, r"\(10, 10\).*\(4, 4\)"),
    ({"img_size": (8, 14)}, r"\(8, 14\).*\(4, 4\)"),
    ({"img_size": 0}, r"\(0, 0\)"),
    ({"img_size": (8, -8)}, r"\(8, -8\)"),
    ({"num_heads": 3}, "encoder width 32.*3 heads"),
    ({"num_heads": 0}, "encoder.*0 heads"),
    ({"decoder_num_heads": 3}, "decoder width 16.*3 heads"),
    ({"embed_dim": 6, "num_heads": 3}, "encoder width 6.*4"),
    ({"decoder_embed_dim": 6, "decoder_num_heads": 3}, "decoder width 6.*4"),
    ({"pos_offset": "centre"}, "'centre'.*none.*center.*learned.*jitter"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        small(**settings)


def test_unknown_model_lists_the_valid_and_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"'mae_vit_bsae_patch16'.*mean mae_vit_base_patch16") as e:
        create_model("mae_vit_bsae_patch16")
    assert all(name in str(e.value) for name in list_models())
    with pytest.raises(BadInput) as e:
        create_model("?")
    assert "did you mean" not in str(e.value)
    assert all(name in str(e.value) for name in list_models())


BAD_MASKS = [
    (torch.zeros(2, 6), r"torch\.float32 \(2, 6\), expected bool \[B, 6\]"),
    (torch.zeros(2, 5, dtype=torch.bool), r"\(2, 5\), expected bool \[B, 6\]"),
    (torch.zeros(6, dtype=torch.bool), r"\(6,\), expected"),
    (torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool(), r"same count.*\[1, 2\]"),
    (torch.zeros(2, 6, dtype=torch.bool), r"found \[6\]"),
    (torch.ones(2, 6, dtype=torch.bool), r"found \[0\]"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS)
def test_bad_masks_are_explained(mask: Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        small()(torch.zeros(2, 3, 8, 12), mask)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 12, 8), (1, 8, 12), (3, 16, 24)])
def test_bad_images_are_explained(shape: tuple[int, ...]) -> None:
    mask = batch(small(), B=2)[1]
    with pytest.raises(BadInput, match=re.escape(f"{shape}, the model was built for (3, 8, 12)")):
        small()(torch.zeros(2, *shape), mask)
