"""Each switch of a model does what it says, where it says, and no more; over the registries."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_draw import FLAGS, Knobs, command, pretended
from timm.layers import DropPath
from timm.models.vision_transformer import Block, LayerScale
from tiny import names_of
from torch import Tensor, nn

from models_decoders import CrossBlock
from models_mmae import DECODERS, MaskedAutoencoderViT
from models_vit import VisionTransformer
from models_zoo import create_model, create_segmenter, model_arguments
from util.mask.patches import patch_statistics, patchify
from util.mask.pos_embed import sincos_2d

EXACT = {"rtol": 1e-9, "atol": 1e-11}
# Those that are quick to make; the others differ in width and depth alone.
WIDEST = 192


def small(kind: type) -> list[str]:
    return [name for name in names_of(kind) if model_arguments(name)["embed_dim"] <= WIDEST]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Rounding hides no fault."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def autoencoder(name: str = "mae_vit_micro_patch4", seed: int = 0, **more: Any) -> Any:
    """One of 2 x 3 patches and three blocks, with a decoder of two."""
    patch = model_arguments(name)["patch_size"]
    sizes = {"img_size": (2 * patch, 3 * patch), "depth": 3, "decoder_depth": 2}
    torch.manual_seed(seed)
    model = create_model(name, **sizes | more)
    if model.target_name == "pca":
        values = len(model.pca.mean)
        basis = torch.linalg.qr(torch.randn(values, values)).Q[:, : model.pca_components]
        model.pca.set(torch.randn(values), basis)
    return model


def classifier(name: str = "vit_micro_patch4", seed: int = 0, **more: Any) -> Any:
    patch = model_arguments(name)["patch_size"]
    torch.manual_seed(seed)
    sizes = {"img_size": (2 * patch, 3 * patch), "depth": 4, "num_classes": 5}
    return create_model(name, **sizes | more)


def segmenter(name: str = "vit_micro_patch8", seed: int = 0, **more: Any) -> Any:
    patch = model_arguments(name)["patch_size"]
    torch.manual_seed(seed)
    sizes = {"img_size": 4 * patch, "depth": 4, "channels": 16, "aux_channels": 16}
    return create_segmenter(name, 5, **sizes | more)


def images_for(model: Any, B: int = 2) -> Tensor:
    size = getattr(model, "img_size", None) or model.encoder.img_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, model.in_chans, *size, generator=generator)


def mask_for(B: int = 2, visible: int = 2, L: int = 6) -> Tensor:
    return torch.rand(B, L, generator=torch.Generator().manual_seed(2)).argsort(1) >= visible


def loss_of(model: Any, B: int = 2) -> Tensor:
    """A number that every output has a part in."""
    images = images_for(model, B)
    if isinstance(model, MaskedAutoencoderViT):
        return model(images, mask_for(B), 2)["loss"]
    output = model(images)
    parts = output.values() if isinstance(output, dict) else [output]
    return sum(part.sin().sum() for part in parts)


def blocks_in(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks, wherever a model keeps them."""
    return [m for m in model.modules() if isinstance(m, Block | CrossBlock)]


# Every model that is quick to make, with each decoder, and the ways to make it.
MODELS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    **{f"{n} {d}": (autoencoder, n, {"decoder": d})
       for n in small(MaskedAutoencoderViT) for d in DECODERS},
    **{n: (classifier, n, {"drop_path": 0.5}) for n in small(VisionTransformer)},
    **{f"{n} segmenter": (segmenter, n, {"drop_path": 0.5, "dropout": 0.5, "relative_bias": True})
       for n in small(VisionTransformer)},
}  # fmt: skip


# ---- Activations computed again ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_computes_every_block_again(name: str) -> None:
    """Counted, and with the same gradients, whatever a block draws."""
    make, model_name, settings = MODELS[name]
    model = make(model_name, **settings).train()
    blocks = blocks_in(model)
    counts = [0] * len(blocks)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(count(number))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = []
    for enable, times in ((False, 1), (True, 2), (False, 1)):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        counts[:] = [0] * len(blocks)
        torch.manual_seed(5)
        loss = loss_of(model)
        assert counts == [1] * len(blocks)
        loss.backward()
        assert counts == [times] * len(blocks)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)
    # Nothing is computed twice where there is no backward pass.
    model.set_grad_checkpointing(True)
    counts[:] = [0] * len(blocks)
    with torch.no_grad():
        loss_of(model.eval())
    assert counts == [1] * len(blocks)


# ---- What is dropped ---------------------------------------------------------------------------

DROPPING = {name: entry for name, entry in MODELS.items() if entry[0] is not autoencoder}


@contextmanager
def dropped_shares(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[list[float]]:
    """Shares of what each layer of these kinds sets to 0, and how much it multiplies the rest."""
    found: list[float] = []

    def see(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        axes = (0, 1) if isinstance(layer, nn.Dropout2d) else (0,)
        others = [a for a in range(output.ndim) if a not in axes]
        before, after = (x.abs().amax(others) for x in (inputs[0], output))
        there = before > 0  # a channel may be 0 by itself
        found.append(float((after[there] == 0).double().mean()))
        kept = there & (after > 0)
        factors = (after / before)[kept]
        rate = getattr(layer, "drop_prob", getattr(layer, "p", 0.0))
        expected = 1 / (1 - rate) if layer.training else 1.0
        torch.testing.assert_close(factors, torch.full_like(factors, expected))

    layers = [m for m in model.modules() if isinstance(m, kinds)]
    handles = [layer.register_forward_hook(see) for layer in layers]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", DROPPING)
def test_drop_path_rises_from_block_to_block_and_trains_alone(name: str) -> None:
    make, model_name, settings = DROPPING[name]
    still = {"dropout": 0.0} if make is segmenter else {}
    model = make(model_name, **settings | still | {"drop_path": 0.6})
    blocks = blocks_in(model)
    layers = [[m for m in block.modules() if isinstance(m, DropPath)] for block in blocks]
    for number, found in enumerate(layers):
        rate = 0.6 * number / (len(blocks) - 1)
        # Of attention and of the MLP; where nothing is dropped there need be no layer.
        assert [m.drop_prob for m in found if m.drop_prob] == pytest.approx([rate] * 2 * (rate > 0))
    with dropped_shares(model.train(), (DropPath,)) as shares:
        loss_of(model, B=64)
    expected = [0.6 * i / (len(blocks) - 1) for i in range(1, len(blocks)) for _ in range(2)]
    assert [s for s in shares if s] == pytest.approx(
        expected, abs=0.25
    )  # of 64 images; the factors are exact
    without = make(model_name, **settings | still | {"drop_path": 0.0})
    without.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model.eval()), loss_of(without.eval()))
    if make is classifier:
        assert torch.equal(loss_of(without.train()), loss_of(without.eval()))
        assert not torch.equal(loss_of(model.train()), loss_of(model.eval()))


@pytest.mark.parametrize("name", small(VisionTransformer))
def test_both_heads_drop_channels_in_training_alone(name: str) -> None:
    model = segmenter(name, dropout=0.4)
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
    assert [m.p for m in layers] == [0.4, 0.4]
    with dropped_shares(model.train(), (nn.Dropout2d,)) as shares:
        found = model(images_for(model, B=32))
    assert found.keys() == {"logits", "aux"}
    assert shares == pytest.approx([0.4, 0.4], abs=0.1)  # 32 images of 16 channels
    with dropped_shares(model.eval(), (nn.Dropout2d,)) as shares:
        found = model(images_for(model))
    assert found.keys() == {"logits"} and shares == [0.0]
    without = segmenter(name, dropout=0.0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(found["logits"], without.eval()(images_for(model))["logits"])


@pytest.mark.parametrize("name", [n for n in MODELS if n not in DROPPING])
def test_pretraining_drops_nothing(name: str) -> None:
    make, model_name, settings = MODELS[name]
    model = make(model_name, **settings)
    for layer in model.modules():
        assert not getattr(layer, "drop_prob", 0.0)
        assert not (isinstance(layer, nn.Dropout) and layer.p)
    assert torch.equal(loss_of(model.train()), loss_of(model.eval()))


# ---- Positions: shifts and phases reach the encoder and each decoder ---------------------------

FORMS = [{"decoder": "full"}, {"decoder": "cross"}, {"encoder_mask_tokens": True}]


def with_codes(model: Any, still: Any, **code: Any) -> Any:
    """`still`, a model of fixed codes, with the weights of another and codes of its own."""
    weights = {k: v for k, v in model.state_dict().items() if k in still.state_dict()}
    still.load_state_dict(weights)
    for part in ("encoder", "decoder"):
        fixed = still.pos_embed if part == "encoder" else still.decoder_pos_embed
        own = {k: v[part] if isinstance(v, dict) else v for k, v in code.items()}
        found = sincos_2d(fixed.shape[-1], still.grid, "center", **own)
        fixed.data[0, 1:] = found if found.ndim == 2 else found[0]
    return still


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_shift_of_jitter_reaches_encoder_and_decoder(form: dict[str, Any]) -> None:
    model = autoencoder(pos_offset="jitter", **form)
    images, mask = images_for(model, B=3), mask_for(3)
    shift = torch.rand(3, 2, generator=torch.Generator().manual_seed(3)) - 0.5
    pred = model(images, mask, 2, shift)["pred"]
    for i in range(3):
        still = autoencoder(pos_offset="center", **form)
        rows = slice(i, i + 1)
        expected = with_codes(model, still, shift=shift[rows])(images[rows], mask[rows], 2)["pred"]
        torch.testing.assert_close(pred[rows], expected, **EXACT)
        for fixed in (still.pos_embed, still.decoder_pos_embed):  # either alone is not enough
            kept = fixed.clone()
            fixed.data[0, 1:] = sincos_2d(fixed.shape[-1], still.grid, "center")
            other = still(images[rows], mask[rows], 2)["pred"]
            assert (other - expected).abs().max() > 1e-4
            fixed.data.copy_(kept)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_learned_phases_reach_encoder_and_decoder(form: dict[str, Any]) -> None:
    model = autoencoder(pos_offset="learned", **form)
    for phase in (model.pos_phase, model.decoder_pos_phase):
        nn.init.normal_(phase)
    images, mask = images_for(model), mask_for()
    phases = {"encoder": model.pos_phase.detach(), "decoder": model.decoder_pos_phase.detach()}
    still = with_codes(model, autoencoder(pos_offset="center", **form), phase=phases)
    expected = still(images, mask, 2)["pred"]
    torch.testing.assert_close(model(images, mask, 2)["pred"], expected, **EXACT)


# ---- The other switches of pretraining -----------------------------------------------------------


def seen_of(model: Any, order: Tensor | None = None) -> dict[str, Any]:
    """Loss, predictions and how many tokens the first block of the encoder sees."""
    tokens: list[int] = []
    handle = blocks_in(model)[0].register_forward_pre_hook(
        lambda _, x: tokens.append(x[0].shape[1])
    )
    with torch.no_grad():
        out = model(images_for(model), mask_for(), 2, None, order)
    handle.remove()
    return {"loss": out["loss"], "pred": out["pred"], "tokens": tokens[0]}


def changed(a: Any, b: Any) -> tuple[set[str], set[str]]:
    """Names that only one of two models has, and those whose values differ."""
    one, other = a.state_dict(), b.state_dict()
    both = one.keys() & other.keys()
    return one.keys() ^ other.keys(), {n for n in both if not torch.equal(one[n], other[n])}


@pytest.mark.parametrize("decoder", DECODERS)
def test_lscale_scales_every_branch(decoder: str) -> None:
    plain, scaled = autoencoder(decoder=decoder), autoencoder(decoder=decoder, lscale_init=0.1)
    new, other = changed(plain, scaled)
    scales = [m for m in scaled.modules() if isinstance(m, LayerScale)]
    assert len(scales) == len(new) == 2 * len(blocks_in(scaled)) and not other
    assert all((m.gamma == 0.1).all() for m in scales)
    assert (seen_of(plain)["pred"] - seen_of(scaled)["pred"]).abs().max() > 1e-3
    for scale in scales:  # of each branch its own
        before = seen_of(scaled)["pred"]
        scale.gamma.data *= 3
        assert (seen_of(scaled)["pred"] - before).abs().max() > 1e-6


@pytest.mark.parametrize("decoder", DECODERS)
def test_branch_init_shrinks_the_last_weights_of_branches(decoder: str) -> None:
    plain, begun = autoencoder(decoder=decoder), autoencoder(decoder=decoder, branch_init=0.1)
    new, other = changed(plain, begun)
    assert not new and len(other) == 2 * len(blocks_in(plain))
    for a, b in zip(blocks_in(plain), blocks_in(begun), strict=True):
        for last in (lambda block: block.attn.proj, lambda block: block.mlp.fc2):
            torch.testing.assert_close(last(b).weight, last(a).weight * 0.1)


@pytest.mark.parametrize("decoder", DECODERS)
def test_targets_change_the_loss_and_not_the_rest(decoder: str) -> None:
    plain = autoencoder(decoder=decoder)
    images, mask = images_for(plain), mask_for()
    hidden = patchify(images, plain.patch_size)[mask].reshape(2, 4, -1)
    mean, std = patch_statistics(hidden)
    normal = autoencoder(decoder=decoder, norm_pix_loss=True)
    assert changed(plain, normal) == (set(), set())
    a, b = seen_of(plain), seen_of(normal)
    assert torch.equal(a["pred"], b["pred"])
    torch.testing.assert_close(a["loss"], (a["pred"] - hidden).square().mean(), **EXACT)
    target = (hidden - mean) / std
    torch.testing.assert_close(b["loss"], (b["pred"] - target).square().mean(), **EXACT)
    assert abs(a["loss"] - b["loss"]) > 1e-3

    reduced = autoencoder(decoder=decoder, pca_components=7)
    found = seen_of(reduced)
    assert found["pred"].shape == (2, 4, 7)
    target = (hidden - reduced.pca.mean) @ reduced.pca.basis
    torch.testing.assert_close(found["loss"], (found["pred"] - target).square().mean(), **EXACT)


def test_a_share_is_predicted_where_an_order_is_given() -> None:
    whole, part = (autoencoder(decoder="cross", predict_ratio=ratio) for ratio in (1.0, 0.5))
    assert changed(whole, part) == (set(), set())
    order = torch.rand(2, 6, generator=torch.Generator().manual_seed(4))
    every = seen_of(whole, order)
    assert every["pred"].shape[1] == 4 and torch.equal(seen_of(part)["pred"], every["pred"])
    found = seen_of(part, order)
    for i, hidden in enumerate(mask_for()):
        ids = hidden.nonzero().flatten()
        first = order[i, ids].argsort()[:2].sort().values
        torch.testing.assert_close(found["pred"][i], every["pred"][i, first], **EXACT)
    assert not torch.equal(found["loss"], every["loss"])


def test_mask_tokens_are_in_the_encoder_or_in_the_decoder() -> None:
    plain, seeing = autoencoder(), autoencoder(encoder_mask_tokens=True)
    assert (seen_of(plain)["tokens"], seen_of(seeing)["tokens"]) == (1 + 2, 1 + 6)
    new, _ = changed(plain, seeing)
    assert new == {"mask_token", "encoder_mask_token"}
    for model, name in ((plain, "mask_token"), (seeing, "encoder_mask_token")):
        before = seen_of(model)["pred"]
        getattr(model, name).data += torch.randn_like(getattr(model, name))
        assert (seen_of(model)["pred"] - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_has_biases_that_count(name: str) -> None:
    """Those of queries and values; one of keys adds the same to all of a query's scores."""
    make, model_name, settings = MODELS[name]
    settings = {k: v for k, v in settings.items() if k in ("decoder", "relative_bias")}
    model = make(model_name, **settings).eval()
    before, generator = loss_of(model), torch.Generator().manual_seed(6)
    for block in blocks_in(model):
        if isinstance(block, CrossBlock):
            biases = [block.attn.q.bias, block.attn.kv.bias.chunk(2)[1]]
            keys = block.attn.kv.bias.chunk(2)[0]
        else:
            q, keys, v = block.attn.qkv.bias.chunk(3)
            biases = [q, v]
        for bias, counts in [(b, True) for b in biases] + [(keys, False)]:
            kept = bias.detach().clone()
            bias.data += torch.randn(bias.shape, generator=generator)
            difference = (loss_of(model) - before).abs()
            assert (difference > 1e-9) == counts, (type(block).__name__, counts)
            bias.data.copy_(kept)


# ---- Classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small(VisionTransformer))
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_pooling_and_its_norm(name: str, pool: str) -> None:
    """avg: the mean of the patches, then `fc_norm`; cls: `norm`, then the class token."""
    model = classifier(name, global_pool=pool).eval()
    own, unused = (model.fc_norm, model.norm) if pool == "avg" else (model.norm, model.fc_norm)
    assert isinstance(own, nn.LayerNorm) and isinstance(unused, nn.Identity)
    nn.init.normal_(own.weight)
    nn.init.normal_(own.bias)
    images, outputs = images_for(model), []
    blocks_in(model)[-1].register_forward_hook(lambda _, __, x: outputs.append(x))
    logits = model(images)
    tokens = outputs[0]
    count = model.cls_tokens
    # A norm is not linear: before or after the mean of several class tokens is not the same.
    classes = tokens[:, :count]
    pooled = own(tokens[:, count:].mean(1)) if pool == "avg" else own(classes).mean(1)
    torch.testing.assert_close(logits, model.head(pooled), **EXACT)
    # Features of either kind are normalised by the norm that the model has.
    patches = own(tokens[:, count:].mean(1)) if pool == "avg" else own(tokens)[:, count:].mean(1)
    first = own(classes.mean(1)) if pool == "avg" else own(classes).mean(1)
    torch.testing.assert_close(model.features(images, "avg"), patches, **EXACT)
    torch.testing.assert_close(model.features(images, "cls"), first, **EXACT)
    both = torch.cat([first, patches], dim=1)
    torch.testing.assert_close(model.features(images, "both"), both, **EXACT)


def test_switches_of_a_classifier() -> None:
    plain = classifier()
    probe, scaled, bare = (
        classifier(**more) for more in ({"probe": True}, {"lscale_init": 0.3}, {"num_classes": 0})
    )
    assert [type(m).__name__ for m in probe.head] == ["GlobalBatchNorm", "Linear"]
    assert not list(probe.head[0].parameters())  # without affine
    scales = [m for m in scaled.modules() if isinstance(m, LayerScale)]
    assert len(scales) == 2 * len(blocks_in(scaled)) and all((m.gamma == 0.3).all() for m in scales)
    assert bare(images_for(bare)).shape == (2, bare.num_features)
    assert not any(isinstance(m, LayerScale) for m in plain.modules())


# ---- Handed on by the mains ----------------------------------------------------------------------


def trained_model(name: str, folder: Path, *flags: str) -> Any:
    """The model that a main is about to train."""
    main, found = importlib.import_module(name), []

    def train(model: nn.Module, *rest: Any, **more: Any) -> int:
        found.append(model)
        raise KeyboardInterrupt

    torch.set_default_dtype(torch.float32)
    with pretended(main, "flat", 1, 0) as patch, pytest.raises(SystemExit):
        patch.setattr(main, "train_steps", train)
        main.main([*command(name, Knobs(), folder, ()), *flags])
    return found[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file to fine-tune from."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save({"model": create_model("mae_vit_micro_patch8").float().state_dict()}, path)
    return str(path)


@pytest.mark.parametrize("start", ["scratch", "file"])
@pytest.mark.parametrize("name", ["main_finetune", "main_segment"])
def test_mains_hand_on_what_is_dropped(name: str, start: str, weights: str, tmp_path: Path) -> None:
    assert "--model=vit_micro_patch8" in FLAGS[name]
    flags = ["--drop_path=0.3", *([f"--finetune={weights}"] if start == "file" else [])]
    if name == "main_segment":
        flags.append("--dropout=0.45")
    model = trained_model(name, tmp_path, *flags)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert [r for r in rates if r] == pytest.approx([r for r in (0.1, 0.2, 0.3) for _ in range(2)])
    channels = [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)]
    assert channels == ([0.45, 0.45] if name == "main_segment" else [])


@pytest.mark.parametrize("name", FLAGS)
def test_mains_hand_on_checkpointing(name: str, tmp_path: Path) -> None:
    for enable in (False, True):
        flags = ["--grad_checkpointing"] if enable else []
        model = trained_model(name, tmp_path / str(enable), *flags).train().double()
        torch.set_default_dtype(torch.float64)
        if isinstance(model, MaskedAutoencoderViT):
            loss = model(images_for(model), mask_for(L=4), 2)["loss"]
        else:
            loss = loss_of(model)
        counts: list[int] = []
        for block in blocks_in(model):
            block.register_forward_pre_hook(lambda *_, counts=counts: counts.append(1))
        loss.backward()
        assert len(counts) == (len(blocks_in(model)) if enable else 0)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("start", ["scratch", "file"])
def test_finetuning_hands_on_the_pooling(
    pool: str, start: str, weights: str, tmp_path: Path
) -> None:
    flags = [f"--global_pool={pool}", *([f"--finetune={weights}"] if start == "file" else [])]
    model = trained_model("main_finetune", tmp_path, *flags)
    assert isinstance(model.fc_norm, nn.LayerNorm) == (pool == "avg")


SWITCHES: dict[str, tuple[list[str], Callable[[Any], Any], Any]] = {
    "lscale": (["--lscale_init=0.25"], lambda m: m.blocks[0].ls1.gamma[0].item(), 0.25),
    "branches": (["--branch_init=0", "--method=mae"],
                 lambda m: m.blocks[0].mlp.fc2.weight.abs().max().item(), 0.0),
    "offset": (["--pos_offset=jitter"], lambda m: m.pos_offset, "jitter"),
    "decoder": (["--decoder=cross"], lambda m: m.decoder, "cross"),
    "share": (["--decoder=cross", "--predict_ratio=0.3"], lambda m: m.predict_ratio, 0.3),
    "tokens": (["--encoder_mask_tokens"], lambda m: m.encoder_mask_tokens, True),
    "target": (["--norm_pix_loss"], lambda m: m.norm_pix_loss, True),
    "depth": (["--decoder_depth=3"], lambda m: len(m.decoder_blocks), 3),
    "width": (["--decoder_embed_dim=64"], lambda m: m.mask_token.shape[-1], 64),
    "heads": (["--decoder_num_heads=2"], lambda m: m.decoder_blocks[0].attn.num_heads, 2),
    "patches": (["--patch_size=4"], lambda m: m.grid, (4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_pretraining_hands_on_its_switches(switch: str, tmp_path: Path) -> None:
    flags, read, expected = SWITCHES[switch]
    assert read(trained_model("main_pretrain", tmp_path, *flags)) == pytest.approx(expected)
