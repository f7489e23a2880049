"""SimMIM, its Swin and its vision transformer: against other programs, tables and statistics."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models_swin_names
import models_vit_relative_names
import models_zoo
from models_simmim import NAMES, SimMIM
from models_swin import SwinTransformer
from models_vit_relative import RelativeVisionTransformer
from util.errors import BadInput
from util.mask.cells import make_cells
from util.mask.relative import resize_bias
from util.weights.export import save_safetensors

SWIN: dict[str, Any] = {
    "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 3], "num_heads": [2, 4, 4], "window_size": 4,
}  # fmt: skip
VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS = {"swin": SWIN, "vit_relative": VIT}


def small(kind: str, seed: int = 0, **arguments: Any) -> SimMIM:
    """A model of 32 pixels whose every parameter is random, so that no term is 0."""
    torch.manual_seed(seed)
    model = SimMIM(kind, img_size=32, **(KINDS[kind] | arguments)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(model: SimMIM, B: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and masks of cells of 8 pixels as the recipe makes them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(B, *model.input.shape, generator=generator, dtype=torch.float64)
    cells = make_cells(model.mask_grid, [8 * model.mask_grid[0] // 32])
    count = math.prod(cells.grid)
    order = torch.rand(B, count, generator=generator).argsort(dim=1)
    return images, cells.to_patches(order >= model.num_visible(count, 0.6))


# ---- Against transformers ----------------------------------------------------------------------


def save(folder: Path, config: Any, weights: dict[str, Tensor]) -> None:
    config.save_pretrained(folder)
    save_safetensors(folder / "model.safetensors", weights)


def encoder_weights(model: SimMIM) -> dict[str, Tensor]:
    """The encoder's, with the mask token as the other programs have it."""
    return {**model.encoder.state_dict(), "mask_token": model.mask_token.reshape(1, 1, -1)}


@pytest.mark.parametrize("window", [4, 3])
def test_swin_is_transformers_swin(window: int, tmp_path: Path) -> None:
    """Loss, picture and every gradient, in float64; windows of 3 do not divide the maps."""
    from transformers import SwinConfig, SwinForMaskedImageModeling

    more = {"pad_windows": True} if window == 3 else {}
    model = small("swin", window_size=window, **more)
    weights = models_swin_names.to_transformers(encoder_weights(model))
    weights |= {k: v for k, v in model.state_dict().items() if k.startswith("decoder.")}
    config = SwinConfig(
        image_size=32, encoder_stride=8, drop_path_rate=0.0, **(SWIN | {"window_size": window})
    )
    save(tmp_path, config, weights)
    theirs, loading = SwinForMaskedImageModeling.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64
    )
    assert not any(loading.values())
    images, mask = batch(model)
    ours, expected = model(images, mask), theirs(images, bool_masked_pos=mask)
    assert abs((ours["loss"] - expected.loss).item()) < 1e-9
    assert (ours["pred"] - expected.reconstruction).abs().max() < 1e-9
    ours["loss"].backward()
    expected.loss.backward()
    names = ("q", "k", "v")
    block, other = model.encoder.layers[1].blocks[1], theirs.swin.encoder.layers[1].blocks[1]
    attention = [getattr(other.attention, f"{name}_proj").weight.grad for name in names]
    pairs = {
        "token": (model.mask_token, theirs.swin.embeddings.mask_token),
        "merging": (
            model.encoder.layers[1].downsample.reduction.weight,
            theirs.swin.encoder.layers[0].downsample.reduction.weight,
        ),
        "table": (
            block.attn.relative_position_bias_table,
            other.attention.relative_position_bias.relative_position_bias_table,
        ),
        "norm": (model.encoder.norm.weight, theirs.swin.layernorm.weight),
        "patches": (
            model.encoder.patch_embed.proj.weight,
            theirs.swin.embeddings.patch_embeddings.projection.weight,
        ),
        "head": (model.decoder[0].weight, theirs.decoder[0].weight),
    }
    found = {name: (a.grad.flatten(), b.grad.flatten()) for name, (a, b) in pairs.items()}
    found["qkv"] = (block.attn.qkv.weight.grad, torch.cat(attention))
    for name, (a, b) in found.items():
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() < 1e-9, name
    if window == 4:  # the folder is read as a whole model
        again, _ = models_zoo.load_pretrained(str(tmp_path))
        assert isinstance(again, SimMIM)
        with torch.inference_mode():
            pred = again.eval()(images.float(), mask)["pred"]
        assert (pred - ours["pred"]).abs().max() < 1e-4


def test_vit_is_transformers_beit(tmp_path: Path) -> None:
    """The masked encoder, and the loss by hand with the gradients that follow, in float64."""
    from transformers import BeitConfig, BeitModel

    model = small("vit_relative")
    weights = models_vit_relative_names.to_transformers(encoder_weights(model))
    config = BeitConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128, layer_norm_eps=1e-6, drop_path_rate=0.0, use_mask_token=True,
        use_shared_relative_position_bias=True, use_mean_pooling=False,
    )  # fmt: skip
    save(tmp_path, config, weights)
    theirs, loading = BeitModel.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64, add_pooling_layer=False
    )
    assert not any(loading.values())
    images, mask = batch(model)
    ours = model(images, mask)
    tokens = theirs(images, bool_masked_pos=mask).last_hidden_state[:, 1:]
    weight, bias = (p.detach().clone().requires_grad_() for p in model.decoder[0].parameters())
    values = tokens @ weight.flatten(1).T + bias  # [B, 64, 3 * 16], channel, row, column
    pred = values.reshape(-1, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    hidden = mask.reshape(-1, 1, 8, 1, 8, 1).expand(-1, 1, 8, 4, 8, 4).reshape(-1, 1, 32, 32)
    loss = ((pred - images).abs() * hidden).sum() / hidden.sum() / 3
    assert abs((ours["loss"] - loss).item()) < 1e-12
    ours["loss"].backward()
    loss.backward()
    block, other = model.encoder.blocks[1], theirs.layers[1]
    table = theirs.shared_position_bias.relative_position_bias_table
    for name, (a, b) in {
        "token": (model.mask_token, theirs.embeddings.mask_token),
        "table": (model.encoder.rel_pos_bias.relative_position_bias_table, table),
        "class token": (model.encoder.cls_token, theirs.embeddings.cls_token),
        "gamma": (block.gamma_1, other.lambda_1),
        "q bias": (block.attn.q_bias, other.attention.q_proj.bias),
        "norm": (model.encoder.norm.weight, theirs.layernorm.weight),
        "head": (model.decoder[0].weight, weight),
    }.items():
        assert b.grad.abs().max() > 0, name
        assert (a.grad.flatten() - b.grad.flatten()).abs().max() < 1e-9, name


# ---- Against timm ------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "window"), [(192, 6), (224, 7), (192, 12)])
def test_swin_classifier_is_timms(side: int, window: int) -> None:
    import timm

    sizes = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    torch.manual_seed(0)
    ours = SwinTransformer(side, 4, 3, num_classes=5, window_size=window, **sizes).eval()
    theirs = timm.create_model(
        "swin_base_patch4_window7_224", img_size=side, window_size=window, num_classes=5, **sizes
    ).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(models_swin_names.to_timm(ours.state_dict()))
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_swin_maps_are_timms() -> None:
    """The four maps that segmentation reads, before any norm."""
    import timm

    sizes = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]}
    torch.manual_seed(0)
    ours = SwinTransformer(64, 2, window_size=4, num_classes=0, **sizes).eval()
    theirs = timm.create_model(
        "swin_base_patch4_window7_224", img_size=64, patch_size=2, window_size=4, num_classes=0,
        **sizes,
    ).eval()  # fmt: skip
    theirs.load_state_dict(models_swin_names.to_timm(ours.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = ours.pyramid(images, ())
        expected = theirs.forward_intermediates(images, intermediates_only=True)
    info = [(one["stride"], one["channels"]) for one in ours.feature_info]
    assert info == [((2 * 2**i,) * 2, 16 * 2**i) for i in range(4)]
    for a, b, (stride, channels) in zip(found, expected, info, strict=True):
        assert a.shape == b.shape == (2, channels, 64 // stride[0], 64 // stride[0])
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(70, 50), (20, 90)])
def test_padded_swin_takes_images_of_any_size(size: tuple[int, int]) -> None:
    """Maps of every stage cover the whole image, whatever its sides."""
    torch.manual_seed(0)
    model = SwinTransformer(
        64, 2, embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
        num_classes=0, pad_windows=True,
    ).eval()  # fmt: skip
    maps = model.pyramid(torch.randn(1, 3, *size), ())
    sides = [[-(-side // (2 * 2**i)) for side in size] for i in range(4)]
    assert [list(one.shape[2:]) for one in maps] == sides


def test_vit_classifier_is_timms() -> None:
    from timm.models.beit import Beit

    ours = RelativeVisionTransformer(32, 4, 3, 5, 32, 3, 2, lscale_init=0.1).eval()
    theirs = Beit(
        32, 4, 3, 5, embed_dim=32, depth=3, num_heads=2, init_values=0.1, use_abs_pos_emb=False,
        use_rel_pos_bias=True, norm_layer=lambda *a, **k: nn.LayerNorm(*a, **k, eps=1e-6),
    ).eval()  # fmt: skip
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() < 1e-5


# ---- Tables by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "masked"), [(36, 22), (49, 30), (16, 10), (25, 15)])
def test_counts(cells: int, masked: int) -> None:
    assert SimMIM.num_visible(cells, 0.6) == cells - masked


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_mask_that_hides_all_or_nothing(ratio: float) -> None:
    with pytest.raises(BadInput, match="mask_ratio"):
        SimMIM.num_visible(36, ratio)


@pytest.mark.parametrize(
    ("name", "cell", "grid"),
    [
        ("simmim_swin_base_patch4_window6", 8, (48, 48)),
        ("simmim_vit_base_patch16", 2, (14, 14)),
        ("simmim_swin_micro_patch2_window4", 4, (16, 16)),
        ("simmim_vit_micro_patch4", 2, (8, 8)),
    ],
)
def test_cells(name: str, cell: int, grid: tuple[int, int]) -> None:
    kind, arguments = models_zoo.MODELS[name]
    assert kind.presets(arguments)["simmim"]["mask_cell"] == [cell]
    with torch.device("meta"):
        assert models_zoo.create_model(name).mask_grid == grid


def layers(model: nn.Module) -> dict[str, int]:
    groups = model.layer_groups()  # type: ignore[operator]
    return {name: i for i, names in enumerate(groups) for name in names}


def test_layer_ids_of_swin_base() -> None:
    """26 groups; a merging has the id of the last block before it."""
    with torch.device("meta"):
        model = models_zoo.create_model("swin_base_patch4_window7", num_classes=10)
    found, first = layers(model), {0: 1, 1: 3, 2: 5, 3: 23}
    assert len(model.layer_groups()) == 26 and len(found) == len(list(model.named_parameters()))
    for name, number in found.items():
        part, stage, kind, block = (name.split(".") + [""] * 3)[:4]
        expected = {"patch_embed": 0, "norm": 25, "head": 25}.get(part, -1)
        if kind == "blocks":
            expected = first[int(stage)] + int(block)
        elif kind == "downsample":
            expected = {1: 2, 2: 4, 3: 22}[int(stage)]
        assert number == expected, name


def test_layer_ids_of_the_vit() -> None:
    with torch.device("meta"):
        model = models_zoo.create_model("vit_relative_base_patch16", num_classes=10)
    found = layers(model)
    assert len(model.layer_groups()) == 14 and len(found) == len(list(model.named_parameters()))
    for name, number in found.items():
        part = name.split(".")[0]
        expected = {"patch_embed": 0, "cls_token": 0, "fc_norm": 13, "head": 13}.get(part, -1)
        assert number == (int(name.split(".")[1]) + 1 if part == "blocks" else expected), name


@pytest.mark.parametrize("name", ["simmim_swin_base_patch4_window6", "simmim_vit_base_patch16"])
def test_which_parameters_decay(name: str) -> None:
    """Pretraining: none of one axis; of Swin neither token nor tables, of the transformer both."""
    from util.train.optim import parameter_groups

    with torch.device("meta"):
        model = models_zoo.create_model(name)
    decayed, plain = (set(group["param_names"]) for group in parameter_groups(model, 0.05))
    ends = ("bias_table", "mask_token")
    for parameter in decayed | plain:
        no = dict(model.named_parameters())[parameter].ndim <= 1
        if "swin" in name:
            no = no or parameter.endswith(ends)
        else:
            no = no or parameter == "encoder.cls_token"
        assert (parameter in plain) == no, parameter


@pytest.mark.parametrize(
    ("name", "layers_there", "decay"),
    [("swin_base_patch4_window7", 26, 0.9), ("vit_relative_base_patch16", 14, 0.65)],
)
def test_groups_of_fine_tuning(name: str, layers_there: int, decay: float) -> None:
    """Rates fall from the head to the patches; of Swin tables do not decay, of the ViT they do."""
    from util.train.optim import layer_decay_groups

    with torch.device("meta"):
        model = models_zoo.create_model(name, num_classes=10)
    found = layers(model)
    for group in layer_decay_groups(model, 0.05, decay):
        for parameter in group["param_names"]:
            plain = dict(model.named_parameters())[parameter].ndim <= 1
            plain = plain or parameter == "cls_token"
            plain = plain or ("swin" in name and parameter.endswith("bias_table"))
            assert (group["weight_decay"] == 0) == plain, parameter
            power = layers_there - 1 - found[parameter]
            assert group["lr_scale"] == pytest.approx(decay**power), parameter


# ---- Initialisation ----------------------------------------------------------------------------


def deviation(tensor: Tensor) -> float:
    return float(tensor.detach().std())


# Deviation of a normal distribution of 1 that is cut at 1.
CUT_AT_ONE = 0.5397


def test_the_vit_starts_as_the_official_code() -> None:
    torch.manual_seed(0)
    model = SimMIM("vit_relative", img_size=64, patch_size=8, embed_dim=256, depth=4, num_heads=4)
    encoder = model.encoder
    assert isinstance(encoder, RelativeVisionTransformer)
    for tensor in (encoder.patch_embed.proj.weight, encoder.blocks[3].attn.qkv.weight,
                   encoder.blocks[3].mlp.fc1.weight):  # fmt: skip
        assert tensor.abs().max() <= 0.02
        assert deviation(tensor) == pytest.approx(0.02 * CUT_AT_ONE, rel=0.03)
    for i, block in enumerate(encoder.blocks):
        for last in (block.attn.proj.weight, block.mlp.fc2.weight):
            scale = math.sqrt(2 * (i + 1))
            assert deviation(last) == pytest.approx(0.02 * CUT_AT_ONE / scale, rel=0.03)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    for token in (encoder.cls_token, model.mask_token):
        assert 0.015 < token.abs().max() <= 0.02
    table = encoder.rel_pos_bias.relative_position_bias_table
    assert not table.any() and table.shape == ((2 * 8 - 1) ** 2 + 3, 4)
    biases = [p for n, p in encoder.named_parameters() if n.endswith("bias") and p.ndim == 1]
    assert biases and not any(b.any() for b in biases)
    torch.manual_seed(0)
    tuned = RelativeVisionTransformer(64, 8, 3, 0, 256, 4, 4)
    assert tuned.blocks[0].attn.qkv.weight.abs().max() > 0.06  # the cut is at 2 there
    assert deviation(tuned.blocks[0].attn.qkv.weight) == pytest.approx(0.02, rel=0.03)


def test_swin_starts_as_the_official_code() -> None:
    torch.manual_seed(0)
    model = SimMIM("swin", img_size=64, patch_size=4, embed_dim=64, depths=[2, 2],
                   num_heads=[2, 4], window_size=8)  # fmt: skip
    encoder = model.encoder
    assert isinstance(encoder, SwinTransformer)
    block = encoder.layers[1].blocks[1]
    for tensor in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc2.weight,
                   block.attn.relative_position_bias_table, model.mask_token,
                   encoder.layers[1].downsample.reduction.weight):  # fmt: skip
        assert deviation(tensor) == pytest.approx(0.02, rel=0.3 if tensor.numel() < 2000 else 0.03)
    assert encoder.layers[1].downsample.reduction.bias is None
    bound = 1 / math.sqrt(3 * 16)  # torch's own, uniform
    assert bound * 0.98 < encoder.patch_embed.proj.weight.abs().max() <= bound
    assert encoder.norm.eps == block.norm1.eps == encoder.patch_embed.norm.eps == 1e-5


# ---- Relative positions ------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(6, 7), (7, 6), (14, 24), (12, 14), (3, 4)])
def test_tables_are_resized_as_in_the_official_code(old: int, new: int) -> None:
    """Against scipy's bivariate spline on the geometric grid, which interp2d was."""
    from scipy.interpolate import RectBivariateSpline

    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        too_far = (1 - q ** (old - 1)) / (1 - q) > new - 1
        low, high = (low, q) if too_far else (q, high)
    side = [sum(q**k for k in range(i + 1)) for i in range(old - 1)]
    places = [*(-s for s in reversed(side)), 0.0, *side]
    table = torch.randn((2 * old - 1) ** 2 + 3, 2, dtype=torch.float64)
    found = resize_bias(table, (old, old), (new, new))
    wanted = list(range(1 - new, new))
    for head in range(2):
        values = table[:-3, head].reshape(2 * old - 1, 2 * old - 1).numpy()
        spline = RectBivariateSpline(places, places, values)(wanted, wanted)
        assert (found[:-3, head] - torch.from_numpy(spline).flatten()).abs().max() < 1e-12
    assert torch.equal(found[-3:], table[-3:])


def test_extended_tables_keep_near_offsets() -> None:
    table = torch.arange(9.0).reshape(9, 1)  # windows of 2: offsets -1, 0, 1
    found = resize_bias(table, (2, 2), (3, 3), "extend").reshape(5, 5)
    assert torch.equal(found[1:4, 1:4], table.reshape(3, 3))
    assert found[0].tolist() == [0, 0, 1, 2, 2]


# ---- What the model promises -------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_visible_pixels_have_no_part_in_the_loss_and_hidden_ones_none_in_the_picture(
    kind: str,
) -> None:
    model = small(kind)
    images, mask = batch(model)
    gh, gw = model.mask_grid
    hidden = mask.reshape(-1, 1, gh, gw)
    hidden = hidden.repeat_interleave(32 // gh, 2).repeat_interleave(32 // gw, 3)
    out = model(images, mask)
    other = images + 5 * hidden
    assert torch.equal(model(other, mask)["pred"], out["pred"])
    by_hand = ((out["pred"] - images).abs() * hidden).sum() / hidden.sum() / 3
    assert abs((out["loss"] - by_hand).item()) < 1e-12
    assert torch.equal(model.reconstruct(images, mask), out["pred"].float())


@pytest.mark.parametrize("kind", list(KINDS))
def test_drop_path_is_the_samples_own(kind: str) -> None:
    """Numbers that come with an image decide, whatever the rest of its batch."""
    model = small(kind, drop_path=0.5)
    blocks = len(model.encoder.stages)
    assert dict(model.draws) == {"kept": (blocks, 2)} and not small(kind).draws
    images, mask = batch(model, 4)
    kept = torch.rand(4, blocks, 2, dtype=torch.float64) - 0.5
    whole = model(images, mask, kept=kept)["pred"]
    parts = [
        model(images[i : i + 1], mask[i : i + 1], kept=kept[i : i + 1])["pred"] for i in range(4)
    ]
    assert (whole - torch.cat(parts)).abs().max() < 1e-12
    assert (whole - model(images, mask)["pred"]).abs().max() > 1e-3
    none = torch.full_like(kept, 0.49)
    scaled = model(images, mask, kept=none)["pred"]
    assert (scaled - model(images, mask)["pred"]).abs().max() > 1e-3  # kept ones are scaled up


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpointing_changes_no_number(kind: str) -> None:
    model = small(kind, drop_path=0.5)
    images, mask = batch(model)
    kept = torch.rand(3, len(model.encoder.stages), 2, dtype=torch.float64) - 0.5
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, mask, kept=kept)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [SwinTransformer, RelativeVisionTransformer])
def test_checkpointing_draws_the_same_again(kind: Any) -> None:
    """Fine-tuning's own drop path: what is computed again leaves out the same branches."""
    torch.manual_seed(0)
    model = kind(32, num_classes=3, drop_path=0.5, **KINDS[kind.kind]).double().train()
    images, gradients = torch.randn(4, 3, 32, 32, dtype=torch.float64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", list(NAMES))
def test_every_name_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = models_zoo.create_model(name)
    assert model.encoder_state().kind in models_zoo.ENCODER_KINDS


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("swin", {"window_size": 5}, "windows of 5 do not divide .* images of 40.*windows of 4, 2"),
        ("swin", {"img_size": 36}, "is not a multiple of"),
        ("swin", {"num_heads": [2, 4]}, "one a stage"),
        ("swin", {"num_heads": [3, 4, 4]}, "multiple of the heads"),
        ("vit_relative", {"img_size": 30}, "is not a multiple of the patch size"),
        ("vit_relative", {"num_heads": 3}, "multiple of its 3 heads"),
        ("vit_relative", {"drop_path": 1.0}, "drop_path"),
        ("convnet", {}, "unknown encoder 'convnet', choose from swin, vit_relative"),
    ],
)
def test_refusals(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        SimMIM(kind, **({"img_size": 32} | KINDS.get(kind, {}) | arguments))


def test_images_and_masks_of_another_size() -> None:
    model = small("swin")
    images, mask = batch(model)
    with pytest.raises(BadInput, match="the model was built for"):
        model(images[..., :16], mask)
    with pytest.raises(BadInput, match="2 masks for 3 images"):
        model(images, mask[:2])
    with pytest.raises(BadInput, match="same count of visible"):
        uneven = mask.clone()
        uneven[0, mask[0].nonzero()[0]] = False
        model(images, uneven)
