"""What somebody sees who runs a command for the first time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, TINY
from PIL import Image
from runs import records

import eval_pretrain
from util.console import counted


def test_numbers_and_their_nouns() -> None:
    assert [counted(n, "image") for n in (0, 1, 2, 12_345)] == [
        "0 images", "1 image", "2 images", "12,345 images",
    ]  # fmt: skip
    assert counted(1, "process") == "1 process" and counted(2, "process") == "2 processes"
    assert counted(3, "class") == "3 classes" and counted(2, "batch") == "2 batches"
    assert counted(2.5, "epoch") == "2.5 epochs" and counted(1.0, "epoch") == "1 epoch"


@pytest.mark.smoke
def test_three_epochs_are_called_three(
    tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    draw = eval_pretrain.draw_pictures

    def drawn(whole: object, part: object, device: object, title: str) -> object:
        titles.append(title)
        return draw(whole, part, device, title)

    monkeypatch.setattr(eval_pretrain, "draw_pictures", drawn)
    argv = [*TINY, "--picture_every=1", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0, err
    assert [re.search("after (.*),", title).group(1) for title in titles] == [
        "1 epoch", "2 epochs", "3 epochs",
    ]  # fmt: skip
    # Files keep their names, as checkpoints do.
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"epoch-0.png", "epoch-1.png", "epoch-2.png"}
    assert "256 images of synthetic; global batch 24 = 24 x 1 process x 1" in out
    assert "epoch 3 of 3, step 30 of 30" in out
    assert f"pictures    {tmp_path}/pictures/epoch-2.png" in out


FEW = ["--num_workers=0", "--device=cpu", "--train_images=8", "--val_images=4", "--batch_size=4"]


@pytest.mark.smoke
def test_the_best_is_told_in_words(tmp_path: Path, run_main) -> None:
    argv = [*FEW, "--dataset=digits", "--model=vit_micro_patch4", "--epochs=2", "--aa=none"]
    argv += ["--warmup_epochs=0", "--input_size=8", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_finetune", argv)
    assert code == 0, err
    assert re.search(
        r"^best        top-1 \d+\.\d\d % after [12] epochs?: .*best.*\.pth$", out, re.M
    )
    assert "after 1 epoch" in out and "after 2 epochs" in out and "{" not in out
    assert "8 images of digits, 10 classes; global batch 4 = 4 x 1 process x 1" in out


@pytest.mark.smoke
def test_a_segmenter_says_how_large_its_head_is(tmp_path: Path, run_main) -> None:
    argv = [*FEW, "--dataset=garments", "--scene_size=32", "--model=vit_micro_patch8"]
    argv += ["--input_size=32", "--window=32", "--stride=32", "--resize", "32", "32"]
    argv += ["--iterations=2", "--warmup_iterations=0", "--eval_every=2", "--channels=16"]
    argv += ["--aux_channels=8", "--pictures=0", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_segment", argv)
    assert code == 0, err
    found = re.search(
        r"UPerNet, ([\d,]+) parameters: encoder ([\d,]+), "
        r"neck and heads of --channels 16 ([\d,]+);",
        out,
    )
    whole, encoder, rest = (int(text.replace(",", "")) for text in found.groups())
    assert whole == encoder + rest and encoder > 0 and rest > 0
    assert re.search(r"^best        mIoU \d+\.\d\d after 2 iterations: .*best.*\.pth$", out, re.M)


@pytest.mark.smoke
def test_one_of_a_thing_in_a_dry_run(tmp_path: Path, run_main) -> None:
    argv = [*TINY, "--epochs=1", "--dry_run", f"--output_dir={tmp_path}"]
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0, err
    assert "24 = 24 x 1 process x 1 micro-step" in out and "in 1 epoch" in out
    assert not re.search(r"\b1 (processes|epochs|micro-steps|checkpoints|images|steps)\b", out)


def put_pictures(folder: Path, count: int) -> None:
    """Pictures with shapes to learn: a bright disc on a shaded ground."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:80, :96]
    for number in range(count):
        generator = np.random.default_rng(number)
        ground = generator.uniform(0, 120, 3) + x[..., None] * generator.uniform(0, 1, 3)
        cy, cx = generator.uniform(20, 60, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < generator.uniform(10, 25) ** 2
        picture = np.where(disc[..., None], generator.uniform(150, 255, 3), ground)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:03d}.jpg")


@pytest.mark.smoke
def test_the_recipes_for_an_own_folder(tmp_path: Path, run_main) -> None:
    """Pretraining on a flat folder, then a classifier of two class folders from that run."""
    put_pictures(tmp_path / "mine", 50)  # flat
    argv = [f"--config={ROOT / 'recipes' / 'own_folder.yaml'}", f"--data_path={tmp_path / 'mine'}"]
    argv += ["--epochs=30", "--log_every=1", "--num_workers=0", "--device=cpu"]
    argv += [f"--output_dir={tmp_path / 'run'}"]
    code, out, err = run_main("main_pretrain", argv)
    assert code == 0, err
    losses = [record["loss"] for record in records(tmp_path / "run", "epoch")]
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert (tmp_path / "run" / "pictures" / "epoch-29.png").exists()
    assert "45 images of imagefolder" in out  # a tenth is held out for the pictures
    # Nothing to worry about but images that fill no step, which a small folder has.
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    assert all("fill no step" in line for line in warnings)

    put_pictures(tmp_path / "classes" / "shaded", 20)
    put_pictures(tmp_path / "classes" / "dark", 20)
    for path in (tmp_path / "classes" / "dark").iterdir():
        Image.open(path).point(lambda value: value // 4).save(path)
    argv = [f"--config={ROOT / 'recipes' / 'own_folder_finetune.yaml'}", "--epochs=8"]
    argv += [f"--data_path={tmp_path / 'classes'}", f"--output_dir={tmp_path / 'classifier'}"]
    argv += [f"--finetune={tmp_path / 'run' / 'checkpoint-last.pth'}", "--device=cpu"]
    code, out, err = run_main("main_finetune", [*argv, "--num_workers=0"])
    assert code == 0, err
    result = json.loads((tmp_path / "classifier" / "result.json").read_text())
    assert "0.2 of train, held out" in result["best_chosen_on"] and "taken    60 tensors" in out
    # 8 held-out pictures of two classes that a mean tells apart; 4 of them are chance.
    assert result["images"] == 8 and result["best"]["top1"] >= 87.5
