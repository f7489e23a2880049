"""Pixio's pieces: cells, class tokens, learned positions, drop path; against MAE, against
transformers, and against plain torch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from registries import registered_apart
from tiny import batch, small
from torch import Tensor, nn

import models_zoo
from engine_pretrain import build_masker
from models_mmae import MaskedAutoencoderViT
from models_pixio import Pixio
from models_upernet import UperNet
from models_vit import VisionTransformer
from util.errors import BadInput
from util.mask.patches import patchify
from util.mask.strategies import STANDARD
from util.train.checkpoint import load_file, write_signed

SEVERAL = {"cls_tokens": 3, "positions": "learned"}
PIXIO = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 3, "decoder_num_heads": 2, "cls_tokens": 8,
    "positions": "learned",
}  # fmt: skip


def pixio(**arguments: Any) -> Pixio:
    """A small Pixio that looks trained: no two of its parameters are alike."""
    torch.manual_seed(0)
    model = Pixio(**(PIXIO | arguments))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


# ---- It is MAE with three changes --------------------------------------------------------------


def test_with_maes_values_it_is_mae() -> None:
    """One class token, the frozen code, MAE's decoder: the same weights, and the same loss."""
    name, values = "pixio_vit_micro_patch4", {"cls_tokens": 1, "positions": "sincos"}
    torch.manual_seed(0)
    ours = models_zoo.create_model(name, decoder_depth=2, **values)
    torch.manual_seed(0)
    mae = models_zoo.create_model("mae_vit_micro_patch4")
    states = ours.state_dict(), mae.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    images, mask = batch(mae, visible=16)
    first, second = ours(images, mask), mae(images, mask)
    assert torch.equal(first["loss"], second["loss"]) and torch.equal(first["pred"], second["pred"])


def by_definition(
    model: MaskedAutoencoderViT, images: Tensor, mask: Tensor, kept: Tensor
) -> Tensor:
    """The loss image by image, every token at its place, each branch dropped by hand."""
    n, losses = model.cls_tokens, []
    depth = len(model.blocks)
    for image, hidden, drawn in zip(images, mask, kept, strict=True):
        x = model.patch_embed.proj(image[None]).flatten(2)[0].T + model.pos_embed[0, n:]
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :n], x[~hidden]])[None]
        for i, block in enumerate(model.blocks):
            rate = model.drop_path * i / (depth - 1)
            keep = [(1 / (1 - rate) if u >= rate - 0.5 else 0.0) for u in drawn[i].tolist()]
            x = x + keep[0] * block.ls1(block.attn(block.norm1(x)))
            x = x + keep[1] * block.ls2(block.mlp(block.norm2(x)))
        x = model.decoder_embed(model.norm(x))[0]
        places = model.mask_token[0].expand(len(hidden), -1).clone()
        places[~hidden] = x[n:]
        x = (torch.cat([x[:n], places]) + model.decoder_pos_embed[0])[None]
        for block in model.decoder_blocks:
            x = x + block.ls1(nn.Module.__call__(block.attn, block.norm1(x)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        pred = model.decoder_pred(model.decoder_norm(x))[0, n:]
        target = patchify(image[None], model.patch_size)[0]
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        losses.append(((pred - (target - mean) / (var + 1e-6).sqrt()) ** 2).mean(-1)[hidden].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lscale_init", [None, 0.3])
def test_loss_and_gradients_by_definition(lscale_init: float | None) -> None:
    model = pixio(norm_pix_loss=True, drop_path=0.5, lscale_init=lscale_init).double()
    images, mask = batch(model, B=4, visible=16)
    kept = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(3)).double() - 0.5
    assert (kept[:, 2] < 0).any() and (kept[:, 2] >= 0).any()
    found = {}
    for name, loss in (
        ("ours", model(images, mask, kept=kept)["loss"]),
        ("plain", by_definition(model, images, mask, kept)),
    ):
        model.zero_grad()
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters()}
        found[name] = loss.item(), grads
    assert found["ours"][0] == pytest.approx(found["plain"][0], abs=1e-12)
    for key, grad in found["plain"][1].items():
        assert grad.abs().max() > 0, key
        assert (found["ours"][1][key] - grad).abs().max() < 1e-9, key


def test_every_class_token_and_position_learns() -> None:
    model = pixio()
    images, mask = batch(model, B=40, visible=16)  # each patch is visible in some
    model(images, mask)["loss"].backward()
    for table in (model.cls_token, model.pos_embed, model.decoder_pos_embed):
        assert (table.grad[0].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize(
    "pieces",
    [
        {"decoder": "cross", "predict_ratio": 0.5}, {"decoder": "partial", "predict_ratio": 0.5},
        {"encoder_mask_tokens": True},
        {"lscale_init": 0.1}, {"drop_path": 0.2}, {"pca_components": 2},
        {"pos_offset": "learned", "positions": "sincos"},
        {"pos_offset": "jitter", "positions": "sincos"},
    ],
)  # fmt: skip
def test_pieces_combine(pieces: dict[str, Any]) -> None:
    """Class tokens and positions with the decoders, targets and terms; on a grid of 2 x 3."""
    model = small(**(SEVERAL | pieces))
    images, mask = batch(model)
    assert torch.isfinite(model(images, mask)["pred"]).all()
    drawn = {name: torch.rand(3, *shape) - 0.5 for name, shape in model.draws.items()}
    out = model(images, mask, **drawn)
    assert out["pred"].shape[1] == model.num_predicted(2)
    out["pred"].square().mean().backward()
    assert (model.cls_token.grad[0].abs().amax(dim=-1) > 0).all()


def test_how_it_starts() -> None:
    """Tables of deviation .02, cut far out; class tokens likewise; all else as MAE's."""
    torch.manual_seed(0)
    model = models_zoo.create_model("pixio_vit_base_patch16", decoder_depth=1, depth=1)
    for table in (model.pos_embed, model.decoder_pos_embed, model.cls_token, model.mask_token):
        assert table.requires_grad
        error = 4 * 0.02 / (2 * table.numel()) ** 0.5  # four deviations of the estimate
        assert table.std().item() == pytest.approx(0.02, abs=error)
        assert abs(table.mean().item()) < 4 * 0.02 / table.numel() ** 0.5
    assert model.cls_token.shape == (1, 8, 768) and model.pos_embed.shape == (1, 8 + 256, 768)
    assert model.decoder_pos_embed.shape == (1, 8 + 256, 512)


# ---- Names and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cell", "grid", "width", "depth", "heads", "decoder"),
    [
        ("pixio_vit_base_patch16", 4, 16, 768, 12, 12, 32),
        ("pixio_vit_large_patch16", 4, 16, 1024, 24, 16, 32),
        ("pixio_vit_huge_patch16", 4, 16, 1280, 32, 16, 32),
        ("pixio_vit_1b_patch16", 4, 16, 1536, 48, 24, 32),
        ("pixio_vit_micro_patch4", 2, 8, 128, 4, 4, 8),
        ("pixio_vit_tiny_patch4", 2, 8, 192, 12, 3, 8),
    ],
)
def test_names(
    name: str, cell: int, grid: int, width: int, depth: int, heads: int, decoder: int
) -> None:
    kind, arguments = models_zoo.MODELS[name]
    assert kind.presets(arguments)["pixio"]["mask_cell"] == [cell]
    with torch.device("meta"):
        model = models_zoo.create_model(name)
    assert model.mask_grid == (grid, grid) and model.cls_tokens == 8
    assert (model.embed_dim, len(model.blocks), model.num_heads) == (width, depth, heads)
    assert len(model.decoder_blocks) == decoder
    assert bool(model.draws) == ("huge" in name)


def test_4_of_16_cells_are_visible_and_all_alike_often() -> None:
    """Whole cells; each visible in a quarter of the masks, within five deviations."""
    kind, arguments = models_zoo.MODELS["pixio_vit_base_patch16"]
    with torch.device("meta"):
        model = models_zoo.create_model("pixio_vit_base_patch16")
    masker, draws = build_masker(STANDARD | kind.presets(arguments)["pixio"], model), 4000
    generator = torch.Generator().manual_seed(0)
    noise = [masker.strategy.draw(masker.cells.grid, generator) for _ in range(draws)]
    hidden = masker.strategy.mask(torch.stack(noise), None, masker.visible_cells)
    mask = masker.cells.to_patches(hidden)
    assert masker.num_visible == 64 and mask.shape == (draws, 256)
    blocks = mask.reshape(draws, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(draws, 16, 16)
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    assert ((~blocks.any(-1)).sum(dim=1) == 4).all()
    share = (~mask).float().mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / draws) ** 0.5


def test_averages_of_cells_are_exact() -> None:
    """Of three channels too: where the patches of a cell lie makes no difference to its rank."""
    model = small(img_size=32, patch_size=4)
    settings = STANDARD | {"mask": "average", "mask_cell": [2], "avg_temperature": 0.0}
    masker = build_masker(settings, model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 32, 32), generator=generator, dtype=torch.uint8)
    moved = images.clone()
    moved[..., 0:4, 0:4], moved[..., 4:8, 4:8] = images[..., 4:8, 4:8], images[..., 0:4, 0:4]
    assert not torch.equal(images, moved)
    seen = []
    masker.strategy.mask = lambda noise, averages, visible: (  # type: ignore[method-assign]
        seen.append(averages), torch.zeros(averages.shape, dtype=torch.bool)
    )[1]  # fmt: skip
    for batch_ in (images, moved):
        masker(batch_, torch.zeros(400, 2, 16))
    assert torch.equal(*seen)
    assert (seen[0][:, 0] - images[..., :8, :8].double().mean(dim=(1, 2, 3))).abs().max() < 1e-9


# ---- The partial decoder -----------------------------------------------------------------------


def in_cells(model: MaskedAutoencoderViT, B: int, visible: int) -> Tensor:
    """Masks of whole cells: bool [B, L], `visible` cells False."""
    cells, generator = model.predict_cells, torch.Generator().manual_seed(5)
    order = torch.rand(B, cells.grid[0] * cells.grid[1], generator=generator).argsort(dim=1)
    hidden = torch.ones(order.shape, dtype=torch.bool).scatter_(1, order[:, :visible], False)
    return cells.to_patches(hidden)


def test_a_partial_decoder_that_predicts_all_is_the_full_one() -> None:
    full, partial = pixio(), pixio(decoder="partial", predict_cell=2)
    assert full.state_dict().keys() == partial.state_dict().keys()
    images, mask = batch(full, visible=16)
    first, second = full(images, mask), partial(images, mask, order=torch.rand(mask.shape))
    assert torch.equal(first["pred"], second["pred"])
    assert torch.equal(first["loss"], second["loss"])


def test_partial_predictions_by_definition() -> None:
    """As if the masked patches that are not predicted were no part of the image, in float64."""
    model = pixio(decoder="partial", predict_ratio=0.5, predict_cell=2).double()
    images, mask = batch(model)[0], in_cells(model, 3, 4)
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(6))
    out, n = model(images, mask, order=order), model.cls_tokens
    assert out["pred"].shape == (3, 24, 48) and model.num_predicted(16) == 24
    cells = model.predict_cells
    for row in range(3):
        # The cells of lowest order among the hidden ones, by the order of their first patch.
        firsts = [8 * 2 * r + 2 * c for r in range(4) for c in range(4)]
        hidden = [i for i, first in enumerate(firsts) if mask[row, first]]
        taken = sorted(hidden, key=lambda i: order[row, firsts[i]])[:6]
        chosen = cells.to_patches(torch.isin(torch.arange(16), torch.tensor(taken))[None])[0]
        assert (chosen & ~mask[row]).sum() == 0 and chosen.sum() == 24
        patches = model.patch_embed.proj(images[row : row + 1]).flatten(2)[0].T
        x = torch.cat([model.cls_token[0], patches]) + model.pos_embed[0]
        seen = torch.cat([torch.ones(n, dtype=torch.bool), ~mask[row]])
        x = x[seen][None]
        for block in model.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        x = model.decoder_embed(model.norm(x))[0] + model.decoder_pos_embed[0][seen]
        tokens = model.mask_token[0] + model.decoder_pos_embed[0, n:][chosen]
        x = torch.cat([x, tokens])[None]
        for block in model.decoder_blocks:
            x = x + nn.Module.__call__(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        expected = model.decoder_pred(model.decoder_norm(x))[0, -24:]
        assert (out["pred"][row] - expected).abs().max() < 1e-9


def test_each_hidden_cell_is_predicted_as_often() -> None:
    model = pixio(decoder="partial", predict_ratio=0.25, predict_cell=2)
    B = 3000
    mask = torch.ones(B, 64, dtype=torch.bool)
    mask[:, [0, 1, 8, 9]] = False  # the first cell is visible
    hidden = mask[:1].nonzero()[:, 1].expand(B, -1)
    order = torch.rand(B, 64, generator=torch.Generator().manual_seed(7))
    chosen = model.decoding.choose(model, hidden, order)
    assert chosen.shape == (B, 16)  # 4 of 15 cells
    share = torch.zeros(B, 64).scatter_(1, chosen, 1.0).mean(dim=0)
    rate = 4 / 15
    assert share[[0, 1, 8, 9]].sum() == 0
    assert (share[mask[0]] - rate).abs().max() < 5 * (rate * (1 - rate) / B) ** 0.5


@pytest.mark.parametrize(
    ("ratio", "cell", "predicted"),
    [(1.0, 2, 48), (0.34, 2, 16), (0.25, 2, 12), (0.01, 2, 4), (0.34, 1, 16), (0.01, 1, 1)],
)
def test_how_many_are_predicted(ratio: float, cell: int, predicted: int) -> None:
    """Whole cells of 48 hidden patches, one at least; the rate follows."""
    model = pixio(decoder="partial", predict_ratio=ratio, predict_cell=cell)
    assert model.num_predicted(16) == predicted
    assert model.adjust_lr(1.0, 16) == pytest.approx(predicted / 48)


# ---- The encoder -------------------------------------------------------------------------------


def transformers_pixio(folder: Path) -> Any:
    """A folder of transformers, of random weights; the model in float64."""
    from transformers import PixioConfig, PixioModel

    torch.manual_seed(0)
    config = PixioConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4,
        n_cls_tokens=5,
    )  # fmt: skip
    model = PixioModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return PixioModel.from_pretrained(folder, dtype=torch.float64).eval()


def test_the_encoder_is_transformers(tmp_path: Path) -> None:
    """Tokens, pooled features and other sizes, in float64; the licence of such weights is said."""
    theirs = transformers_pixio(tmp_path)
    ours, state = models_zoo.load_encoder(str(tmp_path))
    assert ours.cls_tokens == 5 and "non-commercial" in str(state)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs(images)
        ours = ours.double().eval()
        found = ours.forward_features(images)
        assert (found - expected.last_hidden_state).abs().max() < 1e-9
        assert (ours.features(images, "cls") - expected.pooler_output).abs().max() < 1e-9
        mean = expected.last_hidden_state[:, 5:].mean(dim=1)
        assert (ours.features(images, "avg") - mean).abs().max() < 1e-9
    larger, _ = models_zoo.load_encoder(str(tmp_path), img_size=(48, 64))
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs(images).last_hidden_state
        # The table is resized in float32 there.
        assert (larger.double().eval().forward_features(images) - expected).abs().max() < 1e-5
        maps = ours.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert maps[0].shape == (2, 32, 12, 16)


def test_the_pretraining_encoder_is_transformers(tmp_path: Path) -> None:
    """The autoencoder's own, when it sees nearly all patches: the same weights, the same tokens."""
    theirs = transformers_pixio(tmp_path)
    encoder, _ = models_zoo.load_encoder(str(tmp_path))
    model = pixio(cls_tokens=5)
    model.load_state_dict(encoder.state_dict(), strict=False)
    model = model.double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    everything = torch.arange(64).expand(2, -1)
    with torch.inference_mode():
        found = model.forward_encoder(patchify(images, (4, 4)), everything)
        assert (found - theirs(images).last_hidden_state).abs().max() < 1e-9


@pytest.mark.parametrize("global_pool", ["avg", "cls"])
def test_the_classifier_pools_all_class_tokens(global_pool: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 3, 5, 32, 2, 2, global_pool=global_pool, cls_tokens=4).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        assert tokens.shape == (2, 4 + 16, 32)
        pooled = tokens[:, :4].mean(1) if global_pool == "cls" else tokens[:, 4:].mean(1)
        assert (model(images) - model.head(model.fc_norm(pooled))).abs().max() < 1e-6
        both = model.features(images, "both")
        expected = torch.cat([tokens[:, :4].mean(1), tokens[:, 4:].mean(1)], 1)
        assert (
            both.reshape(2, 2, 32) - model.fc_norm(expected.reshape(2, 2, 32))
        ).abs().max() < 1e-6
    names = {name for group in model.layer_groups() for name in group}
    assert names == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("relative_bias", [False, True])
def test_upernet_reads_the_patches_alone(relative_bias: bool) -> None:
    """Maps are of the patches, whatever the number of class tokens, and images may be larger."""
    torch.manual_seed(0)
    encoder = VisionTransformer(16, 4, 3, 0, 32, 4, 2, cls_tokens=3)
    taps = {"channels": 8, "aux_channels": 8, "relative_bias": relative_bias}
    model = UperNet(encoder, 5, **taps).eval()
    for size in ((16, 16), (24, 16)):
        maps = model.features(torch.randn(1, 3, *size))
        assert [m.shape for m in maps] == [(1, 32, size[0] // 4, size[1] // 4)] * 4
    again = models_zoo.segmenter_from(model.arguments)
    assert again.encoder.cls_tokens == 3
    again.load_state_dict(model.state_dict())


# ---- Files -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pretraining checkpoint of ours, as far as its model goes."""
    model, path = pixio(), tmp_path / "pretrained.pth"
    state = {
        "task": "pretrain", "step": 1, "model_name": "pixio_vit_micro_patch4", "model_args": PIXIO,
        "model": model.state_dict(),
    }  # fmt: skip
    write_signed(path, state)
    return path


def export(run_main: Any, source: Path, to: str, part: str, place: Path) -> tuple[int, str]:
    words = [f"--checkpoint={source}", f"--to={to}", f"--part={part}", f"--output={place}"]
    code, out, err = run_main("main_export", words)
    return code, out + err


@pytest.mark.smoke
@pytest.mark.parametrize("to", ["transformers", "official", "onnx", "mmae"])
def test_the_encoder_is_exported_and_read_again(
    to: str, checkpoint: Path, tmp_path: Path, run_main: Any
) -> None:
    place = tmp_path / f"out{ {'transformers': '', 'onnx': '.onnx'}.get(to, '.pth') }"
    code, said = export(run_main, checkpoint, to, "encoder", place)
    assert code == 0 and "verified" in said, said
    ours, theirs = (models_zoo.load_encoder(str(path))[0].eval() for path in (checkpoint, place))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        first, second = ours.forward_features(images), theirs.forward_features(images)
        assert (first - second).abs().max() < 1e-4 * first.abs().max()
        assert (ours(images) - theirs(images)).abs().max() < 1e-4


@pytest.mark.smoke
def test_transformers_takes_the_folder(checkpoint: Path, tmp_path: Path, run_main: Any) -> None:
    from transformers import AutoModel

    code, said = export(run_main, checkpoint, "transformers", "encoder", tmp_path / "folder")
    assert code == 0 and "PixioModel" in said, said
    theirs = AutoModel.from_pretrained(tmp_path / "folder").eval()
    ours, _ = models_zoo.load_encoder(str(checkpoint))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (theirs(images).pooler_output - ours.eval()(images)).abs().max() < 1e-4


@pytest.mark.smoke
def test_the_whole_model_is_official(checkpoint: Path, tmp_path: Path, run_main: Any) -> None:
    """Under the official names, and from weights alone: the one listed model of these shapes."""
    place = tmp_path / "out.pth"
    code, said = export(run_main, checkpoint, "official", "decoder", place)
    assert code == 0 and "loss, pred" in said, said
    weights = load_file(place)["model"]
    assert weights["cls_token"].shape == (1, 8, 32) and weights["pos_embed"].shape == (1, 72, 32)
    assert weights["decoder_pos_embed"].shape == (1, 72, 16)
    ours, theirs = (models_zoo.load_pretrained(str(path))[0].eval() for path in (checkpoint, place))
    images, mask = batch(ours, visible=16)
    with torch.inference_mode():
        assert (ours(images, mask)["pred"] - theirs(images, mask)["pred"]).abs().max() < 1e-5


def test_official_weights_alone(tmp_path: Path) -> None:
    """No arguments beside them: sizes and class tokens by their shapes, the name by both."""
    torch.manual_seed(0)
    model = models_zoo.create_model("pixio_vit_micro_patch4")
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    again, state = models_zoo.load_pretrained(str(tmp_path / "official.pth"))
    assert isinstance(again, Pixio) and again.cls_tokens == 8 and "non-commercial" in str(state)
    images, mask = batch(model, visible=16)
    with torch.inference_mode():
        assert torch.equal(again.eval()(images, mask)["pred"], model.eval()(images, mask)["pred"])
    encoder, _ = models_zoo.load_encoder(str(tmp_path / "official.pth"))
    assert encoder.cls_tokens == 8
    with pytest.raises(BadInput, match="cls_tokens 8, vit_micro_patch4 has 1"):
        models_zoo.load_encoder(str(tmp_path / "official.pth"), "vit_micro_patch4")


@pytest.mark.smoke
def test_timm_takes_what_pools_the_patches(checkpoint: Path, tmp_path: Path, run_main: Any) -> None:
    """Its register tokens hold the other class tokens, and it cannot take their mean."""
    code, said = export(run_main, checkpoint, "timm", "encoder", tmp_path / "a.safetensors")
    assert code == 2 and "timm pools the first of several class tokens" in said
    model, arguments, _ = models_zoo.load_classifier(
        str(checkpoint), head="new", num_classes=5, global_pool="avg"
    )
    tuned = {"task": "finetune", "step": 1, "model_args": arguments, "model": model.state_dict()}
    write_signed(tmp_path / "tuned.pth", tuned)
    code, said = export(
        run_main, tmp_path / "tuned.pth", "timm", "head", tmp_path / "b.safetensors"
    )
    assert code == 0 and "reg_tokens" in said, said
    again, _, _ = models_zoo.load_classifier(
        str(tmp_path / "b.safetensors"), head="own", num_heads=2
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (again.eval()(images) - model.eval()(images)).abs().max() < 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("to", "part", "message"),
    [
        ("mmseg", "encoder", "have one class token"),
        ("transformers", "decoder", "are encoders alone"),
    ],
)
def test_where_it_does_not_fit(
    to: str, part: str, message: str, checkpoint: Path, tmp_path: Path, run_main: Any
) -> None:
    place = tmp_path / ("out" if to == "transformers" else "out.pth")
    code, said = export(run_main, checkpoint, to, part, place)
    assert code == 2 and message in said and not place.exists(), said


# ---- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cls_tokens": 0}, "at least 1"),
        ({"positions": "none"}, "unknown positions 'none'"),
        ({"positions": "learned", "pos_offset": "center"}, "have no code"),
        ({"drop_path": 1.0}, "below 1"),
        ({"predict_ratio": 0.5}, "needs decoder 'partial' or 'cross'"),
        ({"decoder": "partial", "predict_cell": 2}, "does not divide the grid of 2 x 3"),
        ({"decoder": "partial", "encoder_mask_tokens": True}, "needs decoder 'full'"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        small(**arguments)


def test_a_model_without_drop_path_draws_nothing() -> None:
    model = small()
    images, mask = batch(model)
    with pytest.raises(BadInput, match="keeps every branch"):
        model(images, mask, kept=torch.zeros(3, 2, 2))


@pytest.mark.smoke
def test_the_command(tmp_path: Path, run_main: Any) -> None:
    """A cell that does not divide says which do; the run is Pixio's and can be MAE's to the bit."""
    for i in range(8):
        for label in ("a", "b"):
            place = tmp_path / "set" / "train" / label / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * i, 10, 99)).save(place)
    words = [
        "--dataset=imagefolder", f"--data_path={tmp_path / 'set'}", "--val_fraction=0.25",
        "--epochs=1", "--batch_size=4", "--num_workers=0", "--device=cpu", "--picture_every=0",
    ]  # fmt: skip
    model = "--model=pixio_vit_micro_patch4"
    cell = ["--mask_cell", "2", "2", "2", "--decoder=partial", f"--output_dir={tmp_path / 'x'}"]
    code, _, err = run_main("main_pretrain", [*words, model, *cell])
    assert code == 2 and "expected one number, or 2" in err, err
    code, _, err = run_main(
        "main_pretrain", [*words, model, "--mask_cell=3", f"--output_dir={tmp_path / 'x'}"]
    )
    assert code == 2 and "does not divide the grid" in err and "what does: 1, 2, 4, 8" in err, err
    like_mae = ["--cls_tokens=1", "--positions=sincos", "--mask_cell=1", "--decoder_depth=2"]
    for name, flags in {
        "pixio": [model, *like_mae, "--blr=1e-3"],
        "mae": ["--model=mae_vit_micro_patch4", "--method=mae", "--norm_pix_loss", "--blr=1e-3"],
    }.items():
        code, _, err = run_main(
            "main_pretrain", [*words, *flags, f"--output_dir={tmp_path / name}"]
        )
        assert code == 0, err
    first, second = (
        load_file(tmp_path / name / "checkpoint-last.pth")["model"] for name in ("pixio", "mae")
    )
    assert all(torch.equal(first[key], second[key]) for key in second)


# ---- Subclasses of others ----------------------------------------------------------------------


class OwnTables(MaskedAutoencoderViT):
    """A subclass whose constructor decides what the file's arguments do not say."""

    def __init__(self, positions: str = "learned", cls_tokens: int = 2, **arguments: Any) -> None:
        super().__init__(positions=positions, cls_tokens=cls_tokens, **arguments)


class OwnCode(MaskedAutoencoderViT):
    """A subclass with a position code of its own; its pieces know no drop path."""

    def position_code(self, part: str = "encoder", shift_B2: Tensor | None = None) -> Tensor:
        return 2.0 * super().position_code(part, shift_B2)

    def encode(self, patches_BLV, ids_visible, shift_B2=None, ids_masked=None):  # type: ignore[no-untyped-def, override]
        return super().encode(patches_BLV, ids_visible, shift_B2, ids_masked)


@pytest.mark.parametrize("kind", [OwnTables, OwnCode])
def test_the_encoder_of_a_subclass_is_what_it_says(
    kind: type[MaskedAutoencoderViT], tmp_path: Path
) -> None:
    """Not what the formula of its file's arguments would give."""
    sizes = {k: v for k, v in PIXIO.items() if k not in ("cls_tokens", "positions")}
    with registered_apart():
        models_zoo.register_model("own", kind, **sizes)
        torch.manual_seed(0)
        model = models_zoo.create_model("own")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        images, mask = batch(model, visible=16)
        assert torch.isfinite(model(images, mask)["loss"])
        state = {
            "task": "pretrain", "step": 1, "model_name": "own", "model": model.state_dict(),
            "model_args": {**sizes, "pos_offset": "none"},
        }  # fmt: skip
        write_signed(tmp_path / "own.pth", state)
        encoder, _ = models_zoo.load_encoder(str(tmp_path / "own.pth"))
        everything = torch.arange(64).expand(len(images), -1)
        with torch.inference_mode():
            expected = model.forward_encoder(patchify(images, (4, 4)), everything)
            found = encoder.eval().forward_features(images)
            again = models_zoo.load_pretrained(str(tmp_path / "own.pth"))[0].eval()
            assert torch.equal(again(images, mask)["pred"], model.eval()(images, mask)["pred"])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- Register tokens of timm -------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timms_register_tokens(pool: str, tmp_path: Path) -> None:
    """Read as class tokens where the patches are pooled; named as the reason where not."""
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        num_classes=5, reg_tokens=3, global_pool=pool,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    words: dict[str, Any] = {"head": "own", "num_heads": 2}
    if pool == "token":
        with pytest.raises(BadInput, match=r"3 register tokens \(reg_token\)"):
            models_zoo.load_classifier(str(tmp_path / "timm.pth"), **words)
        return
    ours, arguments, _ = models_zoo.load_classifier(str(tmp_path / "timm.pth"), **words)
    assert arguments["cls_tokens"] == 4
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (ours.eval()(images) - theirs(images)).abs().max() < 1e-4
