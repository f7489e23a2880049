"""Weights that do not say what they are: what is assumed is told, and can be said by a flag."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_segment import SMALL
from test_segment_data import write_pairs

from models_segmenters import load_segmenter
from models_vit import VisionTransformer
from models_zoo import MODELS, create_model, create_segmenter, load_classifier, load_pretrained
from util.data.datasets import build_dataset
from util.data.transforms import EvalTransform, normalize
from util.errors import BadInput
from util.train.checkpoint import save_checkpoint
from util.weights.assumed import assumptions

WIDTH = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4}
HEADS, USUAL = 2, 4  # of the model, and what ViT-micro of this width and depth has
TOLD = r"num_heads 4 \(as ViT-micro of width 128 and depth 4; else --num_heads N\)"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of ten digits with two heads, its weights alone."""
    torch.manual_seed(0)
    model = VisionTransformer(**WIDTH, num_heads=HEADS, num_classes=10, global_pool="avg")
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("foreign") / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def autoencoder(path: Path, **size: int) -> Path:
    """Official weights of a micro MAE with other heads."""
    torch.manual_seed(0)
    model = create_model("mae_vit_micro_patch8", **size)
    flags = argparse.Namespace(model="mae_vit_micro_patch8", input_size=64)
    torch.save({"model": model.state_dict(), "args": flags}, path)
    return path


def command_of(main: str, weights: Path, root: Path) -> list[str]:
    """A short run of each main on these weights."""
    out = f"--output_dir={root / 'out'}"
    digits = ["--dataset=digits", "--num_workers=0", "--device=cpu", out]
    if main == "main_knn":
        return [*digits, f"--checkpoint={weights}", "--train_images=30", "--val_images=9", "--k=5"]
    if main == "main_finetune --eval":
        return [*digits, f"--resume={weights}", "--val_images=20", "--eval"]
    if main == "main_finetune":
        more = ["--epochs=1", "--batch_size=8", "--train_images=8", "--val_images=8"]
        return [*digits, f"--finetune={weights}", *more]
    if main == "main_segment":
        write_pairs(root / "pairs")
        data = f"--data_path={root / 'pairs'}"
        return [*SMALL, data, out, f"--finetune={weights}", "--iterations=1"]
    if main == "main_export":
        return [f"--checkpoint={weights}", "--to=timm", f"--output={root / 'timm.pth'}"]
    path = autoencoder(root / "mae.pth", num_heads=HEADS)
    return [f"--checkpoint={path}", "--dataset=digits", "--num_images=1", "--device=cpu", out]


MAINS = (
    "main_knn", "main_finetune", "main_finetune --eval", "main_segment", "main_export",
    "main_visualize",
)  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("main", MAINS)
def test_heads_that_nobody_said_are_told_in_one_line(
    main: str, weights: Path, tmp_path: Path, run_main
) -> None:
    flags = command_of(main, weights, tmp_path)
    code, text, err = run_main(main.split()[0], flags)
    assert code == 0, err
    (line,) = [line for line in text.splitlines() if "does not say all of its model" in line]
    told = r"num_heads 4 \(as mae_vit_micro_patch8, by its flags" if "vis" in main else TOLD
    assert re.search(told, line) and "LayerNorm eps 1e-06" in line and "GELU" in line
    assert ("normalised by" in line) == (main != "main_export")
    again = [flag.replace(str(tmp_path / "out"), str(tmp_path / "again")) for flag in flags]
    again = [flag.replace("timm.pth", "again.pth") for flag in again]
    code, text, err = run_main(main.split()[0], [*again, f"--num_heads={HEADS}"])
    assert code == 0, err
    assert "else --num_heads" not in text


def test_the_heads_that_are_given_are_those_that_are_measured(
    weights: Path, tmp_path: Path, run_main
) -> None:
    flags = [*command_of("main_knn", weights, tmp_path), f"--num_heads={HEADS}", "--save_features"]
    assert run_main("main_knn", flags)[0] == 0
    saved = np.load(tmp_path / "out/features-val.npy")
    source = build_dataset("digits", "val")
    image = EvalTransform((16, 16), margin=False)(source[0][0])[None]
    found = {}
    for heads in (HEADS, USUAL):
        model = VisionTransformer(**WIDTH, num_heads=heads, num_classes=10, global_pool="avg")
        model.load_state_dict(torch.load(weights, weights_only=True)["model"])
        with torch.no_grad():
            x = normalize(image.expand(-1, 3, -1, -1), source.mean * 3, source.std * 3)
            found[heads] = model.eval().features(x, "avg")[0].numpy()
    assert np.abs(saved[0] - found[HEADS]).max() < 1e-4
    assert np.abs(saved[0] - found[USUAL]).max() > 1e-2


def test_a_file_that_says_its_heads_is_believed_and_not_contradicted(tmp_path: Path) -> None:
    arguments = WIDTH | {"num_heads": HEADS, "num_classes": 10}
    model = VisionTransformer(**arguments)
    state = {"task": "finetune", "step": 1, "model_args": arguments, "model": model.state_dict()}
    path = str(save_checkpoint(tmp_path, state))
    for heads in (None, HEADS):
        _, kept, rest = load_classifier(path, head="own", num_heads=heads)
        assert kept["num_heads"] == HEADS and not assumptions(rest, path)
    with pytest.raises(BadInput, match=r"--num_heads 4, but .* says 2"):
        load_classifier(path, head="own", num_heads=4)
    mae = create_model("mae_vit_micro_patch8")
    state = {
        "task": "pretrain", "step": 1, "model": mae.state_dict(),
        "model_args": MODELS["mae_vit_micro_patch8"][1], "model_name": "mae_vit_micro_patch8",
    }  # fmt: skip
    (tmp_path / "mae").mkdir()
    path = str(save_checkpoint(tmp_path / "mae", state))
    for key in ("num_heads", "decoder_num_heads"):
        with pytest.raises(BadInput, match=rf"--{key} 8, but .* says 4"):
            load_pretrained(path, **{key: 8})


def test_heads_of_an_autoencoder_and_of_a_segmenter(tmp_path: Path) -> None:
    path = str(autoencoder(tmp_path / "mae.pth", num_heads=8, decoder_num_heads=6))
    model, state = load_pretrained(path, num_heads=8, decoder_num_heads=6)
    assert model.blocks[0].attn.num_heads == 8 and model.decoder_blocks[0].attn.num_heads == 6
    assert "num_heads" not in assumptions(state, path)[0]
    model, state = load_pretrained(path)
    assert (
        "decoder_num_heads 4 (as mae_vit_micro_patch8, by its flags" in assumptions(state, path)[0]
    )
    assert "pixels predicted as they are (else --norm_pix_loss)" in assumptions(state, path)[0]

    whole = create_segmenter("vit_micro_patch8", 3, img_size=16, channels=8, aux_channels=8)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "segmenter.pth")
    path = str(tmp_path / "segmenter.pth")
    model, state = load_segmenter(path, num_heads=8)
    assert model.arguments["num_heads"] == 8 and "num_heads" not in assumptions(state, path)[0]
    model, state = load_segmenter(path)
    assert model.arguments["num_heads"] == 4 and re.search(TOLD, assumptions(state, path)[0])


def test_a_size_that_was_given_is_said_to_be_so(tmp_path: Path) -> None:
    model = VisionTransformer(**WIDTH | {"img_size": (8, 32)}, num_heads=4, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    path = str(tmp_path / "a.pth")
    # Two by eight patches are also four by four: nothing in the file tells which.
    _, _, rest = load_classifier(path, head="own")
    assert "images of 16 x 16 (square, from the count of positions)" in assumptions(rest, path)[0]


@pytest.mark.parametrize("main", ["main_finetune", "main_segment"])
def test_from_scratch_the_name_says_it(main: str, tmp_path: Path, run_main) -> None:
    flags = ["--model=vit_micro_patch4", "--num_heads=2", f"--output_dir={tmp_path / 'out'}"]
    if main == "main_segment":
        write_pairs(tmp_path)
        flags += [*SMALL, f"--data_path={tmp_path}"]
    else:
        flags += ["--dataset=digits", "--device=cpu"]
    code, _, err = run_main(main, flags)
    assert code == 2 and "--num_heads without --finetune" in err
