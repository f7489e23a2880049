"""The classifier: files of ours, of the official MAE code and of timm; positions; what learns.

Files are written as the programs that make them write them. Tolerances stand at each comparison.
"""

import argparse
import email.message
import http.client
import io
import shutil
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from tiny import names_of
from torch import Tensor, nn

import models_zoo
from models_mmae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from models_zoo import (
    ENCODER_SIZES,
    create_model,
    load_classifier,
    load_encoder,
    model_arguments,
)
from util.errors import BadInput
from util.mask.patches import patchify
from util.mask.pos_embed import COORDINATES, sincos_2d, spread
from util.train.checkpoint import LAST, load_file, local_file, newest, save_checkpoint
from util.train.checksums import COMMENT

Weights = dict[str, Tensor]

MICRO = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
# For positions alone: 14 x 14 patches at 224, and little else.
THIN = {"img_size": 224, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
THIN_DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
CLASSES = 10
LETTERS = [f"class {i}" for i in range(CLASSES)]
EXACT = {"rtol": 0, "atol": 1e-9}  # in float64


@pytest.fixture
def float64() -> Iterator[None]:
    """Models are built in float64, so that rounding cannot hide a fault."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- Models and files ----------------------------------------------------------------------------


def trained(model: nn.Module, seed: int = 0) -> Any:
    """The model with every learnable parameter and statistic as training might leave it."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.ndim == 1:
            p.data += 0.2 * noise  # biases, norms, scales
        elif "phase" in name or p.ndim == 3:
            p.data = 0.5 * noise  # phases, tokens, positions
        else:
            p.data = noise / p[0].numel() ** 0.5
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


def timm_vit(pool: str = "avg", classes: int = CLASSES, **kwargs: Any) -> TimmVisionTransformer:
    """timm's own, with MAE's epsilon: mean then `fc_norm`, or `norm` then the class token."""
    return TimmVisionTransformer(
        **(MICRO | kwargs),
        num_classes=classes,
        global_pool={"avg": "avg", "cls": "token"}[pool],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )


def images_for(model: Any, B: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    shape = (B, model.in_chans, *model.img_size)
    return torch.randn(shape, generator=generator, dtype=model.pos_embed.dtype)


def namespace(model: str, **flags: Any) -> argparse.Namespace:
    """What the official mains leave beside their weights."""
    common = {"batch_size": 64, "blr": 1e-3, "dist_url": "env://", "input_size": 224, "lr": None}
    return argparse.Namespace(model=model, **common, **flags)


def save_official(path: Path, weights: Weights, flags: argparse.Namespace | None) -> Path:
    """A checkpoint of the official mains; without flags one of its released files."""
    more = {"optimizer": {"state": {}}, "epoch": 99, "scaler": {"scale": 65536.0}, "args": flags}
    torch.save({"model": weights, **(more if flags else {})}, path)
    return path


def save_pretrained(folder: Path, model: MaskedAutoencoderViT, arguments: dict[str, Any]) -> Path:
    """A checkpoint as main_pretrain writes it."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    state = {
        "task": "pretrain",
        "epoch": 0,
        "step": 1,
        "model_name": "mae_vit_micro_patch8",
        "model_args": plain,
        "model": model.state_dict(),
        "optimizer": {},
        "data": {"dataset": "photos", "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return save_checkpoint(folder, state)


def save_finetuned(folder: Path, model: VisionTransformer, arguments: dict[str, Any]) -> Path:
    """A checkpoint as main_finetune writes it; the model's name may be unknown there."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    state = {
        "task": "finetune",
        "epoch": 0,
        "step": 1,
        "model_name": None,
        "model_args": plain,
        "model": model.state_dict(),
        "classes": LETTERS,
        "tune": "full",
        "best": {"top1": 50.0, "epoch": 0},
        "optimizer": {},
    }
    return save_checkpoint(folder, state, 0)


def micro_mae(**terms: Any) -> tuple[MaskedAutoencoderViT, dict[str, Any]]:
    """A masked autoencoder as if trained, and its arguments."""
    arguments = model_arguments("mae_vit_micro_patch8") | terms
    torch.manual_seed(0)
    return trained(create_model("mae_vit_micro_patch8", **terms)), arguments


def official_mae(decoder: bool = True) -> tuple[MaskedAutoencoderViT, Weights]:
    """MAE as if trained, and its weights in the official names; tests/test_parity.py maps them."""
    model, _ = micro_mae()
    encoder = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    weights = {
        k: v.clone() for k, v in model.state_dict().items() if decoder or k.startswith(encoder)
    }
    return model, weights


def all_tokens(model: MaskedAutoencoderViT, images: Tensor) -> Tensor:
    """The encoder with nothing masked: [B, 1 + L, D]."""
    every_patch = torch.arange(model.grid[0] * model.grid[1]).expand(len(images), -1)
    return model.forward_encoder(patchify(images, model.patch_size), every_patch)


def assert_same_logits(ours: VisionTransformer, theirs: nn.Module) -> None:
    """Within 1e-5 of the largest logit, float32."""
    images = images_for(ours)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        difference = (ours.eval()(images) - expected).abs().max()
    assert expected.std() > 0.1, "logits that are all alike show nothing"
    assert difference <= 1e-5 * expected.abs().max()


# ---- Classifiers with their own head -------------------------------------------------------------


def test_official_finetuned_base_is_timms(tmp_path: Path) -> None:
    sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    theirs = trained(timm_vit("avg", 1000, **sizes))
    flags = namespace("vit_base_patch16", nb_classes=1000, global_pool=True, layer_decay=0.65)
    path = save_official(tmp_path / "mae_finetuned_vit_base.pth", theirs.state_dict(), flags)
    ours, arguments, rest = load_classifier(str(path), head="own")
    path.unlink()  # 340 MB, which pytest would keep
    assert arguments["num_heads"] == ours.blocks[0].attn.num_heads == 12
    assert (ours.num_classes, arguments["global_pool"]) == (1000, "avg")
    assert rest["args"] == flags
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", [None, "vit_micro_patch8"])
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_official_finetuned_is_timms(pool: str, name: str | None, tmp_path: Path) -> None:
    theirs = trained(timm_vit(pool))
    flags = namespace("vit_micro_patch8", nb_classes=CLASSES, global_pool=pool == "avg")
    path = save_official(tmp_path / "finetuned.pth", theirs.state_dict(), flags)
    ours, arguments, _ = load_classifier(str(path), name, head="own")
    assert (arguments["num_heads"], arguments["global_pool"]) == (4, pool)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("pool", "lscale"), [("avg", None), ("cls", None), ("cls", 0.1)])
def test_timms_files_are_timms(suffix: str, pool: str, lscale: float | None, tmp_path: Path):
    theirs = trained(timm_vit(pool, img_size=(64, 64), in_chans=2, init_values=lscale))
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(theirs.state_dict(), path)
    ours, arguments, _ = load_classifier(str(path), head="own")
    assert (arguments["in_chans"], arguments["global_pool"]) == (2, pool)
    assert any(k.endswith("ls2.gamma") for k in ours.state_dict()) == (lscale is not None)
    assert_same_logits(ours, theirs)


def test_official_linear_probe_is_torchs(tmp_path: Path) -> None:
    theirs = timm_vit("cls")
    norm = nn.BatchNorm1d(MICRO["embed_dim"], affine=False, eps=1e-6)
    theirs.head = nn.Sequential(norm, theirs.head)
    trained(theirs)
    flags = namespace("vit_micro_patch8", nb_classes=CLASSES)
    path = save_official(tmp_path / "probe.pth", theirs.state_dict(), flags)
    ours, arguments, _ = load_classifier(str(path), head="own")
    assert arguments["probe"] and arguments["num_heads"] == 4
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"global_pool": "avg", "lscale_init": 0.1, "drop_path": 0.2},
        {"global_pool": "cls", "img_size": (64, 48), "in_chans": 1},
        {"global_pool": "cls", "probe": True},
        {"global_pool": "avg", "probe": True, "num_heads": 2, "mlp_ratio": 2.5},
    ],
)
def test_our_own_come_back_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES} | settings
    saved = trained(VisionTransformer(**arguments))
    path = save_finetuned(tmp_path, saved, arguments)
    loaded, found, state = load_classifier(str(path), head="own")
    assert state["classes"] == LETTERS
    assert found["num_heads"] == arguments["num_heads"]  # the file's, not width / 64 or micro's
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    images = images_for(saved)
    assert torch.equal(loaded.eval()(images), saved(images))


def test_a_new_head_is_fresh_and_the_rest_stays(tmp_path: Path) -> None:
    arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES, "probe": True}
    saved = trained(VisionTransformer(**arguments, global_pool="cls"))
    path = save_finetuned(tmp_path, saved, arguments | {"global_pool": "cls"})
    model, found, _ = load_classifier(
        str(path), head="new", num_classes=3, probe=False, global_pool="avg", drop_path=0.1
    )
    assert (found["num_classes"], found["probe"], model.head.out_features) == (3, False, 3)
    assert torch.equal(model.fc_norm.weight, torch.ones(128))  # `norm` is not the mean's norm
    assert isinstance(model.norm, nn.Identity)
    kept = {k for k in saved.state_dict() if not k.startswith(("norm.", "head."))}
    assert set(model.state_dict()) - kept == {
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"
    }  # fmt: skip
    assert all(torch.equal(model.state_dict()[k], saved.state_dict()[k]) for k in kept)
    # The arguments make the same model again, as a resume does.
    VisionTransformer(**found).load_state_dict(model.state_dict(), strict=True)


# ---- Pretrained encoders -------------------------------------------------------------------------


@pytest.mark.parametrize("lscale_init", [None, 0.1])
@pytest.mark.parametrize("pos_offset", COORDINATES)
def test_our_pretraining_gives_its_encoder(
    pos_offset: str, lscale_init: float | None, tmp_path: Path, float64: None
) -> None:
    mae, arguments = micro_mae(
        pos_offset=pos_offset, lscale_init=lscale_init, img_size=(64, 48), in_chans=1
    )
    if pos_offset == "learned":
        assert mae.pos_phase.abs().max() > 0.1
    path = save_pretrained(tmp_path, mae, arguments)
    images = images_for(mae)
    tokens = all_tokens(mae, images)
    encoder, state = load_encoder(str(path))
    encoder.eval()
    assert state["model_name"] == "mae_vit_micro_patch8"
    assert (encoder.img_size, encoder.in_chans, encoder.num_classes) == ((64, 48), 1, 0)
    torch.testing.assert_close(encoder.forward_features(images), tokens, **EXACT)
    torch.testing.assert_close(encoder.features(images, "cls"), tokens[:, 0], **EXACT)
    probe, _, _ = load_classifier(
        str(path), head="new", num_classes=CLASSES, global_pool="cls", probe=True
    )
    # The BatchNorm's statistics start at 0 and 1, and its epsilon is 1e-6.
    logits = probe.linear(tokens[:, 0] / (1 + 1e-6) ** 0.5)
    torch.testing.assert_close(probe.eval()(images), logits, **EXACT)


@pytest.mark.parametrize("flags", [None, namespace("mae_vit_micro_patch8", norm_pix_loss=True)])
@pytest.mark.parametrize("decoder", [False, True])
def test_official_pretrained_gives_its_encoder(
    decoder: bool, flags: argparse.Namespace | None, tmp_path: Path
) -> None:
    mae, weights = official_mae(decoder)
    assert ("mask_token" in weights) == decoder
    path = str(save_official(tmp_path / "mae_pretrain_vit_micro.pth", weights, flags))
    images = images_for(mae)
    with torch.inference_mode():
        tokens = all_tokens(mae, images)
        encoder, _ = load_encoder(path)
        found = encoder.eval().forward_features(images)
    assert encoder.blocks[0].attn.num_heads == 4
    # float32, 4 blocks; the tokens are of size 1.
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5 * float(tokens.abs().max()))

    model, arguments, _ = load_classifier(path, num_classes=CLASSES, global_pool="avg")
    assert (arguments["num_heads"], arguments["img_size"]) == (4, [64, 64])
    own = model.state_dict()
    kept = {k for k in weights if not k.startswith(("decoder_", "mask_token", "norm."))}
    assert all(torch.equal(own.pop(k), weights[k]) for k in kept)
    assert sorted(own) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]


@pytest.mark.filterwarnings("ignore:.*to a meta parameter")
@pytest.mark.parametrize(
    ("width", "depth", "heads"), [*ENCODER_SIZES.values(), (256, 2, 4), (32, 1, 1)]
)
def test_heads_of_files_that_do_not_say(
    width: int, depth: int, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_meta(**arguments: Any) -> VisionTransformer:
        with torch.device("meta"):
            return VisionTransformer(**arguments)

    shapes = on_meta(img_size=32, embed_dim=width, depth=depth, num_heads=1).state_dict()
    # Huge is 2.5 GB: one number stands for each tensor, and the model takes no memory.
    weights = {k: torch.zeros(1).expand(v.shape) for k, v in shapes.items()}
    path = save_official(tmp_path / "weights.pth", weights, None)
    monkeypatch.setattr(models_zoo, "VisionTransformer", on_meta)
    model, arguments, _ = load_classifier(str(path), head="own")
    assert arguments["num_heads"] == heads
    assert {block.attn.num_heads for block in model.blocks} == {heads}


# ---- Positions at another size -------------------------------------------------------------------

TARGETS = [(192, 192), (384, 384), (192, 320)]


def positions_by_numpy(
    dim: int, to: tuple[int, int], offset: str, resize: str, phase: np.ndarray | None
) -> np.ndarray:
    """The code of 14 x 14 patches on another grid: float64 [gh*gw, dim].

    Rescaled patches are cut from the image's extent by their edges; extended ones are 1 apart.
    """
    axes = []
    for size in to:
        first = 0.0 if offset == "none" else -(14 - 1) / 2
        edges = np.linspace(first - 0.5, first + 14 - 0.5, size + 1)
        axes.append((edges[:-1] + edges[1:]) / 2)
        if resize == "extend":
            axes[-1] = np.arange(size) - (0.0 if offset == "none" else (size - 1) / 2)
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    parts = []
    for axis in (1, 0):  # x before y
        angles = axes[axis][:, None] * frequencies + (0 if phase is None else phase[axis])
        part = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [size, dim / 2]
        part = part[None, :] if axis else part[:, None]
        parts.append(np.broadcast_to(part, (*to, dim // 2)))
    return np.concatenate(parts, axis=2).reshape(-1, dim)


@pytest.mark.parametrize("resize", ["rescale", "extend"])
@pytest.mark.parametrize("pos_offset", COORDINATES)
def test_a_code_at_another_size(pos_offset: str, resize: str, tmp_path: Path) -> None:
    arguments = THIN | THIN_DECODER | {"pos_offset": pos_offset}
    mae = trained(MaskedAutoencoderViT(**arguments))
    mae.pos_embed.data[:, 0] = 0.25  # the class token's stays whatever it is
    phase = None
    if pos_offset == "learned":
        phase = mae.pos_phase.detach().double().numpy()
        assert np.abs(phase).max() > 0.1
    path = str(save_pretrained(tmp_path, mae, arguments))
    for size in ((224, 224), *TARGETS):
        model, found, _ = load_classifier(path, head="none", img_size=size, pos_resize=resize)
        assert found["img_size"] == list(size) and model.img_size == size
        to = (size[0] // 16, size[1] // 16)
        expected = positions_by_numpy(32, to, pos_offset, resize, phase)
        # Numbers up to 1, rounded to float32.
        np.testing.assert_allclose(model.pos_embed[0, 1:].detach(), expected, rtol=0, atol=1e-6)
        assert (model.pos_embed[0, 0] == 0.25).all()
        assert model.pos_embed.dtype == torch.float32
        assert model.eval()(images_for(model, 1)).isfinite().all()
    if pos_offset != "learned":
        same, _, _ = load_classifier(path, head="none", pos_resize=resize)
        assert torch.equal(same.pos_embed, mae.pos_embed)


@pytest.mark.parametrize("size", [1, 5, 12, 14, 24])
@pytest.mark.parametrize("pos_offset", COORDINATES)
def test_rescaling_keeps_the_extent(pos_offset: str, size: int) -> None:
    before = COORDINATES[pos_offset](14, None)
    after = spread(before, size)
    step = 14 / size
    assert after.shape == (size,)
    torch.testing.assert_close(after[0] - step / 2, before[0] - 0.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(after[-1] + step / 2, before[-1] + 0.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.diff(), torch.full_like(after[1:], step), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pos_offset", COORDINATES)
def test_a_third_of_each_side_has_the_same_middles(pos_offset: str) -> None:
    coarse = sincos_2d(16, (4, 3), pos_offset).reshape(4, 3, 16)
    fine = sincos_2d(16, (12, 9), pos_offset, extent=(4, 3)).reshape(12, 9, 16)
    torch.testing.assert_close(fine[1::3, 1::3], coarse, rtol=0, atol=1e-12)


def thin_official(path: Path, table: Tensor | None = None) -> Path:
    """An official fine-tuned file of 14 x 14 patches; its positions are trained if not given."""
    weights = trained(timm_vit("avg", **THIN)).state_dict()
    if table is not None:
        weights["pos_embed"] = table
    return save_official(path, weights, namespace("vit_thin_patch16"))


def frozen_table(dim: int = 32) -> Tensor:
    """MAE's code on 14 x 14 patches as official files hold it: float32 [1, 197, dim]."""
    code = positions_by_numpy(dim, (14, 14), "none", "rescale", None)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), code])).float().unsqueeze(0)


def bicubic_by_numpy(size: int, to: int) -> np.ndarray:
    """Bicubic weights (a = -.75, edges repeated, corners not aligned): float64 [to, size]."""
    a, matrix = -0.75, np.zeros((to, size))
    for i in range(to):
        x = (i + 0.5) * size / to - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - k)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), size - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("size", TARGETS)
def test_a_trained_table_is_resized_as_the_official_code_does(
    size: tuple[int, int], tmp_path: Path
) -> None:
    path = thin_official(tmp_path / "finetuned.pth")
    table = load_file(path)["model"]["pos_embed"]
    to = (size[0] // 16, size[1] // 16)
    model, _, _ = load_classifier(str(path), head="own", img_size=size)
    assert torch.equal(model.pos_embed[:, 0], table[:, 0])
    found = model.pos_embed[0, 1:].detach()

    grid = table[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    official = F.interpolate(grid, size=to, mode="bicubic", align_corners=False)
    official = official.permute(0, 2, 3, 1).flatten(1, 2)[0]
    torch.testing.assert_close(found, official, rtol=0, atol=1e-6)

    rows, columns = (bicubic_by_numpy(14, n) for n in to)
    numbers = table[0, 1:].double().numpy().reshape(14, 14, 32)
    by_numpy = np.einsum("ik,jl,kld->ijd", rows, columns, numbers).reshape(-1, 32)
    np.testing.assert_allclose(found, by_numpy, rtol=0, atol=1e-5)  # float32, numbers up to 3


@pytest.mark.parametrize("resize", ["rescale", "extend"])
def test_an_equal_grid_leaves_a_table_alone(resize: str, tmp_path: Path) -> None:
    path = thin_official(tmp_path / "finetuned.pth")
    table = load_file(path)["model"]["pos_embed"]
    for size in (None, (224, 224)):
        model, _, _ = load_classifier(str(path), head="own", img_size=size, pos_resize=resize)
        assert torch.equal(model.pos_embed, table)


def test_a_trained_table_is_not_extended(tmp_path: Path) -> None:
    almost = frozen_table()
    almost[0, 100, 7] += 1e-3  # one number of 6,000 has learned
    for table in (None, almost):
        path = thin_official(tmp_path / "finetuned.pth", table)
        with pytest.raises(BadInput, match=r"extend.*\(14, 14\).*\(24, 24\).*--pos_resize rescale"):
            load_classifier(str(path), head="own", img_size=(384, 384), pos_resize="extend")


def test_an_official_code_that_was_frozen_can_be_extended(tmp_path: Path) -> None:
    path = str(thin_official(tmp_path / "probe.pth", frozen_table()))
    for size in TARGETS:
        model, _, _ = load_classifier(path, head="own", img_size=size, pos_resize="extend")
        to = (size[0] // 16, size[1] // 16)
        expected = positions_by_numpy(32, to, "none", "extend", None)
        np.testing.assert_allclose(model.pos_embed[0, 1:].detach(), expected, rtol=0, atol=1e-6)


def test_an_official_code_is_rescaled_as_the_official_code_does(tmp_path: Path) -> None:
    """Not by the formula, which would be nearer to the truth: its numbers are to be reproduced."""
    table = frozen_table()
    path = str(thin_official(tmp_path / "probe.pth", table))
    same, _, _ = load_classifier(path, head="own")
    assert torch.equal(same.pos_embed.data, table)
    for size in TARGETS:
        to = (size[0] // 16, size[1] // 16)
        model, _, _ = load_classifier(path, head="own", img_size=size)
        rows, columns = (bicubic_by_numpy(14, n) for n in to)
        numbers = table[0, 1:].double().numpy().reshape(14, 14, 32)
        expected = np.einsum("ik,jl,kld->ijd", rows, columns, numbers).reshape(-1, 32)
        np.testing.assert_allclose(model.pos_embed[0, 1:].detach(), expected, rtol=0, atol=1e-5)


# ---- What learns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"global_pool": "avg"}, {"global_pool": "cls", "probe": True}]
)
@pytest.mark.parametrize("name", names_of(VisionTransformer))
def test_layer_groups_hold_each_parameter_once(name: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = create_model(name, lscale_init=0.1, **settings)
    first, *blocks, last = model.layer_groups()
    names = [n for group in (first, *blocks, last) for n in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert len(blocks) == len(model.blocks) == model_arguments(name)["depth"]
    assert set(first) == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"
    }  # fmt: skip
    for i, group in enumerate(blocks):
        assert len(group) == 14 and all(n.startswith(f"blocks.{i}.") for n in group)
    norm = "fc_norm" if settings["global_pool"] == "avg" else "norm"
    head = "head.1" if "probe" in settings else "head"
    assert set(last) == {f"{part}.{kind}" for part in (norm, head) for kind in ("weight", "bias")}


def small_vit(**settings: Any) -> VisionTransformer:
    """Four blocks, 2 x 3 patches."""
    torch.manual_seed(0)
    arguments = {"img_size": (8, 12), "patch_size": 4, "num_classes": 5, "embed_dim": 16}
    return VisionTransformer(**(arguments | {"depth": 4, "num_heads": 2} | settings))


HEAD = {"head.weight", "head.bias"}
EMBEDDINGS = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
ATTENTION = {
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
    "attn.proj.bias", "ls1.gamma",
}  # fmt: skip
MLP = {
    "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
    "mlp.fc2.bias", "ls2.gamma",
}  # fmt: skip
# What of each block learns, 0 to 3, and whether final norm and embeddings do; the head always does.
# Source: MAE, section 4.3.
NOTHING: set[str] = set()
WHOLE = ATTENTION | MLP
TUNED: dict[str, tuple[list[set[str]], bool, bool]] = {
    "linear": ([NOTHING] * 4, False, False),
    "partial:0": ([NOTHING] * 4, False, False),
    "partial:0.5": ([NOTHING, NOTHING, NOTHING, MLP], True, False),
    "partial:1": ([NOTHING, NOTHING, NOTHING, WHOLE], True, False),
    "partial:2": ([NOTHING, NOTHING, WHOLE, WHOLE], True, False),
    "partial:3": ([NOTHING, WHOLE, WHOLE, WHOLE], True, False),
    "partial:4": ([WHOLE] * 4, True, True),
    "full": ([WHOLE] * 4, True, True),
}


@pytest.mark.parametrize("lscale_init", [None, 0.1])
@pytest.mark.parametrize(("pool", "norm"), [("avg", "fc_norm"), ("cls", "norm")])
@pytest.mark.parametrize("tune", TUNED)
def test_what_is_tuned(tune: str, pool: str, norm: str, lscale_init: float | None) -> None:
    blocks, with_norm, with_embeddings = TUNED[tune]
    expected = set(HEAD)
    for i, part in enumerate(blocks):
        expected |= {f"blocks.{i}.{n}" for n in part if lscale_init or "gamma" not in n}
    expected |= {f"{norm}.weight", f"{norm}.bias"} if with_norm else NOTHING
    expected |= EMBEDDINGS if with_embeddings else NOTHING

    model = small_vit(global_pool=pool, lscale_init=lscale_init)
    model.freeze_to("partial:1")  # what was frozen before does not count
    tuned = model.freeze_to(tune)
    assert len(tuned) == len(expected) and set(tuned) == expected
    model.train()
    model(images_for(model)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in expected), name
        assert (p.grad is not None) == (name in expected), name


def test_a_probe_learns_its_linear_layer() -> None:
    model = small_vit(global_pool="cls", probe=True)
    assert set(model.freeze_to("linear")) == {"head.1.weight", "head.1.bias"}
    model.init_head(0.01)
    assert model.linear.weight.std() < 0.02 and not model.linear.bias.any()


@pytest.mark.parametrize("tune", ["partial:5", "partial:1.5", "partial:-1", "partial:", "head"])
def test_no_such_part(tune: str) -> None:
    with pytest.raises(BadInput, match=f"'{tune}'.*up to 4 blocks"):
        small_vit().freeze_to(tune)


def outputs_of(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """What each block gives: [B, N, D]."""
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for b in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return [x.detach() for x in outputs]


@pytest.mark.parametrize("call_train", [True, False])
@pytest.mark.parametrize(
    ("tune", "frozen"),
    [("linear", 4), ("partial:0.5", 3), ("partial:1", 3), ("partial:3", 1), ("full", 0)],
)
def test_frozen_blocks_run_without_drop_path(tune: str, frozen: int, call_train: bool) -> None:
    model = small_vit(drop_path=0.5)
    assert model.training  # as every new module is
    model.freeze_to(tune)
    if call_train:
        model.train()
    images = images_for(model, B=32)
    measured = outputs_of(small_vit().eval(), images)
    first, second = outputs_of(model, images), outputs_of(model, images)
    for i in range(4):
        same = torch.equal(first[i], measured[i]) and torch.equal(second[i], measured[i])
        # Block 0 has rate 0 anyhow; the others, where they learn, drop something of 32 images.
        assert same == (i < max(frozen, 1)), f"block {i}"


def test_thawed_blocks_drop_again() -> None:
    model = small_vit(drop_path=0.5)
    model.freeze_to("linear")
    model.train()
    assert not any(block.training for block in model.blocks)
    model.freeze_to("full")
    model.train()
    assert all(block.training for block in model.blocks)
    assert not any(block.training for block in model.eval().blocks)


# ---- Features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[0, 2], [3], [-1, 1], 2, None])
def test_intermediates_are_the_blocks_outputs(indices: Any) -> None:
    model = trained(small_vit(lscale_init=0.1))  # 2 x 3 patches
    images = images_for(model)
    expected = outputs_of(model, images)
    named = (
        {2: [2, 3], None: [0, 1, 2, 3]}[indices]
        if indices in (2, None)
        else sorted(index % 4 for index in indices)
    )  # as timm, in the order of the blocks
    maps = model.forward_intermediates(images, indices=indices, intermediates_only=True)
    assert len(maps) == len(named)
    for found, block in zip(maps, named, strict=True):
        assert found.shape == (2, 16, 2, 3)
        for row in range(2):
            for column in range(3):
                token = expected[block][:, 1 + 3 * row + column]
                assert torch.equal(found[:, :, row, column], token)


@pytest.mark.parametrize("indices", [[0, 4], [-5], 0, 5, -1])
def test_blocks_that_are_not_there(indices: Any) -> None:
    with pytest.raises(ValueError, match="4 blocks"):
        small_vit().forward_intermediates(torch.zeros(1, 3, 8, 12), indices=indices)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_features(pool: str) -> None:
    model = trained(small_vit(global_pool=pool))
    images = images_for(model)
    tokens = outputs_of(model, images)[-1]
    norm = model.fc_norm if pool == "avg" else model.norm

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), norm.weight, norm.bias, 1e-6)

    # The norm comes before the mean where it is the class token's, and after it where the mean's.
    of_patches = normed(tokens[:, 1:].mean(1)) if pool == "avg" else normed(tokens[:, 1:]).mean(1)
    expected = {"cls": normed(tokens[:, 0]), "avg": of_patches}
    expected["both"] = torch.cat([expected["cls"], expected["avg"]], dim=1)
    for kind, value in expected.items():
        found = model.features(images, kind)
        assert found.shape == (2, 32 if kind == "both" else 16)
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)  # float32, numbers up to 4
    with pytest.raises(BadInput, match=r"'max'.*cls, avg, both"):
        model.features(images, "max")
    logits = F.linear(expected[pool], model.head.weight, model.head.bias)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)


# ---- Addresses -----------------------------------------------------------------------------------

ADDRESS = "https://example.org/mae/weights.pth"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of downloads, which does not exist yet."""
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_address_is_fetched_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = (trained(timm_vit("cls"), seed).state_dict() for seed in (0, 1))
    query = "https://example.org/mae/model.safetensors?download=true"
    files = {ADDRESS: tmp_path / "a.pth", "https://example.com/weights.pth": tmp_path / "b.pth"}
    for path, weights in zip(files.values(), (mine, other), strict=True):
        torch.save(weights, path)
    files[query] = tmp_path / "c.safetensors"
    save_file(other, files[query])
    fetched = []

    def fetch(url: str, dst: str, *_: Any, **__: Any) -> None:
        fetched.append(url)
        shutil.copyfile(files[url], dst)

    monkeypatch.setattr("util.train.checkpoint.download", fetch)
    for _ in range(2):
        for url, weights in zip(files, (mine, other, other), strict=True):
            model, _, _ = load_classifier(url, head="own")
            assert torch.equal(model.head.weight, weights["head.weight"]), url
    assert fetched == list(files)
    kept = {local_file(url) for url in files}
    assert len(kept) == 3 and all(cache in path.parents for path in kept)


@pytest.mark.parametrize("scheme", ["http", "ftp", "file", "s3"])
def test_only_https_is_fetched(scheme: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr("util.train.checkpoint.download", fetch)
    with pytest.raises(BadInput, match=rf"{scheme}://example\.org/weights\.pth.*https"):
        load_classifier(f"{scheme}://example.org/weights.pth")


class Response(io.BytesIO):
    """What urlopen gives: half of the body that its header announces, then a fault, or nothing."""

    def __init__(self, fault: Exception | None) -> None:
        super().__init__(b"x" * 500)
        self.fault = fault

    def info(self) -> email.message.Message:
        headers = email.message.Message()
        headers["Content-Length"] = "1000"
        return headers

    def read(self, *args: Any) -> bytes:
        data = super().read(*args)
        if not data and self.fault:
            raise self.fault
        return data


# http.client reads a body that ends too early in silence, so a plain copy would keep half a file.
FAULTS: dict[str, Callable[[], Exception | None]] = {
    "reset": lambda: ConnectionResetError("reset by peer"),
    "slow": lambda: TimeoutError("timed out"),
    "chunked": lambda: http.client.IncompleteRead(b"x" * 500),
    "short": lambda: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_breaks_leaves_nothing(
    fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("util.data.fetch.urlopen", lambda *_, **__: Response(FAULTS[fault]()))
    with pytest.raises(BadInput, match=r"example\.org/mae/weights\.pth"):
        local_file(ADDRESS)
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_a_refused_download_is_asked_for_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.HTTPError(ADDRESS, 404, "Not Found", email.message.Message(), None)

    monkeypatch.setattr("util.data.fetch.urlopen", refuse)
    with pytest.raises(BadInput, match=r"example\.org/mae/weights\.pth: HTTP Error 404: Not Found"):
        local_file(ADDRESS)

    def fetch(_: str, dst: str, **__: Any) -> None:
        Path(dst).write_bytes(b"here")

    monkeypatch.setattr("util.train.checkpoint.download", fetch)
    assert local_file(ADDRESS).read_bytes() == b"here"


# ---- Tasks that share a folder -------------------------------------------------------------------


def save_step(folder: Path, task: str, step: int, epoch: int | None = None, keep: int = 0) -> None:
    model = {"w": torch.full((3,), float(step))}
    save_checkpoint(folder, {"task": task, "step": step, "model": model}, epoch, keep)


def newest_step(folder: Path, task: str) -> int:
    found = newest(folder, task)
    assert found.path is not None and not found.skipped
    state = load_file(found.path)
    assert state["task"] == task and (state["model"]["w"] == state["step"]).all()
    return state["step"]


def group_steps(folder: Path, task: str) -> set[int]:
    states = [load_file(path) for path in folder.glob("*.pth")]
    return {state["step"] for state in states if state["task"] == task}


def test_tasks_in_one_folder_lose_nothing(tmp_path: Path) -> None:
    for epoch in range(3):
        save_step(tmp_path, "pretrain", 10 * (epoch + 1), epoch)
    save_step(tmp_path, "pretrain", 35)  # in the middle of an epoch, then it is stopped
    for epoch in range(2):
        save_step(tmp_path, "finetune", epoch + 1, epoch)
        assert newest_step(tmp_path, "pretrain") == 35
        assert newest_step(tmp_path, "finetune") == epoch + 1
    assert group_steps(tmp_path, "pretrain") == {10, 20, 30, 35}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth", LAST,
        "checkpoint-0-pretrain.pth", "checkpoint-1-pretrain.pth", "checkpoint-last-pretrain.pth",
    }  # fmt: skip

    # Pretraining goes on: now it is the other's turn to make room.
    save_step(tmp_path, "pretrain", 40, 3)
    assert newest_step(tmp_path, "pretrain") == 40
    assert newest_step(tmp_path, "finetune") == 2
    save_step(tmp_path, "finetune", 3)
    assert newest_step(tmp_path, "pretrain") == 40
    assert newest_step(tmp_path, "finetune") == 3
    assert group_steps(tmp_path, "pretrain") == {10, 20, 30, 40}
    assert newest(tmp_path, "segment").path is None


def test_keep_counts_what_was_set_aside(tmp_path: Path) -> None:
    for epoch in range(2):
        save_step(tmp_path, "pretrain", epoch + 1, epoch)
    save_step(tmp_path, "finetune", 1, 0)  # sets checkpoint-0 of pretraining aside
    save_step(tmp_path, "pretrain", 3, 2, keep=2)
    assert group_steps(tmp_path, "pretrain") == {2, 3}
    assert group_steps(tmp_path, "finetune") == {1}


# ---- Files that do not fit -----------------------------------------------------------------------


def finetuned_weights() -> Weights:
    return trained(timm_vit("avg")).state_dict()


def refused(path: Path, *args: Any, head: str = "own", **kwargs: Any) -> str:
    """The message of the error, which names the file."""
    with pytest.raises(BadInput) as caught:
        load_classifier(str(path), *args, head=head, **kwargs)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_another_architecture_than_the_name(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", finetuned_weights(), None)
    message = refused(path, "vit_tiny_patch4")
    for part in ("embed_dim 128", "192", "depth 4", "12", "patch_size (8, 8)", "(4, 4)"):
        assert part in message
    assert "leave --model out" in message
    # The same width and depth: the patch alone differs, for a file of ours also the heads.
    assert "patch_size" in refused(path, "vit_micro_patch4")
    assert "embed_dim" not in refused(path, "vit_micro_patch4")
    arguments = model_arguments("vit_micro_patch8") | {"num_heads": 2, "num_classes": CLASSES}
    path = save_finetuned(tmp_path, VisionTransformer(**arguments), arguments)
    assert "num_heads 2, vit_micro_patch8 has 4" in refused(path, "vit_micro_patch8")
    with pytest.raises(BadInput, match="unknown model 'vit_micro'"):
        load_classifier(str(path), "vit_micro")


def test_no_head_of_its_own(tmp_path: Path) -> None:
    mae, arguments = micro_mae()
    _, encoder = official_mae(decoder=False)
    for path in (
        save_pretrained(tmp_path, mae, arguments),
        save_official(tmp_path / "b.pth", encoder, None),
    ):
        assert "holds no classification head" in refused(path)


def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"

    def message_for(change: Callable[[Weights], object]) -> str:
        weights = finetuned_weights()
        change(weights)
        return refused(save_official(path, weights, None))

    def gap(weights: Weights) -> None:
        for key in [k for k in weights if k.startswith("blocks.1.")]:
            del weights[key]

    message = message_for(lambda w: w.pop("blocks.2.mlp.fc2.bias"))
    assert "missing 1: blocks.2.mlp.fc2.bias" in message and "unexpected" not in message
    assert "missing 1: head.bias" in message_for(lambda w: w.pop("head.bias"))
    assert "missing 1: cls_token" in message_for(lambda w: w.pop("cls_token"))
    message = message_for(gap)  # three blocks, one of them called by a wrong number
    assert "missing 12: blocks.1." in message and "unexpected 12: blocks.3." in message
    message = message_for(lambda w: w.update({"extra_token": torch.zeros(1, 4, 128)}))
    assert "unexpected 1: extra_token" in message
    message = message_for(lambda w: w.update({"reg_token": torch.zeros(1, 4, 128)}))
    assert "has 4 register tokens (reg_token) beside its class token" in message
    message = message_for(lambda w: w.update({"blocks.1.attn.qkv.weight": torch.zeros(9, 128)}))
    assert "blocks.1.attn.qkv.weight (9, 128) where the model has (384, 128)" in message
    message = message_for(lambda w: w.update({"pos_embed": torch.zeros(1, 65, 64)}))
    assert "pos_embed (1, 65, 64) where the model has (1, 65, 128)" in message


@pytest.mark.parametrize("kind", ["ours", "official", "safetensors"])
def test_a_truncated_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(finetuned_weights(), path)
    elif kind == "official":
        save_official(path, finetuned_weights(), namespace("vit_micro_patch8"))
    else:
        arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES}
        save_finetuned(tmp_path, VisionTransformer(**arguments), arguments).rename(path)
    load_classifier(str(path), head="own")
    whole = path.read_bytes()
    # Ours end in a checksum, without which all that torch reads is still there.
    end = len(whole) - (COMMENT if kind == "ours" else 0)
    for length in (end - 1, len(whole) // 2, 100, 0):
        path.write_bytes(whole[:length])
        assert "not readable" in refused(path), length


def test_files_of_no_vision_transformer(tmp_path: Path) -> None:
    path = tmp_path / "e.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(9)}, path)
    assert "conv1.weight, fc.bias" in refused(path)
    torch.save({"model": nn.Linear(2, 3).state_dict(), "epoch": 3}, path)
    assert "holds no encoder in timm's names" in refused(path)
    torch.save({"epoch": 3, "note": "text"}, path)
    assert "holds no weights, only epoch, note" in refused(path)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor, expected a dictionary" in refused(path)
    path.unlink()
    assert "does not exist" in refused(path)


@pytest.mark.parametrize("count", [15, 63, 0])
def test_positions_of_no_square(count: int, tmp_path: Path) -> None:
    weights = finetuned_weights() | {"pos_embed": torch.randn(1, 1 + count, 128)}
    path = save_official(tmp_path / "f.pth", weights, None)
    message = refused(path)
    assert f"positions for {count} patches, which is no square" in message
    assert "--input_size" in message
    assert f"{count} patches" in refused(path, img_size=(64, 64))  # a size of other positions


def test_non_square_positions_are_those_of_the_given_size(tmp_path: Path) -> None:
    theirs = trained(timm_vit("avg", img_size=(24, 40)))
    path = save_official(tmp_path / "g.pth", theirs.state_dict(), None)
    ours, arguments, _ = load_classifier(str(path), head="own", img_size=(24, 40))
    assert arguments["img_size"] == [24, 40] and ours.grid == (3, 5)
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    assert_same_logits(ours, theirs)
