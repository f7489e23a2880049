"""util/dry_run/cost.py beside torch on real tensors, hand-worked numbers, and what runs write."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import main_finetune
import main_pretrain
import plan_finetune
import plan_pretrain
import plan_segment
from engine_segment import PixelLoss
from lab.bench.step_speed import flop_counter
from models_zoo import create_model, create_segmenter
from util.dry_run.cost import (
    Cost,
    checkpoint_bytes,
    count_forward,
    count_step,
    estimate_memory,
    numbered_checkpoints,
)

MMAE = {"lscale_init": 0.1, "pos_offset": "learned"}
CROSS = {"decoder": "cross", "predict_ratio": 0.34}


def pretrain_loss(num_visible: int) -> Callable[[Any, int], torch.Tensor]:
    return partial(plan_pretrain.drawn_loss, num_visible=num_visible)


def segment_loss(model: Any) -> Callable[[Any, int], torch.Tensor]:
    size = tuple(model.arguments["img_size"])
    return partial(plan_segment.drawn_loss, size=size, loss=PixelLoss())


def classifier(tune: str, name: str = "vit_micro_patch8", **flags: Any) -> Any:
    flags |= {"probe": tune == "linear", "global_pool": "cls" if tune == "linear" else "avg"}
    model = create_model(name, **flags)
    model.freeze_to(tune)
    return model.train()


def segmenter(**flags: Any) -> Any:
    return create_segmenter("vit_micro_patch8", 7, channels=16, aux_channels=24, **flags).train()


# ---- What was true before, by formulas that are gone ---------------------------------------------
# FLOPs of an image, bytes of its activations, and bytes of copies of weights, in millions. Of
# checkpointed activations the formula was wrong: it summed what is never there at once.


@pytest.mark.parametrize(
    ("size", "num_visible", "forward", "backward", "again", "fp32", "bf16", "copies"),
    [
        ("base_patch16", 49, 19067.2, 38430.6, 51253.6, 82.3313, 46.9454, 221.774),
        ("large_patch16", 49, 40958.7, 82271.1, 109718, 131.643, 74.7278, 656.146),
        ("huge_patch14", 64, 96420.7, 193615, 258300, 239.394, 135.470, 1310.54),
    ],
)
def test_pretraining_costs_what_it_did(
    size: str,
    num_visible: int,
    forward: float,
    backward: float,
    again: float,
    fp32: float,
    bf16: float,
    copies: float,
) -> None:
    with torch.device("meta"):
        model = create_model(f"mae_vit_{size}")
    for precision, activations, narrow in (("fp32", fp32, 0), ("bf16", bf16, copies)):
        cost = count_step(model, pretrain_loss(num_visible), batch_size=64, precision=precision)
        assert cost.forward == pytest.approx(forward * 1e6, rel=0.02)
        assert cost.backward == pytest.approx(backward * 1e6, rel=0.02)
        assert cost.activations == pytest.approx(activations * 1e6, rel=0.02)
        assert cost.copies == pytest.approx(narrow * 1e6, rel=0.02)
        assert cost.shared < 1000
    cost = count_step(
        model, pretrain_loss(num_visible), batch_size=64, precision="bf16", grad_checkpointing=True
    )
    assert cost.forward == pytest.approx(forward * 1e6, rel=0.02)
    assert cost.backward == pytest.approx(again * 1e6, rel=0.02)


def test_checkpointed_pretraining_at_its_fullest_moment() -> None:
    """ViT-B: when the decoder's last whole block has been computed again, 197 tokens of 512.

    The formula had 13.5065 MB. It counted what that block reads twice, and what was freed before:
    of 147 tokens what norm and last product read, prediction and target of 768 values, and the
    input of the last block.
    """
    with torch.device("meta"):
        model = create_model("mae_vit_base_patch16")
    cost = count_step(model, pretrain_loss(49), batch_size=64, grad_checkpointing=True)
    freed = 2 * 147 * 512 + 2 * 147 * 768 + 197 * 512
    assert cost.activations == pytest.approx(13.5065e6 - 4 * (197 * 512 + freed), rel=0.001)


def test_copies_of_weights_are_there_until_the_forward_pass_ends() -> None:
    """Checkpointed blocks copy their weights anew: in the backward pass one block's are there.

    With few images the end of the forward pass is the fullest moment, with all copies.
    """
    with torch.device("meta"):
        model = create_model("mae_vit_base_patch16")
    rest = {"precision": "bf16", "grad_checkpointing": True}
    few, many = (count_step(model, pretrain_loss(49), batch_size=n, **rest) for n in (2, 512))
    assert few.copies == pytest.approx(221.774e6, rel=0.02)
    assert many.copies < few.copies / 10 and many.activations > few.activations


@pytest.mark.parametrize(
    ("tune", "backward", "attention", "fp32", "bf16"),
    [
        ("full", 70739.4, 5007.29, 116.959, 65.8208),
        ("linear", 1.536, 1430.65, 0.007072, 0.005536),
        ("partial:4", 23504.8, 2622.87, 38.7924, 21.8457),
    ],
)
def test_fine_tuning_costs_what_it_did(
    tune: str, backward: float, attention: float, fp32: float, bf16: float
) -> None:
    with torch.device("meta"):
        model = classifier(tune, "vit_base_patch16", num_classes=1000)
    for precision, activations in (("fp32", fp32), ("bf16", bf16)):
        cost = count_step(model, plan_finetune.drawn_loss, batch_size=32, precision=precision)
        assert cost.forward == pytest.approx(35127.7e6, rel=0.02)
        assert cost.backward == pytest.approx(backward * 1e6, rel=0.02)
        assert cost.attention == pytest.approx(attention * 1e6, rel=0.02)
        assert cost.activations == pytest.approx(activations * 1e6, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "activations", "copies", "shared"),
    [("fp32", 1811.23, 0, 605.160), ("bf16", 1102.92, 323.531, 302.58)],
)
def test_segmentation_costs_what_it_did(
    precision: str, activations: float, copies: float, shared: float
) -> None:
    """The recipe's model: relative biases, one of a block for all images, and LScale."""
    with torch.device("meta"):
        model = create_segmenter(
            "vit_base_patch16", 150, img_size=512, relative_bias=True, lscale_init=1.0
        )
    cost = count_step(model, segment_loss(model), batch_size=2, precision=precision)
    assert cost.forward == pytest.approx(1213.63e9, rel=0.02)
    assert cost.backward == pytest.approx(2445.41e9, rel=0.02)
    assert cost.attention == pytest.approx(135.556e9, rel=0.02)
    assert cost.activations == pytest.approx(activations * 1e6, rel=0.02)
    assert cost.copies == pytest.approx(copies * 1e6, rel=0.02)
    # The formula had no table of which bias a pair of tokens has, int64 [N, N].
    assert cost.shared == pytest.approx(shared * 1e6 + 8 * 1025**2, rel=0.02)


# ---- FLOPs of real tensors -----------------------------------------------------------------------


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
@pytest.mark.parametrize("again", [False, True])
def test_flops_of_pretraining_are_torchs(
    name: str, num_visible: int, flags: dict, again: bool
) -> None:
    model = create_model(name, **flags)
    cost = count_step(model, pretrain_loss(num_visible), batch_size=2, grad_checkpointing=again)
    model.set_grad_checkpointing(again)
    with flop_counter() as counter:
        pretrain_loss(num_visible)(model, 2).backward()
    assert cost.total == counter.get_total_flops() / 2


@pytest.mark.parametrize("tune", ["full", "linear", "partial:0.5", "partial:1", "partial:3"])
def test_flops_of_fine_tuning_are_torchs(tune: str) -> None:
    model = classifier(tune, num_classes=10)
    cost = count_step(model, plan_finetune.drawn_loss, batch_size=2)
    with flop_counter() as counter:
        plan_finetune.drawn_loss(model, 2).backward()
    assert cost.total == counter.get_total_flops() / 2
    with flop_counter() as counter, torch.no_grad():
        model.features(torch.rand(1, 3, 64, 64), "cls")
    features = count_forward(model, lambda m, n: m.features(torch.rand(n, 3, 64, 64), "cls"))
    assert features == counter.get_total_flops()


@pytest.mark.parametrize(
    "flags", [{}, {"lscale_init": 1.0}, {"img_size": (32, 80)}, {"patch_size": 16}]
)
def test_flops_of_segmentation_are_torchs(flags: dict) -> None:
    """Patches of 16 have a neck that enlarges 4 times, those of 8 one that does so twice."""
    model = segmenter(**flags)
    cost = count_step(model, segment_loss(model), batch_size=2)
    with flop_counter() as counter:
        segment_loss(model)(model, 2).backward()
    assert cost.total == counter.get_total_flops() / 2


def test_mask_tokens_in_the_encoder_cost_the_papers_3_3() -> None:
    """MAE's ablation, ViT-L: 3.3 x the FLOPs; 4 x the encoder's tokens, the same decoder."""
    totals = []
    for tokens in (False, True):
        with torch.device("meta"):
            model = create_model("mae_vit_large_patch16", encoder_mask_tokens=tokens)
        totals.append(count_step(model, pretrain_loss(49), batch_size=2).total)
    assert totals[1] / totals[0] == pytest.approx(3.3, abs=0.1)


def test_fewer_predicted_values_cost_less() -> None:
    """24 coefficients of a patch instead of 192 pixels: the last product, in its three passes."""
    with torch.device("meta"):
        whole, fewer = (create_model("mae_vit_micro_patch8", pca_components=n) for n in (None, 24))
    more, less = (count_step(m, pretrain_loss(16), batch_size=2).total for m in (whole, fewer))
    target = 2 * 48 * 192 * 24  # its own coefficients are a product, forward only
    assert more - less == 3 * 2 * 48 * 96 * (192 - 24) - target


# ---- Activations of real tensors -----------------------------------------------------------------


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


def check_activations(model: Any, loss: Callable[[Any, int], torch.Tensor], precision: str) -> Cost:
    """Within a fifth of what is kept; in bf16 CPUs also keep the scores of attention."""
    cost = count_step(model, loss, batch_size=2, precision=precision)

    def forward(batch: int) -> torch.Tensor:
        with autocast(precision):
            return loss(model, batch)

    each, fixed = per_image(model, forward)
    assert cost.activations == pytest.approx(each, rel=0.02 if precision == "fp32" else 0.2)
    if precision == "bf16":
        assert cost.copies + cost.shared == pytest.approx(fixed, rel=0.2)
    return cost


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [{}, MMAE, CROSS, {"decoder_depth": 1}])
def test_activations_of_pretraining_are_measured_ones(flags: dict, precision: str) -> None:
    model = create_model("mae_vit_micro_patch8", **flags)
    check_activations(model, pretrain_loss(16), precision)


@pytest.mark.parametrize("tune", ["full", "linear", "partial:0.5", "partial:2"])
def test_activations_of_fine_tuning_are_measured_ones(tune: str) -> None:
    model = classifier(tune, num_classes=10, drop_path=0.1)
    check_activations(model, plan_finetune.drawn_loss, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_segmentation_are_measured_ones(precision: str) -> None:
    model = segmenter(patch_size=16, img_size=128)
    check_activations(model, segment_loss(model), precision)


# ---- Parameters and files ------------------------------------------------------------------------


def test_memory_adds_up() -> None:
    cost = Cost(forward=8, backward=16, attention=0, activations=200, copies=100, shared=30)
    memory = estimate_memory(
        cost, batch_size=3, image_values=7, parameters=50, learning=40, optimizer="adamw",
        averages=True,
    )  # fmt: skip
    assert (memory.activations, memory.copies, memory.shared) == (600, 100, 30)
    assert (memory.weights, memory.gradients, memory.optimizer) == (200, 160, 320)
    assert memory.total == 600 + 100 + 30 + 200 + 160 + 320 + 200 + 3 * 7 * 5


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
    plan = plan_pretrain.plan_run(parsed(flags), 1)
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
