"""What somebody sees who runs a command for the first time."""

import re
from pathlib import Path

import pytest
from launch import TINY

import main_pretrain
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
    draw = main_pretrain.draw_pictures

    def drawn(whole: object, part: object, device: object, title: str) -> object:
        titles.append(title)
        return draw(whole, part, device, title)

    monkeypatch.setattr(main_pretrain, "draw_pictures", drawn)
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
