"""--decoder cross: CrossMAE's decoder against its definition, and a run with it."""

import math
from pathlib import Path

import pytest
import torch
from launch import TINY
from runs import records
from tiny import MMAE, SMALL, VISIBLE, batch, small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models_layers import split_ids, take
from models_mmae import MaskedAutoencoderViT
from util.errors import BadInput
from util.mask.patches import patchify
from util.train.checkpoint import load_file

CROSS = {"decoder": "cross", "depth": 3}


def cross(**arguments: object) -> MaskedAutoencoderViT:
    return small(**(CROSS | arguments)).double()


def drawn(model: MaskedAutoencoderViT) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks that differ from row to row, and an order of the patches."""
    images, mask = batch(model, seed=1)
    return images, mask, torch.rand(mask.shape, generator=torch.Generator().manual_seed(2))


def by_definition(model: MaskedAutoencoderViT, images: Tensor, mask: Tensor) -> Tensor:
    """Predictions of all masked patches, image by image and query by query."""
    predictions = []
    for image, hidden in zip(images, mask, strict=True):
        patches = model.patch_embed.proj(image[None]).flatten(2)[0].T + model.position_code()[0]
        x = torch.cat([model.cls_token[0], patches[~hidden]])[None]
        outputs = [x]
        for block in model.blocks:
            x = block(x)
            outputs.append(x)
        outputs[-1] = model.norm(x)
        rows = []
        for place in hidden.nonzero().flatten().tolist():
            q = model.mask_token[0, 0] + model.position_code("decoder")[0, place]
            for mix, block in zip(model.decoder_blocks.mix, model.decoder_blocks, strict=True):
                memory = sum(w * output[0] for w, output in zip(mix, outputs, strict=True))
                kv = block.attn.kv(block.norm_memory(memory))
                keys, values = kv[:, :16].reshape(-1, 2, 8), kv[:, 16:].reshape(-1, 2, 8)
                query = block.attn.q(block.norm1(q)).reshape(2, 8)
                scores = torch.einsum("hd,nhd->hn", query, keys) / math.sqrt(8)
                read = torch.einsum("hn,nhd->hd", scores.softmax(-1), values).flatten()
                q = q + block.ls1(block.attn.proj(read))
                q = q + block.ls2(block.mlp(block.norm2(q)))
            rows.append(model.decoder_pred(model.decoder_norm(q)))
        predictions.append(torch.stack(rows))
    return torch.stack(predictions)


@pytest.mark.parametrize("terms", [{}, MMAE], ids=["mae", "mmae"])
def test_forward_is_the_definition(terms: dict[str, object]) -> None:
    model = cross(**terms)
    images, mask, _ = drawn(model)
    out = model(images, mask)
    expected = by_definition(model, images, mask)
    torch.testing.assert_close(out["pred"], expected, rtol=1e-9, atol=1e-11)
    target = patchify(images, (4, 4))[mask].reshape(3, 4, 48)
    torch.testing.assert_close(out["loss"], (expected - target).square().mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_share_is_predicted_and_its_rows_are_the_same(ratio: float, count: int) -> None:
    """Queries do not meet, so predicting fewer changes none of the others."""
    model = cross(predict_ratio=ratio)
    images, mask, order = drawn(model)
    assert model.num_predicted(VISIBLE) == count
    every = model(images, mask, VISIBLE)["pred"]
    out = model(images, mask, VISIBLE, None, order)
    target = patchify(images, (4, 4))
    losses = []
    for b in range(3):
        hidden = mask[b].nonzero().flatten()
        chosen = sorted(hidden.tolist(), key=lambda i: order[b, i].item())[:count]
        rows = [hidden.tolist().index(i) for i in sorted(chosen)]
        torch.testing.assert_close(out["pred"][b], every[b, rows], rtol=1e-12, atol=1e-14)
        losses.append((every[b, rows] - target[b, sorted(chosen)]).square().mean())
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean(), rtol=1e-12, atol=0)


def test_every_parameter_gets_a_gradient() -> None:
    model = cross(predict_ratio=0.5, **MMAE)
    images, mask, order = drawn(model)
    model(images, mask, VISIBLE, None, order)["loss"].backward()
    learning = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in learning.items() if g is None or not g.isfinite().all()] == []
    # A key's bias adds the same to all scores of a query: half of kv.bias has no gradient.
    assert [n for n, g in learning.items() if not g.any()] == []


def test_recomputing_activations_changes_no_number() -> None:
    model = cross(predict_ratio=0.5)
    images, mask, order = drawn(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, mask, VISIBLE, None, order)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_compiles_as_one_graph_without_a_host_sync() -> None:
    model = cross(predict_ratio=0.5, depth=1)
    images, mask, order = drawn(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(images, mask, VISIBLE, None, order)
    torch.testing.assert_close(compiled(images, mask, VISIBLE, None, order), expected)
    with FakeTensorMode():  # has no values: whatever asks for one raises
        fake = MaskedAutoencoderViT(**(SMALL | CROSS), predict_ratio=0.5)
        out = fake(torch.zeros(2, 3, 8, 12), torch.zeros(2, 6, dtype=torch.bool), VISIBLE,
                   None, torch.zeros(2, 6))  # fmt: skip
        out["loss"].backward()
        assert out["pred"].shape == (2, 2, 48)


def test_the_encoder_is_the_full_models() -> None:
    """What is fine-tuned later does not depend on the decoder it was trained with."""
    full, other = cross(decoder="full"), cross()
    shared = [n for n in full.state_dict() if not n.startswith("decoder_")]
    assert shared == [n for n in other.state_dict() if not n.startswith("decoder_")]
    other.load_state_dict({n: full.state_dict()[n] for n in shared}, strict=False)
    images, mask, _ = drawn(full)
    ids, _ = split_ids(mask, VISIBLE)
    patches = patchify(images, (4, 4))
    assert take(patches, ids).shape == (3, VISIBLE, 48)
    torch.testing.assert_close(
        other.forward_encoder(patches, ids), full.forward_encoder(patches, ids), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "crossed"}, "crossed"),
        ({"decoder": "full", "predict_ratio": 0.5}, "cross"),
        ({"predict_ratio": 0.0}, "predict_ratio"),
        ({"predict_ratio": 1.5}, "predict_ratio"),
        ({"decoder_depth": 0}, "at least one block"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        MaskedAutoencoderViT(**(SMALL | CROSS | settings))


@pytest.mark.smoke
def test_a_run_and_what_follows_it(tmp_path: Path, run_main) -> None:
    flags = [
        *TINY, "--decoder=cross", "--predict_ratio=0.34", "--epochs=1", "--warmup_epochs=0",
        "--blr=1e-3", f"--output_dir={tmp_path}",
    ]  # fmt: skip
    code, _, err = run_main("main_pretrain", flags)
    assert code == 0, err
    # 12 of 16 patches are masked and 4 of them predicted: the rate follows.
    first = records(tmp_path, "train")[0]
    assert first["lr"] == pytest.approx(1e-3 * 24 / 256 * 4 / 12)
    arguments = load_file(tmp_path / "checkpoint-last.pth")["model_args"]
    assert (arguments["decoder"], arguments["predict_ratio"]) == ("cross", 0.34)
    picture = ["--dataset=synthetic", f"--output_dir={tmp_path / 'pictures'}", "--device=cpu"]
    path = f"{tmp_path}/checkpoint-last.pth"
    code, _, err = run_main("main_visualize", [f"--checkpoint={path}", *picture])
    assert code == 0, err
    flags = [
        "--dataset=synthetic", "--train_images=32", "--batch_size=16", "--epochs=1",
        "--device=cpu", "--num_workers=0", f"--finetune={path}", f"--output_dir={tmp_path}",
    ]  # fmt: skip
    code, _, err = run_main("main_finetune", flags)
    assert code == 0, err
    assert run_main("main_pretrain", [*TINY, "--predict_ratio=0.5"])[0] == 2
