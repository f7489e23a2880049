"""What the MAE and M-MAE papers vary, as flags that combine."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import TINY
from PIL import Image
from runs import records
from tiny import SMALL, VISIBLE, batch, small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode, v2

from engine_pretrain import build_masker, reconstruct
from lab.bench.step_speed import flop_counter
from models_mmae import MaskedAutoencoderViT
from models_zoo import load_encoder, load_pretrained, model_arguments
from util.data.transforms import AUGMENTS, EvalTransform, PretrainTransform, pretrain_transform
from util.errors import BadInput
from util.mask.patches import patch_averages, patchify
from util.mask.pca import PatchMoments
from util.mask.strategies import STANDARD, create_strategy
from util.train.checkpoint import load_file


def fitted(model: MaskedAutoencoderViT) -> MaskedAutoencoderViT:
    """With a PCA of random patches, where it has one."""
    if model.target_name == "pca":
        values = len(model.pca.mean)
        moments = PatchMoments(values)
        moments.update(torch.randn(4 * values, values, generator=torch.Generator().manual_seed(3)))
        fit = moments.principal(model.pca_components)
        model.pca.set(fit.mean, fit.basis)
    return model


# ---- Mask tokens in the encoder ----------------------------------------------------------------


@pytest.mark.parametrize("terms", [{}, {"lscale_init": 0.1, "pos_offset": "learned"}])
def test_encoder_mask_tokens_are_the_definition(terms: dict[str, object]) -> None:
    """Image by image, every token in its raster place, full blocks, and what is not needed cut off
    at the end."""
    model = small(encoder_mask_tokens=True, **terms).double()
    images, mask = batch(model)
    predictions = []
    for image, hidden in zip(images, mask, strict=True):
        x = model.patch_embed.proj(image[None]).flatten(2)[0].T.clone()
        x[hidden] = model.encoder_mask_token[0, 0]
        x = torch.cat([model.cls_token[0], x + model.position_code()[0]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        x = torch.cat([x[:1], x[1:] + model.position_code("decoder")[0]])[None]
        for block in list(model.decoder_blocks)[:-1]:
            x = block(x)
        x = model.decoder_blocks[-1](x, num_queries=x.shape[1])
        predictions.append(model.decoder_pred(model.decoder_norm(x))[0, 1:][hidden])
    expected = torch.stack(predictions)
    out = model(images, mask)
    torch.testing.assert_close(out["pred"], expected, rtol=1e-9, atol=1e-11)
    target = patchify(images, (4, 4))[mask].reshape(3, 4, 48)
    torch.testing.assert_close(out["loss"], (expected - target).square().mean(), rtol=1e-9, atol=0)
    names = dict(model.named_parameters())
    assert "mask_token" not in names and names["encoder_mask_token"].shape == (1, 1, 32)


def matrix_flops(name: str, side: int | None = None, **terms: object) -> int:
    """FLOPs of the matrix products and of attention, one image forward; nothing is computed."""
    arguments = model_arguments(name) | terms | ({} if side is None else {"img_size": side})
    with FakeTensorMode(), flop_counter() as counter:
        model = MaskedAutoencoderViT(**arguments)
        images, L = torch.zeros(1, 3, *model.img_size), model.grid[0] * model.grid[1]
        model(images, torch.zeros(1, L, dtype=torch.bool), L // 4)
    return counter.get_total_flops()


def flops_by_hand(L: int, D: int, depth: int, d: int, decoder_depth: int, V: int, all: bool) -> int:
    """Multiplications and additions of ViT blocks by the textbook: 24 D² for a token of a block,
    4 N D for its attention to N tokens. The decoder's last block asks for masked tokens only."""
    K, M = L // 4, L - L // 4
    seen, N = 1 + (L if all else K), 1 + L
    encoder = depth * (24 * D**2 * seen + 4 * D * seen**2)
    decoder = (decoder_depth - 1) * (24 * d**2 * N + 4 * d * N**2)
    last = 4 * d**2 * N + 20 * d**2 * M + 4 * d * M * N
    return encoder + decoder + last + 2 * (K * V * D + seen * D * d + M * d * V)


def test_encoder_mask_tokens_cost_at_vit_large() -> None:
    """MAE's ablation says 3.3 x; the paper does not say what it counts."""
    name = "mae_vit_large_patch16"
    counts = [matrix_flops(name, encoder_mask_tokens=tokens) for tokens in (False, True)]
    by_hand = [flops_by_hand(196, 1024, 24, 512, 8, 768, tokens) for tokens in (False, True)]
    assert counts == pytest.approx(by_hand, rel=0.01)
    assert counts[1] / counts[0] == pytest.approx(3.3, abs=0.1)


# ---- PCA as the target -------------------------------------------------------------------------


def test_pca_is_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    generator = np.random.default_rng(0)
    patches = generator.normal(size=(500, 48)) @ generator.normal(size=(48, 48)) + 0.5
    moments = PatchMoments(48)
    for part in np.array_split(patches, 7):
        moments.update(torch.from_numpy(part))
    fit = moments.principal(10)
    theirs = PCA(10, svd_solver="full").fit(patches)
    # Which of a direction and its opposite is meant is a convention: the largest entry is positive.
    components = theirs.components_.T
    largest = np.take_along_axis(components, np.abs(components).argmax(0)[None], 0)
    np.testing.assert_allclose(fit.basis, components * np.sign(largest), rtol=0, atol=1e-9)
    np.testing.assert_allclose(fit.mean, theirs.mean_, rtol=0, atol=1e-12)
    assert fit.share == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-9)
    assert fit.patches == 500

    model = small(pca_components=10).double()
    model.pca.set(fit.mean, fit.basis)
    given = generator.normal(size=(2, 4, 48))
    expected = theirs.transform(given.reshape(8, 48)) * np.sign(largest)
    coefficients = model.target(torch.from_numpy(given)).reshape(8, 10)
    np.testing.assert_allclose(coefficients, expected, rtol=0, atol=1e-9)
    restored = theirs.inverse_transform(expected * np.sign(largest))
    np.testing.assert_allclose(model.pca.inverse(coefficients), restored, rtol=0, atol=1e-9)


def test_pca_sums_add_over_processes() -> None:
    patches = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).double()
    parts = [PatchMoments(12) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, 60), slice(60, 60)), strict=True):
        part.update(patches[rows])
    sums = [part.sums for part in parts]
    parts[2].sum_over(lambda own: sum(sums))
    alone = PatchMoments(12)
    alone.update(patches)
    for a, b in zip(parts[2].principal(5), alone.principal(5), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-12)
    with pytest.raises(BadInput, match="pca_patches"):
        parts[0].principal(7)
    with pytest.raises(BadInput, match="12 values"):
        alone.principal(13)


def test_an_unfitted_target_is_no_number_and_a_fitted_ones_loss_is_by_hand() -> None:
    model = small(pca_components=5).double()
    images, mask = batch(model)
    assert model(images, mask)["loss"].isnan()
    out = fitted(model)(images, mask)
    assert out["pred"].shape == (3, 4, 5)
    hidden = patchify(images, (4, 4))[mask].reshape(3, 4, 48)
    target = (hidden - model.pca.mean) @ model.pca.basis
    torch.testing.assert_close(out["loss"], (out["pred"] - target).square().mean())
    assert {"pca.mean", "pca.basis"} <= model.state_dict().keys()
    # As normalised pixels, the target is not rounded where the model computes in half precision.
    patches = hidden.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.float().target(patches)
    torch.testing.assert_close(rounded, target.float(), rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_of_all_coefficients_is_the_image() -> None:
    model = fitted(small(pca_components=48))
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    mask = batch(model, 2)[1]

    def oracle(x: Tensor, mask: Tensor, num_visible: int) -> dict[str, Tensor]:
        hidden = patchify(x, (4, 4))[mask].reshape(2, 4, 48)
        return {"pred": model.target(hidden)}

    model.forward = oracle
    masker = build_masker(STANDARD | {"mask_ratio": 1 - VISIBLE / model.num_patches}, model)
    picture = reconstruct(model, images, mask, masker, (0.5,) * 3, (0.2,) * 3)
    assert (picture - images).abs().max() < 0.01  # gray levels


# ---- Augmentation ------------------------------------------------------------------------------


def picture(width: int = 60, height: int = 40) -> Image.Image:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def views(augment: str, image: Image.Image, number: int = 12, **rest: object) -> list[Tensor]:
    settings = {"decoder": "pil", "flip": True, "channels": 3, "margin": True} | rest
    transform = pretrain_transform(augment, size=(16, 16), crop_scale=(0.2, 1.0), **settings)
    torch.manual_seed(0)
    found = [transform(image) for _ in range(number)]
    assert all(v.dtype == torch.uint8 and v.shape == (3, 16, 16) for v in found)
    return found


def test_none_is_the_centre_and_random_crop_is_the_recipe() -> None:
    image = picture()
    centre = EvalTransform((16, 16))(image)
    assert all(torch.equal(view, centre) for view in views("none", image))
    transform = PretrainTransform((16, 16))
    torch.manual_seed(0)
    expected = [transform(image) for _ in range(12)]
    assert all(map(torch.equal, views("random_crop", image), expected))


def test_fixed_crop_is_a_place_of_the_scaled_image() -> None:
    image = picture()
    # 16 / .875 = 18: the short side becomes 18, the long one 27.
    scaled = v2.functional.resize(image, [18, 27], InterpolationMode.BICUBIC, antialias=True)
    scaled = v2.functional.pil_to_tensor(scaled)
    places = itertools.product(range(3), range(12))
    crops = {scaled[:, y : y + 16, x : x + 16].numpy().tobytes(): (y, x) for y, x in places}
    seen = {crops[v.numpy().tobytes()] for v in views("fixed_crop", image, 40, flip=False)}
    assert len(seen) > 15 and {y for y, _ in seen} == {0, 1, 2}
    either = views("fixed_crop", image, 40)
    flipped = sum(v.flip(-1).numpy().tobytes() in crops for v in either)
    assert 10 < flipped < 30
    assert flipped + sum(v.numpy().tobytes() in crops for v in either) == 40


def test_crop_jitter_shakes_the_colours_of_the_same_crop() -> None:
    gray = Image.new("RGB", (60, 40), (100, 120, 140))
    shaken = torch.stack(views("crop_jitter", gray, 60)).float()
    assert all(len(v.flatten(1).unique(dim=1)[0]) == 1 for v in shaken)  # one colour stays one
    brightness = shaken.mean(dim=(1, 2, 3)) / 120
    assert 0.58 < brightness.min() < 0.75 and 1.25 < brightness.max() < 1.42
    with pytest.raises(BadInput, match="5 channels"):
        views("crop_jitter", gray, channels=5)
    with pytest.raises(BadInput, match="random_crop"):
        views("random", gray)
    one = pretrain_transform(
        "crop_jitter", "pil", (16, 16), (0.2, 1.0), flip=True, channels=1, margin=True
    )
    assert one(gray.convert("L")).shape == (1, 16, 16)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_pixels_of_torchvision_give_nearly_the_same_views(augment: str) -> None:
    image = picture()
    pixels = v2.functional.pil_to_tensor(image)
    torch.manual_seed(0)
    transform = pretrain_transform(
        augment, "torchvision", (16, 16), (0.2, 1.0), flip=True, channels=3, margin=True
    )
    found = [transform(pixels) for _ in range(12)]
    pairs = zip(found, views(augment, image), strict=True)
    # Bicubic in two roundings, and jitter works on rounded values: gray levels, of 255.
    assert max((a.float() - b.float()).abs().mean() for a, b in pairs) < 1.5


# ---- All of them together ----------------------------------------------------------------------

FACTORS: dict[str, list[dict[str, object]]] = {
    "tokens": [{}, {"encoder_mask_tokens": True}],
    "target": [{}, {"norm_pix_loss": True}, {"pca_components": 7}],
    "decoder": [{}, {"decoder": "cross"}, {"decoder": "cross", "predict_ratio": 0.5}],
    "depth": [{}, {"decoder_depth": 1}],
    "width": [{}, {"decoder_embed_dim": 32, "decoder_num_heads": 4}],
    "lscale": [{}, {"lscale_init": 0.1}],
    "offset": [{"pos_offset": name} for name in ("none", "center", "learned", "jitter")],
    "mask": [{"mask": name} for name in ("random", "mixed", "average", "block", "grid")],
    "ratio": [{"visible": count} for count in (2, 3, 5)],
}
PAIRS = list(itertools.combinations(FACTORS, 2))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_pair_trains_every_parameter(one: str, other: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 8, 12), generator=generator, dtype=torch.uint8)
    for a, b in itertools.product(FACTORS[one], FACTORS[other]):
        flags = {"mask": "random", "visible": VISIBLE} | a | b
        kind, visible = str(flags.pop("mask")), int(str(flags.pop("visible")))
        if flags.get("decoder") == "cross" and flags.get("encoder_mask_tokens"):
            with pytest.raises(BadInput, match="encoder_mask_tokens"):
                small(**flags)
            continue
        model = fitted(small(**flags).double())
        strategy = create_strategy(kind, avg_share=0.5, avg_order="far", avg_temperature=1.0)
        noise = torch.stack([strategy.draw((2, 3), generator) for _ in range(3)])
        mask = strategy.mask(noise, patch_averages(images, (4, 4)), visible)
        shift = torch.rand(3, 2, generator=generator) - 0.5
        out = model(
            images.double() / 100, mask, visible,
            shift if model.pos_offset == "jitter" else None, torch.rand(3, 6, generator=generator),
        )  # fmt: skip
        expected = model.num_predicted(visible)
        assert out["pred"].shape == (3, expected, model.pca_components or 48), flags
        assert out["loss"].ndim == 0 and out["loss"].isfinite(), flags
        out["loss"].backward()
        learning = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        # A single query's attention to a single token has no choice: nothing else may be silent.
        silent = [
            n for n, g in learning.items() if g is None or not g.any() or not g.isfinite().all()
        ]
        assert silent == [], flags


def test_compiles_as_one_graph() -> None:
    model = small(encoder_mask_tokens=True, pca_components=3, depth=1).double()
    images, mask = batch(model)
    fitted(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, mask, VISIBLE), model(images, mask, VISIBLE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pca_components": 49}, "48 values"),
        ({"pca_components": 0}, "pca_components 0"),
        ({"pca_components": 3, "norm_pix_loss": True}, "two targets"),
        ({"encoder_mask_tokens": True, "decoder": "cross"}, "needs decoder 'full'"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        small(**settings)


# ---- Runs --------------------------------------------------------------------------------------

SHORT = [*TINY, "--epochs=1", "--warmup_epochs=0", "--blr=1e-3"]
PCA_FLAGS = ["--target=pca", "--pca_components=6", "--pca_patches=320", "--encoder_mask_tokens"]


@pytest.mark.smoke
def test_a_run_and_all_that_follows_it(tmp_path: Path, run_main) -> None:
    flags = [*SHORT, *PCA_FLAGS, "--augment=crop_jitter", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_pretrain", [*flags, "--eval_every=1", "--eval_images=9"])
    assert code == 0, err
    assert "6 PCA coefficients of 48 values" in out and "320 training patches" in out
    path = tmp_path / "checkpoint-last.pth"
    state = load_file(path)
    assert state["model_args"]["pca_components"] == 6 and state["model_args"]["encoder_mask_tokens"]
    assert state["arithmetic"]["augment"] == "crop_jitter"
    # A resume keeps the fit, and refuses other settings.
    code, out, err = run_main("main_pretrain", flags)
    assert code == 0 and "PCA coefficients of" not in out, err
    code, _, err = run_main("main_pretrain", [*flags, "--augment=none"])
    assert code == 2 and "augment: was crop_jitter, is none" in err
    code, _, err = run_main("main_pretrain", [*flags, "--target=pixels"])
    assert code == 2 and "target: was pca, is pixels" in err

    model, _ = load_pretrained(str(path))
    torch.testing.assert_close(model.pca.basis, state["model"]["pca.basis"], rtol=0, atol=0)
    # The measurement of a checkpoint is the run's own, on its own set; and any other set's.
    words = [f"--checkpoint={path}", "--device=cpu", "--measure", "--num_images=9"]
    for name in ("synthetic", "photos"):
        where = tmp_path / name
        code, _, err = run_main(
            "main_visualize", [*words, f"--dataset={name}", f"--output_dir={where}"]
        )
        assert code == 0, err
    found = json.loads((tmp_path / "synthetic" / "reconstruction.json").read_text())
    own = records(tmp_path, "eval")[-1]
    for key in ("model_psnr", "model_ssim", "mean_psnr", "nearest_ssim"):
        assert found[key] == pytest.approx(own[key], rel=1e-12)
    assert run_main("main_visualize", [*words, "--images=."])[0] == 2

    pictures = ["--dataset=synthetic", f"--output_dir={tmp_path / 'pictures'}", "--device=cpu"]
    code, _, err = run_main("main_visualize", [f"--checkpoint={path}", *pictures])
    assert code == 0, err
    knn = ["--dataset=synthetic", "--num_workers=0", "--device=cpu", "--k=3"]
    code, _, err = run_main(
        "main_knn", [*knn, f"--checkpoint={path}", f"--output_dir={tmp_path / 'knn'}"]
    )
    assert code == 0, err
    encoder, _ = load_encoder(str(path))
    assert "encoder_mask_token" not in encoder.state_dict()
    assert torch.equal(encoder.state_dict()["blocks.0.attn.qkv.weight"],
                       state["model"]["blocks.0.attn.qkv.weight"])  # fmt: skip
    export = [f"--checkpoint={path}"]
    code, _, err = run_main("main_export", [*export, "--to=mmae", f"--output={tmp_path / 'a.pth'}"])
    assert code == 0, err
    code, _, err = run_main(
        "main_export", [*export, "--to=official", f"--output={tmp_path / 'b.pth'}"]
    )
    assert code == 2 and "mask token in the encoder" in err and "--part encoder" in err
    code, _, err = run_main("main_export", [*export, "--to=timm", f"--output={tmp_path / 'c.pth'}"])
    assert code == 0, err


@pytest.mark.smoke
def test_an_export_refuses_pca_where_it_has_no_place(tmp_path: Path, run_main) -> None:
    torch.manual_seed(0)
    arguments = {**SMALL, "img_size": [8, 8], "pca_components": 5, "in_chans": 3}
    model = fitted(MaskedAutoencoderViT(**arguments))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict(), "model_args": arguments}, path)
    words = [f"--checkpoint={path}", "--to=official", f"--output={tmp_path / 'x.pth'}"]
    code, _, err = run_main("main_export", words)
    assert code == 2 and "PCA" in err


@pytest.mark.smoke
@pytest.mark.parametrize("augment", AUGMENTS)
def test_every_augmentation_trains(augment: str, tmp_path: Path, run_main) -> None:
    flags = [*SHORT, f"--augment={augment}", "--batch_size=20", f"--output_dir={tmp_path}"]
    code, _, err = run_main("main_pretrain", [*flags, "--train_images=50"])
    assert code == 0, err
    losses = [r["loss"] for r in records(tmp_path, "train")]
    assert len(losses) == 2 and np.isfinite(losses).all()  # 50 images are 2 steps of 20


@pytest.mark.smoke
def test_the_last_name_of_a_target_counts(tmp_path: Path, run_main) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("norm_pix_loss: true\n")
    start = [*SHORT, "--batch_size=256", f"--config={recipe}"]
    for flags, target, normalised in (
        ([], "norm_pixels", True),
        (["--target=pixels"], "pixels", False),
        (["--target=pca", "--pca_components=4", "--norm_pix_loss"], "norm_pixels", True),
    ):
        out = tmp_path / f"{target}-{len(flags)}"
        code, _, err = run_main("main_pretrain", [*start, *flags, f"--output_dir={out}"])
        assert code == 0, err
        state = load_file(out / "checkpoint-last.pth")
        assert state["arithmetic"]["target"] == target
        assert state["model_args"]["norm_pix_loss"] is normalised
        assert state["model_args"]["pca_components"] is None
    again = tmp_path / "again"
    run_main("main_pretrain", [f"--config={tmp_path / 'pixels-1' / 'config.yaml'}",
                               f"--output_dir={again}"])  # fmt: skip
    assert load_file(again / "checkpoint-last.pth")["arithmetic"]["target"] == "pixels"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target=pca"], "48 values"),  # 4 x 4 x 3 of them, and 96 components
        (["--target=pca", "--pca_components=8", "--pca_patches=8"], "pca_patches"),
        (["--target=hog"], "invalid choice"),
        (["--decoder=cross", "--encoder_mask_tokens"], "encoder_mask_tokens"),
        (["--augment=crop_jitter", "--in_chans=5"], "5 channels"),
    ],
)
def test_bad_flags_are_explained(flags: list[str], message: str, tmp_path: Path, run_main) -> None:
    code, _, err = run_main("main_pretrain", [*SHORT, *flags, f"--output_dir={tmp_path / 'out'}"])
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
