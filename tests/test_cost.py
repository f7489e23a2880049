"""util/dry_run/cost.py beside what torch counts, keeps and writes: FLOPs, tensors, checkpoints."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import main_finetune
import main_pretrain
from engine_segment import PixelLoss
from lab.bench.step_speed import flop_counter
from models_protocols import blocks_of
from models_zoo import create_model, create_segmenter, model_arguments
from util.dry_run.cost import (
    HALF,
    Layer,
    autoencoder_layers,
    checkpoint_bytes,
    classifier_layers,
    cost_of,
    memory_of,
    numbered_checkpoints,
)
from util.dry_run.cost_upernet import segmenter_layers

MMAE = {"lscale_init": 0.1, "pos_offset": "learned"}
CROSS = {"decoder": "cross", "predict_ratio": 0.34}


def pretrain_cost(name: str, num_visible: int, flags: dict[str, Any], **rest: Any) -> Any:
    model = create_model(name, **flags)
    layers = autoencoder_layers(
        model_arguments(name) | flags, num_visible, model.num_predicted(num_visible)
    )
    return model, cost_of(layers, **rest)


def mask_of(model: Any, batch: int, num_visible: int) -> torch.Tensor:
    mask = torch.ones(batch, model.grid[0] * model.grid[1], dtype=torch.bool)
    mask[:, :num_visible] = False
    return mask


# ---- FLOPs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_visible", "flags"),
    [
        ("mae_vit_micro_patch8", 16, {}),
        ("mae_vit_micro_patch8", 16, MMAE),
        ("mae_vit_micro_patch8", 16, CROSS),
        ("mae_vit_micro_patch8", 32, {"decoder_depth": 1, "decoder_embed_dim": 192}),
        ("mae_vit_micro_patch8", 20, {"img_size": (96, 224), "in_chans": 4}),
    ],
)
def test_flops_of_pretraining_are_torchs(name: str, num_visible: int, flags: dict) -> None:
    with flop_counter() as counter:
        model, cost = pretrain_cost(name, num_visible, flags)
        images = torch.rand(1, model.in_chans, *model.img_size)
        order = torch.rand(1, model.grid[0] * model.grid[1])
        model(images, mask_of(model, 1, num_visible), num_visible, order=order)["loss"].backward()
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("tune", ["full", "linear", "partial:0.5", "partial:1", "partial:3"])
def test_flops_of_fine_tuning_are_torchs(tune: str) -> None:
    flags = {"num_classes": 10, "probe": tune == "linear"}
    flags["global_pool"] = "cls" if tune == "linear" else "avg"
    model = create_model("vit_micro_patch8", **flags)
    model.freeze_to(tune)
    model.train()
    with flop_counter() as counter:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    layers = classifier_layers(model_arguments("vit_micro_patch8") | flags, blocks_of(tune))
    assert cost_of(layers).total == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("flags", [{}, MMAE, CROSS])
def test_flops_with_activations_computed_again(flags: dict) -> None:
    model, cost = pretrain_cost("mae_vit_micro_patch8", 16, flags, grad_checkpointing=True)
    model.set_grad_checkpointing()
    with flop_counter() as counter:
        order = torch.rand(1, 64)
        model(torch.randn(1, 3, 64, 64), mask_of(model, 1, 16), 16, order=order)["loss"].backward()
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_mask_tokens_in_the_encoder_cost_the_papers_3_3() -> None:
    """MAE's ablation, ViT-L: 3.3 x the FLOPs; 4 x the encoder's tokens, the same decoder."""
    arguments = model_arguments("mae_vit_large_patch16")
    plain = cost_of(autoencoder_layers(arguments, 49)).total
    tokens = cost_of(autoencoder_layers(arguments | {"encoder_mask_tokens": True}, 49)).total
    assert tokens / plain == pytest.approx(3.3, abs=0.1)


def test_fewer_predicted_values_cost_less() -> None:
    """96 coefficients of a patch instead of 768 pixels: the last product, in its three passes."""
    arguments = model_arguments("mae_vit_large_patch16")
    whole = cost_of(autoencoder_layers(arguments, 49)).total
    fewer = cost_of(autoencoder_layers(arguments | {"pca_components": 96}, 49)).total
    assert whole - fewer == 3 * 2 * 147 * 512 * (768 - 96)


def segmenter(**flags: Any) -> Any:
    return create_segmenter("vit_micro_patch8", 7, channels=16, aux_channels=24, **flags).train()


def segmenter_cost(model: Any, **rest: Any) -> Any:
    return cost_of(segmenter_layers(model.arguments, model.neck.factors), **rest)


def pixel_loss(model: Any, batch: int) -> torch.Tensor:
    h, w = model.arguments["img_size"]
    label = torch.zeros(batch, h, w, dtype=torch.uint8)
    return PixelLoss()(model(torch.randn(batch, 3, h, w)), label, torch.tensor(1.0))


@pytest.mark.parametrize(
    "flags", [{}, {"lscale_init": 1.0}, {"img_size": (32, 80)}, {"patch_size": 16}]
)
def test_flops_of_segmentation_are_torchs(flags: dict) -> None:
    """Patches of 16 have a neck that enlarges 4 times, those of 8 one that does so twice."""
    model = segmenter(**flags)
    with flop_counter() as counter:
        pixel_loss(model, 2).backward()
    assert segmenter_cost(model).total == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


# ---- Activations -------------------------------------------------------------------------------


def saved_bytes(model: Any, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of what autograd keeps, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def per_image(model: Any, forward: Callable[[int], torch.Tensor]) -> tuple[float, float]:
    """(bytes of each image, bytes whatever the batch), from batches of 2 and 6."""
    few, many = (saved_bytes(model, lambda n=n: forward(n)) for n in (2, 6))
    return (many - few) / 4, few - (many - few) / 2


def autocast(precision: str) -> Any:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [{}, MMAE, CROSS, {"decoder_depth": 1}])
def test_activations_of_pretraining_are_measured_ones(flags: dict, precision: str) -> None:
    model, cost = pretrain_cost("mae_vit_micro_patch8", 16, flags, precision=precision)

    def forward(batch: int) -> torch.Tensor:
        images, order = torch.randn(batch, 3, 64, 64), torch.rand(batch, 64)
        with autocast(precision):
            return model(images, mask_of(model, batch, 16), 16, order=order)["loss"]

    each, fixed = per_image(model, forward)
    assert cost.activations == pytest.approx(each, rel=0.2)  # the promise; measured: within 1 %
    if precision == "bf16":
        assert cost.copies == pytest.approx(fixed, rel=0.2)


@pytest.mark.parametrize("tune", ["full", "linear", "partial:0.5", "partial:2"])
def test_activations_of_fine_tuning_are_measured_ones(tune: str) -> None:
    flags = {"num_classes": 10, "probe": tune == "linear"}
    flags["global_pool"] = "cls" if tune == "linear" else "avg"
    model = create_model("vit_micro_patch8", **flags, drop_path=0.1)
    model.freeze_to(tune)
    model.train()
    layers = classifier_layers(model_arguments("vit_micro_patch8") | flags, blocks_of(tune))
    labels = torch.zeros(6, dtype=torch.long)
    each, _ = per_image(
        model, lambda n: F.cross_entropy(model(torch.randn(n, 3, 64, 64)), labels[:n])
    )
    assert cost_of(layers).activations == pytest.approx(each, rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [{}, {"relative_bias": True, "lscale_init": 1.0}])
def test_activations_of_segmentation_are_measured_ones(flags: dict, precision: str) -> None:
    model = segmenter(**flags, patch_size=16, img_size=128)
    cost = segmenter_cost(model, precision=precision)

    def forward(batch: int) -> torch.Tensor:
        with autocast(precision):
            return pixel_loss(model, batch)

    each, fixed = per_image(model, forward)
    if precision == "bf16":
        assert cost.copies + cost.shared == pytest.approx(fixed, rel=0.2)
    assert cost.activations == pytest.approx(each, rel=0.2)  # measured: within 12 %


def test_activation_checkpointing_keeps_entries_and_one_block() -> None:
    """What is left is each block's input, what is outside of blocks, and the largest block."""
    model, whole = pretrain_cost("mae_vit_micro_patch8", 16, {})
    _, less = pretrain_cost("mae_vit_micro_patch8", 16, {}, grad_checkpointing=True)
    model.set_grad_checkpointing()
    inputs: list[int] = []

    def note(block: Any, given: tuple) -> None:
        inputs.append(given[0].untyped_storage().nbytes())

    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_pre_hook(note)
    batch = 4
    outside = saved_bytes(
        model, lambda: model(torch.randn(batch, 3, 64, 64), mask_of(model, batch, 16), 16)["loss"]
    )
    # The largest block, alone: an encoder block, 17 tokens of 128, or a decoder's, 65 of 96.
    model.set_grad_checkpointing(False)
    x = torch.randn(batch, 65, 96, requires_grad=True)
    block = saved_bytes(model.decoder_blocks[0], lambda: model.decoder_blocks[0](x).sum())
    measured = (outside + sum(inputs[: len(model.blocks) + len(model.decoder_blocks)]) + block) / 4
    assert less.activations == pytest.approx(measured, rel=0.2)
    assert less.activations < whole.activations


# ---- Parameters and files ----------------------------------------------------------------------


def test_memory_adds_up() -> None:
    cost = cost_of(
        [Layer("encoder", products=8, narrow=100, block=0, weights=50)], precision="bf16"
    )
    memory = memory_of(
        cost, batch_size=3, image_values=7, parameters=50, learning=40, optimizer="adamw",
        averages=True,
    )  # fmt: skip
    assert memory.activations == 3 * 100 * HALF and memory.copies == 50 * HALF
    assert (memory.weights, memory.gradients, memory.optimizer) == (200, 160, 320)
    assert memory.total == 300 * 2 + 100 + 200 + 160 + 320 + 200 + 3 * 7 * 5


TINY = [
    "--dataset=digits", "--input_size=16", "--batch_size=30", "--warmup_epochs=1",
    "--num_workers=0", "--device=cpu", "--epochs=5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("every", "keep", "files"), [(2, 0, 3), (2, 1, 1), (0, 0, 1), (5, 2, 1), (1, 2, 2), (1, 0, 5)]
)
def test_files_of_five_epochs_are_by_hand(every: int, keep: int, files: int) -> None:
    assert numbered_checkpoints(5, every, keep) == files


def test_disk_is_what_a_run_leaves(tmp_path: Path, few) -> None:
    flags = [*TINY, "--model=mae_vit_micro_patch4", "--picture_every=0", f"--output_dir={tmp_path}"]
    flags += ["--save_every=2", "--keep=2"]
    main_pretrain.main(flags)
    plan = main_pretrain.plan_run(parsed(flags), 1)
    files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*.pth")}
    assert len(files) == numbered_checkpoints(5, 2, 2) == 2
    for size in files.values():  # names, settings and checksums come on top of the numbers
        assert plan.checkpoint <= size <= plan.checkpoint + 150_000


def parsed(flags: list[str]) -> Any:
    found = main_pretrain.build_parser().parse(flags)
    return found


def test_disk_with_averaged_weights(tmp_path: Path, few) -> None:
    flags = [*TINY, "--model=vit_micro_patch4", f"--output_dir={tmp_path}", "--eval_every=0"]
    main_finetune.main([*flags, "--epochs=1", "--ema_decay=0.9"])
    size = (tmp_path / "checkpoint-last.pth").stat().st_size
    model = create_model("vit_micro_patch4", num_classes=10, img_size=16, in_chans=1)
    numbers = sum(p.numel() for p in model.parameters())
    expected = checkpoint_bytes(numbers, numbers, "adamw", averages=True)
    assert expected <= size <= expected + 150_000
