"""UPerNet against transformers' heads, torch's functions and formulas; weights in and out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import start_group, wait
from test_classifier import (
    images_for,
    micro_mae,
    official_mae,
    save_finetuned,
    save_official,
    save_pretrained,
    timm_vit,
    trained,
)
from torch import Tensor, nn

from models_layers import RelativeBias, relative_index
from models_segmenters import (
    build_segmenter,
    load_segmenter,
    load_segmenter_encoder,
    to_mmseg_names,
)
from models_upernet import FcnHead, Pyramid, UperHead, UperNet, choose_finest_scale, choose_taps
from models_vit import VisionTransformer
from models_zoo import (
    create_model,
    create_segmenter,
    list_segmenters,
    load_encoder,
    model_arguments,
    segmenter_from,
)
from util.errors import BadInput
from util.mask.pos_embed import resize_table, sincos_2d
from util.train.checkpoint import write_signed
from util.train.optim import layer_decay_groups
from util.weights.convert_upernet import segmenter_from_mmseg

K = 5
SMALL = {"channels": 16, "aux_channels": 8}


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def micro(name: str = "vit_micro_patch8", **settings: Any) -> UperNet:
    """A small segmenter with weights as if trained."""
    torch.manual_seed(0)
    given = {"img_size": 32 if name.endswith("8") else 16, **SMALL} | settings
    return trained(create_segmenter(name, K, **given))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Of float32 sums in another order, on any processor; a fault in a head makes 1e-2 and more.
ROUNDING = 1e-4


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape and expected.std() > 1e-3
    return float((found - expected).abs().max() / expected.abs().max())


# ---- Heads and neck ------------------------------------------------------------------------------


def our_name(name: str) -> str:
    """Of a tensor in transformers' heads."""
    names = {"batch_norm": "bn", "classifier": "conv_seg"}
    return ".".join(names.get(part, part) for part in name.split("."))


def theirs(dropout: float = 0.0) -> tuple[nn.Module, nn.Module, UperHead, FcnHead]:
    """Heads of transformers, and ours with the same random weights and running statistics."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    channels, C = [6, 8, 10, 12], 7
    config = UperNetConfig(
        hidden_size=C, pool_scales=[1, 2, 3, 6], num_labels=K, auxiliary_channels=9,
        auxiliary_in_channels=None, auxiliary_num_convs=1, auxiliary_concat_input=False,
    )  # fmt: skip
    torch.manual_seed(1)
    head, aux = UperNetHead(config, channels), UperNetFCNHead(config, channels)
    ours = UperHead(channels, C, K, (1, 2, 3, 6), dropout), FcnHead(10, 9, K, dropout)
    for known, mine in zip((head, aux), ours, strict=True):
        for name, tensor in known.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor)
                    + 0.2 * ("running_var" in name)
                    - 0.3 * ("running_var" not in name)
                )
        weights = {our_name(name): tensor for name, tensor in known.state_dict().items()}
        mine.load_state_dict(weights, strict=True)
    return head, aux, *ours


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(8, 8), (4, 7), (1, 3)])
@torch.no_grad()
def test_heads_are_transformers(grid: tuple[int, int]) -> None:
    head, aux, ours, ours_aux = (module.eval() for module in theirs())
    sides = [(4 * grid[0], 4 * grid[1]), (2 * grid[0], 2 * grid[1]), grid]
    sides.append((max(grid[0] // 2, 1), max(grid[1] // 2, 1)))
    maps = [draw(2, c, *side) for c, side in zip((6, 8, 10, 12), sides, strict=True)]
    assert worst(ours(maps), head(maps)) < ROUNDING
    assert worst(ours_aux(maps[2]), aux(maps)) < ROUNDING


@pytest.mark.parity
def test_heads_train_as_transformers(float64: None) -> None:
    """Outputs, gradients and running statistics of three training steps, to 1e-9."""
    head, aux, ours, ours_aux = (module.train() for module in theirs())
    for step in range(3):
        given = [draw(2 + step, c, s, s + 1) for c, s in ((6, 16), (8, 8), (10, 4), (12, 2))]
        results = []
        for one, other, maps in ((head, aux, given), (ours, ours_aux, [x.clone() for x in given])):
            for x in maps:
                x.requires_grad_()
            aux_logits = other(maps) if other is aux else other(maps[2])
            logits = one(maps)
            (logits.sin().sum() + aux_logits.cos().sum()).backward()
            results.append([logits, aux_logits, *(x.grad for x in maps)])
        for expected, found in zip(*results, strict=True):
            assert worst(found.detach(), expected.detach()) < 1e-9
    for known, mine in ((head, ours), (aux, ours_aux)):
        parameters, buffers = dict(mine.named_parameters()), dict(mine.named_buffers())
        for name, expected in known.named_parameters():
            found = parameters[our_name(name)].grad
            assert torch.allclose(found, expected.grad, rtol=1e-9, atol=1e-9), name
        for name, expected in known.named_buffers():
            assert torch.allclose(buffers[our_name(name)], expected, rtol=1e-9, atol=0), name


@pytest.mark.parametrize("finest", [4, 2, 1])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 2)])
@pytest.mark.parametrize("train", [True, False])
def test_the_neck_by_torchs_functions(finest: int, grid: tuple[int, int], train: bool) -> None:
    torch.manual_seed(0)
    neck = trained(Pyramid(6, finest)).train(train)
    w = {k: v.clone() for k, v in neck.state_dict().items()}
    maps = [draw(2, 6, *grid) + level for level in range(4)]

    def up(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)

    def four(x: Tensor) -> Tensor:
        stats = [w[f"upsample_4x.1.running_{kind}"].clone() for kind in ("mean", "var")]
        x = F.batch_norm(
            up(x, "upsample_4x.0"), *stats, w["upsample_4x.1.weight"], w["upsample_4x.1.bias"],
            training=train,
        )  # fmt: skip
        return up(F.gelu(x), "upsample_4x.3")

    def pool(times: int) -> Any:
        return lambda x: F.max_pool2d(x, [min(times, side) for side in grid])

    every = [four, lambda x: up(x, "upsample_2x.0"), lambda x: x, pool(2), pool(4), pool(8)]
    start = {4: 0, 2: 1, 1: 2}[finest]
    expected = [op(x) for op, x in zip(every[start : start + 4], maps, strict=True)]
    for found, wanted in zip(neck(maps), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    assert (len(w) > 0) == (finest > 1)


@pytest.mark.parametrize(("patch", "finest"), [(16, 4), (14, 4), (8, 2), (4, 1), (32, 4)])
def test_the_finest_map_is_at_four_pixels(patch: int, finest: int) -> None:
    assert choose_finest_scale((patch, patch)) == finest


@pytest.mark.parametrize(
    ("depth", "taps"),
    [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4])],
)
def test_taps(depth: int, taps: list[int]) -> None:
    assert choose_taps(depth) == taps


def test_parameter_counts_of_base_follow_from_the_published_settings() -> None:
    model = create_segmenter(
        "vit_base_patch16", 150, img_size=512, relative_bias=True, lscale_init=1.0
    )
    D, C, A, heads, depth, grid = 768, 768, 256, 12, 12, 32

    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel**2 + 2 * outputs  # and its BatchNorm

    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    scales = 2 * D
    encoder = depth * (block + scales) + (16 * 16 * 3 * D + D) + D + (1 + grid * grid) * D
    neck = 3 * (4 * D * D + D) + 2 * D
    upper = 4 * conv(D, C, 1) + conv(D + 4 * C, C, 3)  # pyramid pooling
    upper += 3 * conv(D, C, 1) + 3 * conv(C, C, 3) + conv(4 * C, C, 3) + (C * 150 + 150)
    aux = conv(D, A, 3) + (A * 150 + 150)
    relative = depth * ((2 * grid - 1) ** 2 + 3) * heads
    parts = (model.encoder, model.neck, model.decode_head, model.auxiliary_head, model.relative)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [encoder, neck, upper, aux, relative]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert model.taps == (3, 5, 7, 11)


def test_the_start_of_heads() -> None:
    torch.manual_seed(0)
    model = create_segmenter("vit_micro_patch8", 40, channels=64, aux_channels=32)
    for head in (model.decode_head, model.auxiliary_head):
        assert float(head.conv_seg.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not head.conv_seg.bias.any()
    conv = model.decode_head.fpn_bottleneck.conv.weight  # fan out: 64 * 9
    assert float(conv.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


# ---- The whole model -----------------------------------------------------------------------------


@torch.no_grad()
def test_the_parts_together() -> None:
    """Maps are the blocks' outputs without a norm and without the class token."""
    model = micro("vit_micro_patch8", taps=[0, 1, 2, 3]).eval()
    images, outputs = draw(2, 3, 32, 32), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda *given: outputs.append(given[2]))
    logits = model(images)
    assert list(logits) == ["logits"] and logits["logits"].shape == (2, K, 8, 8)
    maps = [x[:, 1:].transpose(1, 2).reshape(2, 128, 4, 4) for x in outputs]
    assert worst(logits["logits"], model.decode_head(model.neck(maps))) < ROUNDING
    model.train()
    torch.manual_seed(3)
    found = model(images)
    assert found["aux"].shape == (2, K, 2, 2)  # the third map, at a stride of 16
    assert found["logits"].shape == (2, K, 8, 8)


@pytest.mark.parametrize("name", ["vit_micro_patch4", "vit_micro_patch8", "vit_tiny_patch16"])
@pytest.mark.parametrize("settings", [{}, {"relative_bias": True, "lscale_init": 1.0}])
def test_every_parameter_gets_a_gradient(name: str, settings: dict[str, Any]) -> None:
    side = 4 * int(name.rpartition("patch")[2])
    model = micro(name, img_size=side, **settings).train()
    found = model(draw(2, 3, side, side + side // 2))
    loss = F.cross_entropy(
        found["logits"].flatten(2), torch.zeros(2, found["logits"][0, 0].numel()).long()
    )
    (loss + found["aux"].square().mean()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (30, 41), (5, 3), (1, 1), (8, 100)])
@pytest.mark.parametrize("bias", [False, True])
def test_images_of_any_size(size: tuple[int, int], bias: bool) -> None:
    """Padded by hand with zeros, they give the same; and the positions are the resized ones."""
    model = micro(relative_bias=bias).eval()
    H, W = size
    gh, gw = -(-H // 8), -(-W // 8)
    images = draw(2, 3, H, W)
    padded = torch.zeros(2, 3, gh * 8, gw * 8)
    padded[:, :, :H, :W] = images
    found = model(images)["logits"]
    full = model(padded)["logits"]
    assert full.shape[2:] == (2 * gh, 2 * gw)
    assert torch.equal(found, full[:, :, : -(-H // 4), : -(-W // 4)])
    expected = F.interpolate(full, (gh * 8, gw * 8), mode="bilinear", align_corners=False)
    assert torch.allclose(model.predict(images), expected[:, :, :H, :W], atol=1e-6)
    other = create_segmenter("vit_micro_patch8", K, img_size=(gh * 8, gw * 8), **SMALL).eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("relative")}
    weights["encoder.pos_embed"] = resize_table(weights["encoder.pos_embed"], (4, 4), (gh, gw))
    other.load_state_dict(weights)
    if not bias:
        assert torch.allclose(other(padded)["logits"], full, atol=1e-5)


@torch.no_grad()
def test_the_encoder_alone_at_another_size() -> None:
    encoder = trained(
        VisionTransformer(**model_arguments("vit_micro_patch8"), num_classes=0)
    ).eval()
    images = draw(1, 3, 64, 64)
    own, tokens = encoder.forward_intermediates(images), encoder.forward_features(images)
    assert torch.allclose(own[0], tokens, atol=1e-6) and len(own[1]) == 4
    pairs = encoder.forward_intermediates(images, 2, return_prefix_tokens=True, norm=True)[1]
    assert torch.allclose(pairs[1][1], own[0][:, :1], atol=1e-6) and len(pairs) == 2
    assert encoder.forward_intermediates(draw(1, 3, 16, 24), intermediates_only=True)[0].shape == (
        1, 128, 2, 3,
    )  # fmt: skip
    for wrong in (draw(1, 3, 16, 20), draw(1, 1, 16, 16), draw(1, 3, 16, 0)):
        with pytest.raises(BadInput, match="multiples of"):
            encoder.forward_intermediates(wrong)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = micro(relative_bias=True, dropout=0.0, drop_path=0.3).train()
    images, gradients = draw(2, 3, 32, 40), []
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for enable in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)  # drop path
        model(images)["logits"].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.encoder.parameters()])
        gradients[-1] += [p.grad.clone() for p in model.relative.parameters()]
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def test_under_autocast() -> None:
    model = micro(relative_bias=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(draw(2, 3, 32, 32))
    found["logits"].float().square().sum().backward()
    assert found["logits"].isfinite().all() and model.relative[0].table.grad.any()


# ---- Relative position bias ----------------------------------------------------------------------


@torch.no_grad()
def test_a_bias_of_zero_changes_nothing() -> None:
    with_bias, without = micro(relative_bias=True), micro()
    for bias in with_bias.relative:
        bias.table.zero_()
    kept = {k: v for k, v in with_bias.state_dict().items() if not k.startswith("relative")}
    without.load_state_dict(kept)
    images = draw(1, 3, 32, 24)
    found, expected = (m.eval()(images)["logits"] for m in (with_bias, without))
    assert worst(found, expected) < ROUNDING
    assert not create_segmenter("vit_micro_patch8", K, relative_bias=True).relative[0].table.any()


@torch.no_grad()
def test_a_bias_by_hand() -> None:
    """Every block's attention written out, with the row of each pair found by its offset."""
    model = micro(relative_bias=True, img_size=(16, 24)).eval()  # 2 x 3 patches
    images, gh, gw = draw(1, 3, 16, 24), 2, 3
    places = [(r, c) for r in range(gh) for c in range(gw)]
    last = (2 * gh - 1) * (2 * gw - 1)
    encoder = model.encoder
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([encoder.cls_token, x], 1) + encoder.pos_embed
    expected = []
    for block, bias in zip(encoder.blocks, model.relative, strict=True):
        attention, heads = block.attn, block.attn.num_heads
        q, k, v = attention.qkv(block.norm1(x)).reshape(7, 3, heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        for i in range(7):
            for j in range(7):
                if i == 0 or j == 0:
                    row = last + (2 if i == j else 0 if i == 0 else 1)
                else:
                    down = places[i - 1][0] - places[j - 1][0] + gh - 1
                    right = places[i - 1][1] - places[j - 1][1] + gw - 1
                    row = down * (2 * gw - 1) + right
                logits[:, i, j] += bias.table[row]
        mixed = (logits.softmax(-1) @ v).transpose(0, 1).reshape(1, 7, -1)
        x = x + attention.proj(mixed)
        x = x + block.mlp(block.norm2(x))
        expected.append(x[:, 1:].transpose(1, 2).reshape(1, -1, gh, gw))
    for found, wanted in zip(model.features(images), expected, strict=True):
        assert worst(found, wanted) < ROUNDING
    assert model.relative[0].table.std() > 0.01


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (6, 4), (1, 1)])
def test_offsets_keep_their_rows_on_other_grids(grid: tuple[int, int]) -> None:
    known = (3, 4)
    index = relative_index(known, grid)
    offsets = {}
    for i, (r, c) in enumerate((r, c) for r in range(known[0]) for c in range(known[1])):
        for j, (s, t) in enumerate((r, c) for r in range(known[0]) for c in range(known[1])):
            offsets[r - s, c - t] = int(relative_index(known, known)[1 + i, 1 + j])
    assert sorted(offsets.values()) == list(range(5 * 7))
    gw = grid[1]
    for i in range(grid[0] * gw):
        for j in range(grid[0] * gw):
            down, right = i // gw - j // gw, i % gw - j % gw
            edge = max(-2, min(2, down)), max(-3, min(3, right))
            assert index[1 + i, 1 + j] == offsets[edge]
    assert (index[0, 1:] == 35).all() and (index[1:, 0] == 36).all() and index[0, 0] == 37
    assert RelativeBias(known, 2)(index).shape == (1, 2, len(index), len(index))


# ---- Layers, registry, settings ------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"relative_bias": True, "lscale_init": 1.0}])
def test_layers(settings: dict[str, Any]) -> None:
    model = micro(**settings)
    groups = model.layer_groups()
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 4 + 2
    decay = {n: g for g in layer_decay_groups(model, 0.05, 0.65) for n in g["param_names"]}
    scale = {name: group["lr_scale"] for name, group in decay.items()}
    assert scale["encoder.cls_token"] == pytest.approx(0.65**5)
    assert scale["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.65**4)
    assert scale["encoder.blocks.3.mlp.fc1.bias"] == pytest.approx(0.65)
    assert scale["neck.upsample_2x.0.weight"] == scale["decode_head.conv_seg.weight"] == 1
    exempt = {name for name, group in decay.items() if group["weight_decay"] == 0}
    assert {"encoder.pos_embed", "encoder.cls_token", "decode_head.bottleneck.bn.weight"} < exempt
    assert "neck.upsample_2x.0.weight" not in exempt
    if settings:
        assert scale["relative.1.table"] == scale["encoder.blocks.1.ls1.gamma"]


@pytest.mark.parametrize("name", [n for n in list_segmenters() if "micro" in n or "tiny" in n])
@torch.no_grad()
def test_every_small_name(name: str) -> None:
    patch = model_arguments(name)["patch_size"]
    side = 8 * patch if "swin" in name else 4 * patch
    model = create_segmenter(name, 3, img_size=side, **SMALL).eval()
    stride = patch if "swin" in name else 4
    shape = (1, 3, side // stride, side // stride // 2)
    assert model(draw(1, 3, side, side // 2))["logits"].shape == shape
    again = segmenter_from(model.arguments)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.arguments == model.arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": [0, 1, 2]}, "four blocks"),
        ({"taps": [0, 1, 1, 3]}, "four blocks"),
        ({"taps": [3, 2, 1, 0]}, "four blocks"),
        ({"taps": [0, 1, 2, 4]}, "encoder's last, 3"),
        ({"depth": 3}, "this one has 3"),
        ({"channels": 0}, "at least 1"),
        ({"pool_scales": []}, "at least 1"),
        ({"aux_tap": 4}, "0 to 3"),
        ({"img_size": 30}, "multiple of the patch"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        create_segmenter("vit_micro_patch8", K, **settings)


def test_an_unknown_name() -> None:
    with pytest.raises(BadInput, match="did you mean vit_micro_patch8"):
        create_segmenter("vit_mikro_patch8", K)


# ---- Encoders from files -------------------------------------------------------------------------


def save_segmenter(folder: Path, model: UperNet) -> Path:
    """A checkpoint as main_segment writes it."""
    path = folder / "segment.pth"
    state = {"task": "segment", "step": 1, "model_args": model.arguments}
    write_signed(path, state | {"model": model.state_dict()})
    return path


def same_encoder(model: UperNet, expected: VisionTransformer, images: Tensor) -> None:
    """The maps are those of the encoder that the classifier's loader gives."""
    with torch.no_grad():
        wanted = expected.eval().forward_intermediates(
            images, list(model.taps), intermediates_only=True
        )
        for found, one in zip(model.eval().features(images), wanted, strict=True):
            assert worst(found, one) < ROUNDING


@pytest.mark.parametrize("resize", ["rescale", "extend"])
@pytest.mark.parametrize("terms", [{}, {"lscale_init": 0.1, "pos_offset": "learned"}])
def test_from_our_pretraining(terms: dict[str, Any], resize: str, tmp_path: Path) -> None:
    source, arguments = micro_mae(**terms)
    path = save_pretrained(tmp_path, source, arguments)
    patch = source.patch_size[0]
    side = 2 * source.img_size[0]
    model = create_segmenter(f"vit_micro_patch{patch}", K, img_size=side, **SMALL)
    heads = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder")}
    load_segmenter_encoder(model, str(path), resize)
    expected, _ = load_encoder(str(path), img_size=(side, side), pos_resize=resize)
    same_encoder(model, expected, draw(2, 3, side, side))
    assert (model.arguments["lscale_init"] is None) == (not terms)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in heads.items())


def official_file(tmp_path: Path) -> Path:
    return save_official(tmp_path / "mae.pth", official_mae()[1], None)


def test_from_official_mae_timm_finetuned_and_segmenters(tmp_path: Path) -> None:
    base = {"channels": 8, "aux_channels": 4}
    paths = [official_file(tmp_path)]
    arguments = model_arguments("vit_micro_patch8") | {"num_classes": 3, "global_pool": "cls"}
    tuned = trained(VisionTransformer(**arguments))
    paths.append(save_finetuned(tmp_path, tuned, arguments))
    paths.append(save_segmenter(tmp_path, micro(img_size=64)))
    torch.save(trained(timm_vit("cls")).state_dict(), tmp_path / "timm.pth")
    paths.append(tmp_path / "timm.pth")
    for path in paths:
        expected, _ = load_encoder(str(path))
        shape = {
            "img_size": expected.img_size, "patch_size": expected.patch_size, "num_classes": K,
            "embed_dim": expected.num_features, "depth": len(expected.blocks),
            "num_heads": expected.blocks[0].attn.num_heads,
            "mlp_ratio": expected.blocks[0].mlp.fc1.out_features / expected.num_features,
        }  # fmt: skip
        model = segmenter_from(shape | base)
        load_segmenter_encoder(model, str(path))
        same_encoder(model, expected, images_for(expected))


def test_scales_of_the_model_alone_stay(tmp_path: Path) -> None:
    source, arguments = micro_mae()
    path = save_pretrained(tmp_path, source, arguments)
    model = create_segmenter(
        f"vit_micro_patch{source.patch_size[0]}",
        K,
        img_size=source.img_size,
        lscale_init=1.0,
        **SMALL,
    )
    load_segmenter_encoder(model, str(path))
    gammas = [v for k, v in model.state_dict().items() if k.endswith("gamma")]
    assert len(gammas) == 2 * len(source.blocks) and all((g == 1).all() for g in gammas)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    source, arguments = micro_mae()
    path = save_pretrained(tmp_path, source, arguments)
    with pytest.raises(BadInput, match=r"a different architecture: embed_dim 128.*192"):
        load_segmenter_encoder(create_segmenter("vit_tiny_patch8", K, **SMALL), str(path))
    with pytest.raises(BadInput, match="rescale, extend"):
        load_segmenter_encoder(micro(), str(path), "stretch")


def test_positions_are_resized_once_when_loaded(tmp_path: Path) -> None:
    source, arguments = micro_mae()
    path = save_pretrained(tmp_path, source, arguments)
    patch, grid = source.patch_size[0], (6, 10)
    model = create_segmenter(
        f"vit_micro_patch{patch}", K, img_size=(grid[0] * patch, grid[1] * patch), **SMALL
    )
    load_segmenter_encoder(model, str(path), "extend")
    code = sincos_2d(128, grid).float()
    assert torch.allclose(model.encoder.pos_embed[0, 1:], code, atol=1e-6)


# ---- Whole segmenters ----------------------------------------------------------------------------


def mmseg_keys(depth: int) -> set[str]:
    """The state dict of mmsegmentation's EncoderDecoder with MAE, Feature2Pyramid, UPerHead and
    FCNHead, written down from the definitions of these classes."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    both = ("weight", "bias")
    keys = {"backbone.cls_token", "backbone.pos_embed"}
    keys |= {f"backbone.patch_embed.projection.{kind}" for kind in both}
    for i in range(depth):
        layer = f"backbone.layers.{i}"
        parts = ("ln1", "ln2", "attn.qkv", "attn.proj", "ffn.layers.0.0", "ffn.layers.1")
        keys |= {f"{layer}.{part}.{kind}" for part in parts for kind in both}
        keys |= {f"{layer}.gamma_1", f"{layer}.gamma_2"}
        keys |= {f"{layer}.attn.relative_position_{x}" for x in ("bias_table", "index")}
    keys |= {f"neck.upsample_4x.{i}.{kind}" for i in (0, 3) for kind in both}
    keys |= {f"neck.upsample_4x.1.{kind}" for kind in bn}
    keys |= {f"neck.upsample_2x.0.{kind}" for kind in both}
    convs = ["decode_head.bottleneck", "decode_head.fpn_bottleneck", "auxiliary_head.convs.0"]
    convs += [f"decode_head.psp_modules.{i}.1" for i in range(4)]
    convs += [f"decode_head.{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(3)]
    for conv in convs:
        keys |= {f"{conv}.conv.weight"} | {f"{conv}.bn.{kind}" for kind in bn}
    heads = ("decode_head", "auxiliary_head")
    return keys | {f"{head}.conv_seg.{kind}" for head in heads for kind in both}


@pytest.mark.parametrize("settings", [{}, {"relative_bias": True, "lscale_init": 0.5}])
def test_mmsegmentations_names(settings: dict[str, Any], tmp_path: Path) -> None:
    model = micro("vit_tiny_patch16", img_size=64, depth=4, **settings).eval()
    named = to_mmseg_names(model)
    assert set(named) == mmseg_keys(4)
    D, heads, grid = 192, 3, 4
    assert named["backbone.layers.0.attn.relative_position_bias_table"].shape == (52, heads)
    assert named["backbone.layers.3.attn.relative_position_index"].shape == (17, 17)
    assert named["backbone.layers.1.gamma_2"].shape == (D,)
    assert named["backbone.pos_embed"].shape == (1, 1 + grid * grid, D)
    assert named["neck.upsample_4x.0.weight"].shape == (D, D, 2, 2)
    assert named["decode_head.bottleneck.conv.weight"].shape == (16, D + 64, 3, 3)
    assert named["decode_head.fpn_bottleneck.conv.weight"].shape == (16, 64, 3, 3)
    back = segmenter_from_mmseg(named, "test")
    own = model.state_dict()
    assert set(back) == set(own) and all(torch.equal(back[k], own[k]) for k in own)
    path = tmp_path / "mmseg.pth"
    torch.save({"state_dict": named, "meta": {"CLASSES": ["a"]}}, path)
    again, state = load_segmenter(str(path))
    assert again.arguments == model.arguments | {
        "drop_path": 0.0, "taps": [0, 1, 2, 3], "lscale_init": 1.0 if settings else None,
    }  # fmt: skip
    images = draw(1, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(again.eval()(images)["logits"], model(images)["logits"])
    assert state["meta"]["CLASSES"] == ["a"]


@pytest.mark.parametrize("to", ["mmseg", "mmae"])
@pytest.mark.parametrize("settings", [{}, {"relative_bias": True, "lscale_init": 1.0}])
def test_exported_whole_and_back(
    to: str, settings: dict[str, Any], run_main: Any, tmp_path: Path
) -> None:
    """Every tensor, also of scales and biases that never learned anything."""
    torch.manual_seed(0)
    model = create_segmenter("vit_micro_patch8", K, img_size=32, **SMALL, **settings)
    places = [save_segmenter(tmp_path, model), tmp_path / "there.pth", tmp_path / "back.pth"]
    for start, end, target in zip(places, places[1:], (to, "mmae"), strict=False):
        given = ["--checkpoint", str(start), "--to", target, "--output", str(end)]
        code, out, err = run_main("main_export", given)
        assert code == 0, err
        assert "segmenter to" in out and "verified" in out
        assert ("type='UPerHead'" in out) == (target == "mmseg")
    again, _ = load_segmenter(str(places[2]))
    own = model.state_dict()
    assert again.arguments == model.arguments and list(again.state_dict()) == list(own)
    assert all(torch.equal(v, own[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "timm", "--part", "segmenter"], "takes no segmenter"),
        (["--to", "mmseg", "--input_size", "64"], "takes any size"),
        (["--to", "mmseg"], "8 pixels or more"),
    ],
)
def test_segmenters_that_cannot_be_exported(
    flags: list[str], message: str, run_main: Any, tmp_path: Path
) -> None:
    path = save_segmenter(tmp_path, micro("vit_micro_patch4"))
    given = ["--checkpoint", str(path), "--output", str(tmp_path / "new.pth"), *flags]
    code, _, err = run_main("main_export", given)
    assert code == 2 and message in err
    assert not (tmp_path / "new.pth").exists()


def test_the_public_runs_names(tmp_path: Path) -> None:
    """timm's names under `backbone.`, the neck as `fpn1` and `fpn2`, scales as `gamma_*`."""
    model = micro("vit_tiny_patch16", img_size=64, depth=4, relative_bias=True, lscale_init=1.0)
    old = {}
    for key, tensor in model.state_dict().items():
        name = key.replace("encoder.", "backbone.").replace("neck.upsample_4x", "backbone.fpn1")
        name = name.replace("neck.upsample_2x", "backbone.fpn2").replace("ls1.gamma", "gamma_1")
        if name.startswith("relative"):
            block = f"backbone.blocks.{name.split('.')[1]}.attn.relative_position"
            name = f"{block}_bias_table"
            old[f"{block}_index"] = relative_index((4, 4), (4, 4))
        old[name.replace("ls2.gamma", "gamma_2")] = tensor
    back, _ = build_segmenter({"state_dict": old}, "public.pth")
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in back.state_dict().items())
    assert len(back.state_dict()) == len(own)


def test_our_own_comes_back(tmp_path: Path) -> None:
    settings = {"pool_scales": [1, 3], "taps": [1, 2, 3, 5], "depth": 6, "drop_path": 0.2}
    model = micro(relative_bias=True, img_size=(16, 32), **settings)
    again, state = load_segmenter(str(save_segmenter(tmp_path, model)), None)
    assert again.arguments == model.arguments and state["task"] == "segment"
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in again.state_dict().items())


def test_files_that_hold_no_segmenter(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no segmenter"):
        load_segmenter(str(official_file(tmp_path)))
    path = save_segmenter(tmp_path, micro())
    with pytest.raises(BadInput, match=r"a different architecture: embed_dim 128.*192"):
        load_segmenter(str(path), "vit_tiny_patch8")
    named = to_mmseg_names(micro())
    for missing in ("decode_head.conv_seg.bias", "backbone.layers.2.ln1.weight"):
        with pytest.raises(BadInput, match="missing 1: "):
            build_segmenter({k: v for k, v in named.items() if k != missing}, "cut.pth")
    learned = micro(relative_bias=True)
    with pytest.raises(BadInput, match="relative position biases"):
        load_encoder(str(save_segmenter(tmp_path, learned)))


def test_create_model_takes_the_encoder_of_a_segmenter(tmp_path: Path) -> None:
    model = micro()
    path = save_segmenter(tmp_path, model)
    encoder = create_model("vit_micro_patch8", pretrained=str(path), num_classes=0)
    same_encoder(model, encoder, draw(1, 3, 32, 32))


# ---- Several processes ---------------------------------------------------------------------------


def train_part(rank: int, world: int, folder: Path) -> None:
    """One step's gradients on this process's images of a batch of 3."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.save(step(slice(0, 1) if rank == 0 else slice(1, 3)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def step(rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a sum over images, and running statistics, in float64."""
    model = micro(dropout=0.0).double().train()
    found = model(draw(3, 3, 32, 32).double()[rows])
    (found["logits"].sin().sum() + found["aux"].cos().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, {n: b for n, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.dist
def test_two_processes_are_one_on_the_whole_batch(tmp_path: Path) -> None:
    expected, statistics = step(slice(0, 3))
    assert wait(start_group(train_part, 2, tmp_path)) == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        total = parts[0][0][name] + parts[1][0][name]
        bound = 1e-9 * max(float(gradient.norm()), 1e-6 * largest)
        assert float((total - gradient).norm()) <= bound, name
    for _, buffers in parts:
        for name, value in statistics.items():
            assert torch.allclose(buffers[name], value, rtol=1e-9, atol=1e-12), name
