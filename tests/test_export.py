"""Weights to timm, transformers, mmsegmentation, the official layout and ONNX, and back.

Expected outputs are those of the model before it was saved, never those of the exporter. Tolerances
are relative to the largest number of an output, in float32, as in the issue.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from test_classifier import (
    CLASSES,
    LETTERS,
    all_tokens,
    images_for,
    micro_mae,
    save_finetuned,
    save_pretrained,
    timm_vit,
    trained,
)
from torch import Tensor, nn

import util.train.checkpoint
from models_mmae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from models_zoo import (
    create_model,
    load_classifier,
    load_encoder,
    load_pretrained,
    model_arguments,
)
from util.errors import BadInput
from util.train.checkpoint import load_file, write_signed
from util.weights import export_model
from util.weights.export import appearing, fold_lscale, fold_probe

Export = Callable[..., tuple[int, str, str]]

MMMAE = {"lscale_init": 0.1, "pos_offset": "learned"}
SUFFIX = {"timm": ".safetensors", "transformers": "", "onnx": ".onnx"}


@pytest.fixture
def export(run_main: Any) -> Export:
    """``export(checkpoint, to, output, *flags) -> (exit_code, stdout, stderr)``."""

    def run(checkpoint: Path, to: str, output: Path, *flags: str) -> tuple[int, str, str]:
        given = ["--checkpoint", str(checkpoint), "--to", to, "--output", str(output)]
        return run_main("main_export", [*given, *flags])

    return run


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    assert expected.ndim == 0 or expected.std() > 0.01, "outputs that are all alike show nothing"
    return float((found - expected).abs().max() / expected.abs().max())


def classifier(folder: Path, **settings: Any) -> tuple[VisionTransformer, Path]:
    """A micro classifier as if trained, and its checkpoint."""
    arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES} | settings
    torch.manual_seed(0)
    model = trained(VisionTransformer(**arguments))
    folder.mkdir(exist_ok=True)
    return model, save_finetuned(folder, model, arguments)


def autoencoder(folder: Path, **settings: Any) -> tuple[MaskedAutoencoderViT, Path]:
    """A micro masked autoencoder as if trained, and its checkpoint."""
    model, arguments = micro_mae(**settings)
    folder.mkdir(exist_ok=True)
    return model, save_pretrained(folder, model, arguments)


def masked(model: MaskedAutoencoderViT) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise as transformers takes it, and the mask that it makes of it."""
    L = model.grid[0] * model.grid[1]
    noise = torch.rand(2, L, generator=torch.Generator().manual_seed(3))
    mask = noise.argsort(dim=1).argsort(dim=1) >= int(L * 0.25)
    return images_for(model), noise, mask


@torch.inference_mode()
def same_autoencoder(found: Any, expected: MaskedAutoencoderViT, bound: float) -> None:
    images, _, mask = masked(expected)
    ours, theirs = expected(images, mask), found.eval()(images, mask)
    assert worst(theirs["pred"], ours["pred"]) <= bound
    assert worst(theirs["loss"], ours["loss"]) <= bound


def printed_call(out: str) -> Any:
    """What the last printed line, a Python expression, gives."""
    known = {"timm": timm, "torch": torch, "functools": functools, "transformers": transformers}
    return eval(out.strip().splitlines()[-1], known).eval()


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- timm ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_base_of_m_mae_to_timm(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    for initialise in ("kaiming_uniform_", "xavier_uniform_"):  # slow, and all is set afterwards
        monkeypatch.setattr(nn.init, initialise, lambda tensor, *_, **__: tensor)
    arguments = model_arguments("mae_vit_base_patch16") | MMMAE | {"decoder_depth": 1}
    torch.manual_seed(0)
    mae = trained(MaskedAutoencoderViT(**arguments))
    checkpoint = save_pretrained(tmp_path, mae, arguments)
    code, out, err = export(checkpoint, "timm", tmp_path / "vit.pth")
    assert code == 0, err
    assert "create_model('vit_base_patch16_224', num_classes=0, img_size=(224, 224)" in out
    for lost in ("decoder", "phases", "LScale", "optimiser"):
        assert lost in out
    theirs = printed_call(out)
    shutil.rmtree(tmp_path)  # 800 MB, which pytest would keep
    assert type(theirs).__module__.startswith("timm.") and isinstance(
        theirs.blocks[0].ls1, nn.Identity
    )
    images = images_for(mae, 1)
    assert worst(theirs.forward_features(images), all_tokens(mae, images)) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"global_pool": "avg", "lscale_init": 0.1, "img_size": (64, 48)}, 1e-5),
        ({"global_pool": "cls", "lscale_init": 0.1, "in_chans": 1}, 1e-5),
        ({"global_pool": "avg", "mlp_ratio": 2.5, "patch_size": (16, 8)}, 1e-5),
        ({"global_pool": "cls", "probe": True, "lscale_init": 0.1}, 1e-4),
    ],
)
def test_classifiers_to_timm(
    settings: dict[str, Any], bound: float, suffix: str, tmp_path: Path, export: Export
) -> None:
    ours, checkpoint = classifier(tmp_path, **settings)
    code, out, err = export(checkpoint, "timm", tmp_path / f"vit{suffix}")
    assert code == 0, err
    assert ("BatchNorm is folded" in out) == ("probe" in settings)
    theirs = printed_call(out)
    assert not any("ls1" in k or "head.0" in k for k in theirs.state_dict())
    images = images_for(ours, 3)
    assert worst(theirs(images), ours(images)) <= bound


@torch.inference_mode()
def test_timm_can_keep_lscale(tmp_path: Path, export: Export) -> None:
    ours, checkpoint = classifier(tmp_path, lscale_init=0.1)
    _, out, _ = export(checkpoint, "timm", tmp_path / "vit.pth", "--keep_lscale")
    theirs = printed_call(out)
    weights = theirs.state_dict()
    assert weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in ours.state_dict().items())


@torch.inference_mode()
def test_averaged_weights(tmp_path: Path, export: Export) -> None:
    arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES}
    one, two = (trained(VisionTransformer(**arguments), seed) for seed in (0, 1))
    path = save_finetuned(tmp_path, one, arguments)
    write_signed(tmp_path / "both.pth", load_file(path) | {"ema": two.state_dict()})
    for flags, expected in (([], one), (["--ema"], two)):
        code, out, err = export(tmp_path / "both.pth", "timm", tmp_path / "vit.pth", *flags)
        assert code == 0 and "weights are left out" in out, err
        assert worst(printed_call(out)(images_for(one)), expected(images_for(one))) <= 1e-5
    code, _, err = export(path, "timm", tmp_path / "other.pth", "--ema")
    assert code == 2 and "no averaged weights" in err


# ---- transformers --------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("terms", [{}, MMMAE | {"norm_pix_loss": True, "in_chans": 1}])
def test_pretraining_to_transformers(terms: dict[str, Any], tmp_path: Path, export: Export) -> None:
    ours, checkpoint = autoencoder(tmp_path, **terms)
    code, out, err = export(checkpoint, "transformers", tmp_path / "folder")
    assert code == 0, err
    theirs = printed_call(out)
    assert isinstance(theirs, transformers.ViTMAEForPreTraining)
    images, noise, mask = masked(ours)
    found, expected = theirs(images, noise=noise), ours(images, mask)
    assert torch.equal(found.mask.bool(), mask)
    assert worst(found.loss, expected["loss"]) <= 1e-4
    assert worst(found.logits[mask].view_as(expected["pred"]), expected["pred"]) <= 1e-4


@torch.inference_mode()
def test_classifier_to_transformers(tmp_path: Path, export: Export) -> None:
    ours, checkpoint = classifier(
        tmp_path, global_pool="cls", lscale_init=0.1, probe=True, img_size=(64, 48)
    )
    code, out, err = export(checkpoint, "transformers", tmp_path / "folder")
    assert code == 0, err
    theirs = printed_call(out)
    assert isinstance(theirs, transformers.ViTForImageClassification)
    assert theirs.config.id2label == dict(enumerate(LETTERS))
    images = images_for(ours)
    assert worst(theirs(images).logits, ours(images)) <= 1e-4
    again, _, state = load_classifier(str(tmp_path / "folder"), head="own")
    assert state["classes"] == LETTERS
    assert worst(again.eval()(images), ours(images)) <= 1e-4


def test_what_transformers_cannot_hold(tmp_path: Path, export: Export) -> None:
    _, avg = classifier(tmp_path / "avg", global_pool="avg")
    _, wide = autoencoder(tmp_path / "wide", img_size=(64, 48))
    _, mae = autoencoder(tmp_path / "mae")
    for checkpoint, flags, reason in (
        (avg, [], "mean of the patches"),
        (wide, [], r"square images.*(64, 48)"),
        (mae, ["--part", "encoder"], "an encoder alone"),
    ):
        code, _, err = export(checkpoint, "transformers", tmp_path / "folder", *flags)
        assert code == 2 and reason.split(".*")[-1] in err and "--to timm" in err
        assert not (tmp_path / "folder").exists()


def test_a_cross_decoder_stays_with_us(tmp_path: Path, export: Export) -> None:
    ours, checkpoint = autoencoder(tmp_path, decoder="cross", predict_ratio=0.5)
    for to in ("official", "transformers"):
        code, _, err = export(checkpoint, to, tmp_path / f"there{SUFFIX.get(to, '.pth')}")
        assert code == 2 and "CrossMAE" in err and "--to timm" in err
    code, _, err = export(checkpoint, "mmae", tmp_path / "ours.pth")
    assert code == 0, err
    again, _ = load_pretrained(str(tmp_path / "ours.pth"))
    assert (again.decoder, again.predict_ratio) == ("cross", 0.5)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    assert export(checkpoint, "official", tmp_path / "vit.pth", "--part", "encoder")[0] == 0


# ---- ONNX ----------------------------------------------------------------------------------------


def run_session(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a) for a in session.run(None, {"images": images.numpy()})]


@torch.inference_mode()
def test_onnx_takes_any_batch(tmp_path: Path, export: Export) -> None:
    ours, checkpoint = classifier(tmp_path, global_pool="avg", probe=True, lscale_init=0.1)
    path = tmp_path / "vit.onnx"
    code, _, err = export(checkpoint, "onnx", path)
    assert code == 0, err
    for B in (1, 2, 7):
        images = images_for(ours, B)
        assert worst(run_session(path, images)[0], ours(images)) <= 1e-4
    again, arguments, state = load_classifier(str(path), head="own")
    assert arguments["probe"] and state["classes"] == LETTERS
    assert all(
        torch.equal(v, ours.state_dict()[k])
        for k, v in again.state_dict().items()
        if "num_batches" not in k
    )


@torch.inference_mode()
def test_onnx_of_an_encoder_and_back(tmp_path: Path, export: Export) -> None:
    mae, checkpoint = autoencoder(tmp_path, img_size=(64, 48), **MMMAE)
    path = tmp_path / "vit.onnx"
    assert export(checkpoint, "onnx", path)[0] == 0
    images = images_for(mae, 3)
    expected = all_tokens(mae, images)
    features, tokens = run_session(path, images)
    assert worst(tokens, expected) <= 1e-4 and worst(features, expected[:, 0]) <= 1e-4
    code, out, err = export(path, "mmae", tmp_path / "back.pth")
    assert code == 0 and "read      features, tokens" in out, err
    back, _ = load_encoder(str(tmp_path / "back.pth"))
    assert worst(back.eval().forward_features(images), expected) <= 1e-5


# ---- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["official", "transformers", "mmae"])
def test_a_plain_autoencoder_comes_back_bit_for_bit(
    to: str, tmp_path: Path, export: Export
) -> None:
    ours, checkpoint = autoencoder(tmp_path, norm_pix_loss=True)
    there, back = tmp_path / f"there{SUFFIX.get(to, '.pth')}", tmp_path / "back.pth"
    code, _, err = export(checkpoint, to, there)
    assert code == 0, err
    if to == "official":
        assert load_file(there)["model"].keys() == ours.state_dict().keys()
    assert export(there, "mmae", back)[0] == 0
    again, _ = load_pretrained(str(back))
    weights, before = again.state_dict(), ours.state_dict()
    assert again.norm_pix_loss and weights.keys() == before.keys()
    assert all(torch.equal(weights[k], before[k]) for k in before)


@pytest.mark.parametrize("to", ["official", "transformers", "mmae"])
def test_m_mae_comes_back_as_the_same_function(to: str, tmp_path: Path, export: Export) -> None:
    ours, checkpoint = autoencoder(tmp_path, **MMMAE)
    there, back = tmp_path / f"there{SUFFIX.get(to, '.pth')}", tmp_path / "back.pth"
    _, out, err = export(checkpoint, to, there)
    assert ("phases are baked" in out) == ("LScale is folded" in out) == (to != "mmae"), err
    assert export(there, "mmae", back)[0] == 0
    same_autoencoder(load_pretrained(str(back))[0], ours, 1e-5)
    encoder, _ = load_encoder(str(back))  # the baked positions are not made again by the formula
    images = images_for(ours)
    with torch.inference_mode():
        expected = all_tokens(ours, images)
        assert worst(encoder.eval().forward_features(images), expected) <= 1e-5


ROUNDS = [
    ("timm", {"global_pool": "avg"}),
    ("timm", {"global_pool": "cls", "lscale_init": 0.1}),
    ("official", {"global_pool": "avg"}),
    ("official", {"global_pool": "cls", "probe": True}),
    ("transformers", {"global_pool": "cls"}),
    ("mmae", {"global_pool": "avg", "probe": True, "lscale_init": 0.1, "img_size": (64, 48)}),
]


@pytest.mark.parametrize(("to", "settings"), ROUNDS)
def test_classifiers_come_back_bit_for_bit(
    to: str, settings: dict[str, Any], tmp_path: Path, export: Export
) -> None:
    ours, checkpoint = classifier(tmp_path, **settings)
    there, back = tmp_path / f"there{SUFFIX.get(to, '.pth')}", tmp_path / "back.pth"
    keep = ["--keep_lscale"] if to == "timm" and "lscale_init" in settings else []
    code, out, err = export(checkpoint, to, there, *keep)
    assert code == 0 and "folded" not in out, err
    if to == "official" and "probe" not in settings:  # its fine-tuned models are timm's
        timm_vit(settings["global_pool"]).load_state_dict(load_file(there)["model"], strict=True)
    assert export(there, "mmae", back)[0] == 0
    again, _, _ = load_classifier(str(back), head="own")
    weights, before = again.state_dict(), ours.state_dict()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[k], before[k]) for k in before)


# ---- mmsegmentation ------------------------------------------------------------------------------


class MMSegLayer(nn.Module):
    """One layer of mmsegmentation's MAE backbone, by the names that it has there."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Module()
        first = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.ffn.layers = nn.Sequential(first, nn.Linear(4 * dim, dim))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.attn.qkv(self.ln1(x)).reshape(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + self.gamma_1 * self.attn.proj(mixed)
        return x + self.gamma_2 * self.ffn.layers(self.ln2(x))


class MMSegBackbone(nn.Module):
    """Tokens after the last layer, and no final norm."""

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4, patches: int = 64) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.layers = nn.ModuleList(MMSegLayer(dim, heads) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.projection(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return x


def segmentor(backbone: MMSegBackbone, bias: float = 0.0) -> dict[str, Any]:
    """A checkpoint of mmsegmentation, with relative position biases and heads."""
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    for i in range(len(backbone.layers)):
        attention = f"backbone.layers.{i}.attn.relative_position"
        weights[f"{attention}_bias_table"] = torch.full((15 * 15 + 3, 4), bias)
        weights[f"{attention}_index"] = torch.zeros(65, 65, dtype=torch.int64)
    weights["decode_head.conv_seg.weight"] = torch.randn(150, 8, 1, 1)
    weights["auxiliary_head.conv_seg.bias"] = torch.randn(150)
    return {"meta": {"iter": 160000}, "state_dict": weights}


def last_block(model: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens before any final norm."""
    tokens: list[Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda _m, _i, out: tokens.append(out))
    model.eval()(images)
    hook.remove()
    return tokens[0]


@torch.inference_mode()
def test_a_segmentors_backbone_loads_without_flags(tmp_path: Path, export: Export) -> None:
    torch.manual_seed(0)
    theirs = trained(MMSegBackbone())
    path = tmp_path / "iter_160000.pth"
    torch.save(segmentor(theirs), path)
    ours, _ = load_encoder(str(path))
    images = images_for(ours)
    assert worst(last_block(ours, images), theirs(images)) <= 1e-5
    code, out, err = export(path, "mmseg", tmp_path / "again.pth")
    assert code == 0 and "segmentor's heads" in out and "no final norm" in out, err
    again = load_file(tmp_path / "again.pth")["state_dict"]
    assert all(torch.equal(again[k], v) for k, v in theirs.state_dict().items())
    # Made by beit2mmseg.py a file has the patch embedding twice, under both names.
    plain = dict(theirs.state_dict())
    plain |= {
        f"patch_embed.proj.{k}": plain[f"patch_embed.projection.{k}"] for k in ("weight", "bias")
    }
    torch.save(plain, path)
    assert worst(last_block(load_encoder(str(path))[0], images), theirs(images)) <= 1e-5

    torch.save(segmentor(theirs, bias=0.5), path)
    with pytest.raises(BadInput, match="relative position biases"):
        load_encoder(str(path))


@torch.inference_mode()
def test_to_mmsegmentation_and_back(tmp_path: Path, export: Export) -> None:
    mae, checkpoint = autoencoder(tmp_path, lscale_init=0.1)
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    code, out, err = export(checkpoint, "mmseg", there)
    assert code == 0 and "folded" not in out and "type='MAE', img_size=(64, 64)" in out, err
    weights = load_file(there)["state_dict"]
    theirs = MMSegBackbone()
    loading = theirs.load_state_dict(weights, strict=False)
    assert not loading.missing_keys
    assert loading.unexpected_keys == ["ln1.weight", "ln1.bias"]  # of a backbone with final_norm
    images = images_for(mae)
    norm = functools.partial(F.layer_norm, normalized_shape=(128,), eps=1e-6)
    normed = norm(theirs(images), weight=weights["ln1.weight"], bias=weights["ln1.bias"])
    assert worst(normed, all_tokens(mae, images)) <= 1e-5
    assert export(there, "mmae", back)[0] == 0
    again, before = load_encoder(str(back))[0].state_dict(), mae.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in again.items())


# ---- Files of others -----------------------------------------------------------------------------

SHAPE = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 192,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def theirs_of(kind: str) -> Any:
    """A model of transformers with random weights, epsilon 1e-12 as its config has it."""
    torch.manual_seed(0)
    mae = kind.startswith("ViTMAE")
    config = transformers.ViTMAEConfig if mae else transformers.ViTConfig
    more = DECODER | {"norm_pix_loss": True} if mae else {"num_labels": 7}
    return trained(getattr(transformers, kind)(config(**SHAPE, **more)))


@torch.inference_mode()
@pytest.mark.parametrize("names", ["file", "memory"])
@pytest.mark.parametrize(
    "kind", ["ViTMAEForPreTraining", "ViTForImageClassification", "ViTModel", "ViTMAEModel"]
)
def test_folders_of_transformers_load_without_flags(
    kind: str, names: str, tmp_path: Path, export: Export
) -> None:
    theirs, folder = theirs_of(kind), tmp_path / "theirs"
    theirs.save_pretrained(folder)
    if names == "memory":
        save_file(theirs.state_dict(), folder / "model.safetensors")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    L = 64
    if kind == "ViTMAEForPreTraining":
        ours, _ = load_pretrained(str(folder))
        noise = torch.rand(2, L, generator=torch.Generator().manual_seed(2))
        expected = theirs(images, noise=noise)
        mask = expected.mask.bool()
        found = ours.eval()(images, mask)
        assert worst(found["loss"], expected.loss) <= 1e-4
        assert worst(found["pred"], expected.logits[mask].view_as(found["pred"])) <= 1e-4
    elif kind == "ViTForImageClassification":
        # The weights in the folder are as good as the folder.
        for path in (folder, folder / "model.safetensors"):
            ours, _, _ = load_classifier(str(path), head="own")
            assert worst(ours.eval()(images), theirs(images).logits) <= 1e-4
    base = getattr(theirs, "vit", theirs)
    more = {}
    if "MAE" in kind:
        theirs.config.mask_ratio = base.config.mask_ratio = 0.0
        more["noise"] = torch.arange(L).float().expand(2, -1)
    expected = base(images, **more).last_hidden_state
    encoder, _ = load_encoder(str(folder))
    assert encoder.blocks[0].attn.num_heads == 6
    assert worst(encoder.eval().forward_features(images), expected) <= 1e-4
    # Into a file of ours, with their epsilon, and to timm, whose call gives it.
    code, out, err = export(folder, "mmae", tmp_path / "ours.pth")
    assert code == 0 and "read      " in out, err
    encoder, _ = load_encoder(str(tmp_path / "ours.pth"))
    assert worst(encoder.eval().forward_features(images), expected) <= 1e-4
    code, out, err = export(folder, "timm", tmp_path / "vit.pth", "--part", "encoder")
    assert code == 0 and "eps=1e-12" in out, err
    assert worst(printed_call(out).forward_features(images), expected) <= 1e-4


def test_an_official_file_needs_no_name(tmp_path: Path) -> None:
    mae, _ = micro_mae()
    torch.save({"model": mae.state_dict()}, tmp_path / "mae_pretrain_vit_micro.pth")
    found, _ = load_pretrained(str(tmp_path / "mae_pretrain_vit_micro.pth"))
    same_autoencoder(found, mae, 0.0)


# ---- What does not fit ---------------------------------------------------------------------------


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """A folder of transformers whose tensors were changed."""
    theirs_of("ViTForImageClassification").save_pretrained(folder)
    weights = load_safetensors(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


def lose_a_query(weights: dict[str, Tensor]) -> None:
    del weights[QUERY]


def lose_the_last_layer(weights: dict[str, Tensor]) -> None:
    for key in [k for k in weights if ".layer.2." in k]:
        del weights[key]


def mix_in_timm(weights: dict[str, Tensor]) -> None:
    weights["blocks.7.mlp.fc1.weight"] = torch.zeros(192, 96)


def mix_in_another_value(weights: dict[str, Tensor]) -> None:
    weights["norm.weight"] = torch.zeros(96)


def other_shape(weights: dict[str, Tensor]) -> None:
    weights["vit.encoder.layer.0.output.dense.weight"] = torch.zeros(96, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lose_a_query,
            r"missing 1: blocks\.1\.attn\.qkv\.weight; unexpected 2.*\.1\..*key\.weight",
        ),
        (lose_the_last_layer, r"missing 12: blocks\.2\.norm1\.weight"),
        (mix_in_timm, r"unexpected 1: blocks\.7\.mlp\.fc1\.weight"),
        (mix_in_another_value, r"two different tensors for norm\.weight"),
        (other_shape, r"blocks\.0\.mlp\.fc2\.weight \(96, 100\) where the model has \(96, 192\)"),
    ],
)
def test_mixed_up_files_of_transformers(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        load_classifier(spoil(tmp_path / "folder", change), head="own")


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    theirs_of("ViTForImageClassification").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("patch_size", 16, "does not fit the weights beside it"),
        ("hidden_act", "relu", "hidden_act relu"),
        ("model_type", "bert", "is a bert of transformers"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BadInput, match=message):
            load_classifier(str(folder), head="own")
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(BadInput, match=r"model\.safetensors is not readable"):
        load_classifier(str(folder), head="own")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_classifier(str(folder), head="own")
    with pytest.raises(BadInput, match="holds no weights of transformers"):
        load_classifier(str(tmp_path), head="own")


def test_large_folders_come_in_parts(tmp_path: Path) -> None:
    theirs = theirs_of("ViTForImageClassification")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    ours, _, _ = load_classifier(str(tmp_path / "parts"), head="own")
    images = images_for(ours)
    with torch.inference_mode():
        assert worst(ours.eval()(images), theirs(images).logits) <= 1e-4
    next((tmp_path / "parts").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(BadInput, match="does not exist"):
        load_classifier(str(tmp_path / "parts"), head="own")


def test_mixed_up_file_of_mmsegmentation(tmp_path: Path) -> None:
    state = segmentor(MMSegBackbone())
    weights = state["state_dict"]
    del weights["backbone.layers.2.ffn.layers.1.bias"]
    weights["backbone.layers.2.mlp.fc2.bias"] = torch.zeros(128)
    torch.save(state, tmp_path / "a.pth")
    found = r"missing 1: blocks\.2\.mlp\.fc2\.bias; unexpected 1: layers\.2\.mlp\.fc2\.bias"
    with pytest.raises(BadInput, match=found):
        load_encoder(str(tmp_path / "a.pth"))


def test_the_folder_of_a_new_file_is_made_or_refused(tmp_path: Path) -> None:
    with appearing(tmp_path / "new/folder/a.pth") as temporary:
        temporary.write_text("weights")
    assert (tmp_path / "new/folder/a.pth").read_text() == "weights"
    with (
        pytest.raises(BadInput, match=r"cannot write to folder .*a\.pth: "),
        appearing(tmp_path / "new/folder/a.pth/b.pth"),
    ):
        raise AssertionError("refused before it is computed")


def test_only_scales_of_branches_are_folded() -> None:
    """A norm that calls its weight gamma is no LScale."""
    weights = {"norm.gamma": torch.ones(3), "blocks.0.ls1.gamma": torch.full((3,), 2.0)}
    weights |= {f"blocks.0.attn.proj.{kind}": torch.ones(3) for kind in ("weight", "bias")}
    weights["blocks.0.attn.proj.weight"] = torch.ones(3, 3)
    folded = fold_lscale(weights)
    assert folded.keys() == weights.keys() - {"blocks.0.ls1.gamma"}
    assert (folded["norm.gamma"] == 1).all() and (folded["blocks.0.attn.proj.bias"] == 2).all()


@pytest.mark.parametrize("to", ["timm", "official", "transformers"])
def test_a_file_that_differs_is_not_written(
    to: str, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = classifier(tmp_path, global_pool="cls", lscale_init=0.1)

    def wrong(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        folded = fold_lscale(weights)
        folded["blocks.3.mlp.fc2.bias"] = weights["blocks.3.mlp.fc2.bias"]
        return folded

    monkeypatch.setattr(export_model, "fold_lscale", wrong)
    before = left(tmp_path)
    code, _, err = export(checkpoint, to, tmp_path / f"new{SUFFIX.get(to, '.pth')}")
    assert code == 2 and "not written" in err and "other logits" in err
    assert left(tmp_path) == before


def test_what_was_there_stays(tmp_path: Path, export: Export) -> None:
    model, checkpoint = classifier(tmp_path, global_pool="cls")
    state = load_file(checkpoint)
    state["model"]["blocks.0.norm1.weight"][0] = float("nan")
    write_signed(tmp_path / "nan.pth", state)
    (tmp_path / "vit.pth").write_text("mine")
    for to in ("timm", "official", "mmseg", "mmae"):
        code, _, err = export(tmp_path / "nan.pth", to, tmp_path / "vit.pth")
        assert code == 2 and "not written" in err
    assert (tmp_path / "vit.pth").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    code, _, err = export(checkpoint, "transformers", tmp_path / "folder")
    assert code == 2 and "exists already" in err and not left(tmp_path / "folder")
    code, _, err = export(checkpoint, "timm", checkpoint)
    assert code == 2 and "is the --checkpoint itself" in err
    assert torch.equal(load_file(checkpoint)["model"]["pos_embed"], model.pos_embed)


def test_a_run_keeps_its_checkpoints(tmp_path: Path, export: Export) -> None:
    """Also where the run folder stands for the last of them."""
    _, checkpoint = classifier(tmp_path, global_pool="cls")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last", "best"):
        shutil.copy(checkpoint, run / f"checkpoint-{name}.pth")
    for source, target, said in (
        (run, "last", "is the --checkpoint itself"), (run, "best", "is a checkpoint of a run"),
    ):  # fmt: skip
        path = run / f"checkpoint-{target}.pth"
        before = path.read_bytes()
        code, _, err = export(source, "timm", path)
        assert code == 2 and said in err and path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "timm", "--output", "a.onnx"], "must end in .pth or .safetensors"),
        (["--to", "onnx", "--output", "a.onnx", "--keep_lscale"], "--keep_lscale is for timm"),
        (["--to", "timm", "--output", "a.pth", "--part", "decoder"], "takes no decoder"),
        (["--to", "mmseg", "--output", "a.pth", "--part", "head"], "takes no head"),
        (["--to", "timm"], "--output is missing"),
        (["--to", "timm", "--output", "."], "no name of a file"),
        (["--to", "timm", "--output", "/"], "no name of a file"),
        (["--output", "a.pth"], "--to is missing"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], message: str, tmp_path: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, checkpoint = autoencoder(tmp_path)
    code, _, err = run_main("main_export", ["--checkpoint", str(checkpoint), *flags])
    assert code == 2 and message in err


# ---- Folding, and weights from Python ------------------------------------------------------------


def test_folding_is_exact_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        arguments = model_arguments("vit_micro_patch8") | {"num_classes": CLASSES, "probe": True}
        ours = trained(VisionTransformer(**arguments, lscale_init=0.1))
        plain = VisionTransformer(**(arguments | {"probe": False})).eval()
        weights = fold_probe(fold_lscale(ours.state_dict()), ours.head[0].eps)
        plain.load_state_dict(weights, strict=True)
        with torch.inference_mode():
            assert worst(plain(images_for(ours)), ours(images_for(ours))) <= 1e-12
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
def test_weights_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, checkpoint = classifier(tmp_path / "vit", global_pool="avg", lscale_init=0.1)
    images = images_for(ours)
    name, path = "vit_micro_patch8", str(checkpoint)
    assert torch.equal(create_model(name, pretrained=path).eval()(images), ours(images))
    assert create_model(name, pretrained=path, num_classes=0).eval()(images).shape == (2, 128)
    fresh = create_model(name, pretrained=path, num_classes=3)
    assert fresh.eval()(images).shape == (2, 3)
    larger = create_model(name, pretrained=path, img_size=128)
    assert larger.eval()(torch.randn(1, 3, 128, 128)).shape == (1, CLASSES)
    with pytest.raises(BadInput, match="lscale_init come with the weights"):
        create_model(name, pretrained=path, lscale_init=None)
    with pytest.raises(BadInput, match="a different architecture"):
        create_model("vit_tiny_patch8", pretrained=path)

    mae, checkpoint = autoencoder(tmp_path / "mae", **MMMAE)
    name = "mae_vit_micro_patch8"
    same_autoencoder(create_model(name, pretrained=str(checkpoint)), mae, 0.0)
    encoder = create_model("vit_micro_patch8", pretrained=str(checkpoint))
    assert encoder.num_classes == 0
    assert worst(encoder.eval().forward_features(images), all_tokens(mae, images)) <= 1e-5
    with pytest.raises(BadInput, match=r"pos_offset of .* is learned, not none"):
        create_model(name, pretrained=str(checkpoint), pos_offset="none")

    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        util.train.checkpoint, "download", lambda address, to: shutil.copyfile(checkpoint, to)
    )
    address = "https://example.org/mae/weights.pth"
    same_autoencoder(create_model(name, pretrained=address), mae, 0.0)
