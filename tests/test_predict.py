"""main_predict.py: classes of a user's images as evaluation sees them, and label maps."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch, wait
from PIL import Image
from test_segment import NEW, SMALL
from test_segment_data import write_pairs
from trained import Trained

import main_finetune
import main_pretrain
import main_segment
from models_zoo import load_classifier
from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.data.transforms import EvalTransform, normalize
from util.train.checkpoint import LAST, load_file, write_signed

ALONE = ["--device=cpu", "--num_workers=0"]
CLASSES = ["a, with comma", 'b "quoted"', "c"]


def write_images(root: Path) -> None:
    """DATA/{train,val}/<class>/[more/]*.png of several sizes; colours tell the classes apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                folder = root / split / name / ("more" if i % 2 else "")
                folder.mkdir(parents=True, exist_ok=True)
                noise = rng.integers(0, 160, (40 + 7 * i, 60 - 5 * i, 3), dtype=np.uint8)
                noise[..., label] += 12
                Image.fromarray(noise).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture(scope="module")
def run(data: Path, trained: Trained) -> Path:
    """A fine-tuning of a few steps, of images with statistics of their own."""
    flags = [
        "--model=vit_micro_patch8", "--input_size=32", "--epochs=2", "--warmup_epochs=0",
        "--batch_size=12", "--blr=2e-2", "--aa=none", "--reprob=0", "--ema_decay=0.5",
        "--mean", ".4", ".5", ".6", "--std", ".2", ".3", ".25", *ALONE,
    ]  # fmt: skip
    return trained("main_finetune", [*flags, f"--data_path={data}"])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def predicted(run_main, checkpoint: Path, images: Path, folder: Path, *more: str) -> str:
    flags = [f"--checkpoint={checkpoint}", f"--data_path={images}", f"--output_dir={folder}"]
    code, out, err = run_main("main_predict", [*flags, *ALONE, *more])
    assert code == 0, err
    return out


def test_predictions_of_another_checkpoint_are_kept(
    run: Path, data: Path, tmp_path: Path, run_main
) -> None:
    images = data / "val" / CLASSES[0]
    predicted(run_main, run / LAST, images, tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert first.keys() == {"predictions.csv", "predictions.json"}
    assert json.loads(first["predictions.json"])["measured"]["checkpoint"] == str(run / LAST)
    predicted(run_main, run / LAST, images, tmp_path)  # of the same: in its place
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    out = predicted(run_main, run / LAST, images, tmp_path, "--ema")
    assert "predictions-1.json, an earlier measurement of something else" in out
    for name, content in first.items():
        stem, _, ending = name.partition(".")
        assert (tmp_path / f"{stem}-1.{ending}").read_bytes() == content
        assert (tmp_path / name).read_bytes() != content
    # A table of nobody knows what, of a command that was killed or of an older one.
    (tmp_path / "predictions.json").unlink()
    alone = (tmp_path / "predictions.csv").read_bytes()
    out = predicted(run_main, run / LAST, images, tmp_path)
    assert "predictions-2.csv, an earlier measurement" in out
    assert (tmp_path / "predictions-2.csv").read_bytes() == alone


def reference(checkpoint: Path, file: Path) -> torch.Tensor:
    """Probabilities [K] of one image by hand."""
    model, _, state = load_classifier(str(checkpoint), head="own")
    pixels = EvalTransform(model.img_size)(Image.open(file).convert("RGB"))[None]
    mean, std = (state["data"][name] for name in ("mean", "std"))
    with torch.no_grad():
        return model.eval()(normalize(pixels, mean, std)).double().softmax(1)[0]


# ---- Classes -----------------------------------------------------------------------------------


def test_probabilities_and_accuracy_are_those_of_evaluation(
    run: Path, data: Path, tmp_path: Path, run_main
) -> None:
    out = predicted(run_main, run / LAST, data / "val", tmp_path)
    rows = table(tmp_path)
    assert f"18 images: {tmp_path}/predictions.csv" in out and "averaged weights too (--ema)" in out
    assert list(rows[0]) == [
        "file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3",
        "error",
    ]  # fmt: skip
    names = [row["file"] for row in rows]
    assert names == sorted(names, key=lambda name: Path(name).parts) and len(set(names)) == 18
    for row in rows:
        shares = reference(run / LAST, data / "val" / row["file"])
        columns = ["", "_2", "_3"]
        order = [CLASSES.index(row[f"class{i}"]) for i in columns]
        assert order == shares.argsort(descending=True).tolist()
        found = torch.tensor([float(row[f"probability{i}"]) for i in columns], dtype=torch.float64)
        torch.testing.assert_close(found, shares[order], rtol=1e-5, atol=1e-7)
    flags = [f"--resume={run / LAST}", "--eval", f"--data_path={data}", *ALONE]
    assert run_main("main_finetune", [*flags, f"--output_dir={tmp_path}"])[0] == 0
    measured = json.loads((tmp_path / "result-eval.json").read_text())
    right = [Path(row["file"]).parts[0] == row["class"] for row in rows]
    assert 100 * sum(right) / 18 == pytest.approx(measured["top1"], abs=1e-9)
    assert 20 < measured["top1"] < 100, "all right or all wrong shows nothing"
    predicted(run_main, run / LAST, data / "val", tmp_path / "ema", "--ema")
    right = [Path(row["file"]).parts[0] == row["class"] for row in table(tmp_path / "ema")]
    assert 100 * sum(right) / 18 == pytest.approx(measured["ema_top1"], abs=1e-9)


def test_one_image_a_list_and_fewer_classes(
    run: Path, data: Path, tmp_path: Path, run_main
) -> None:
    one = data / "val" / CLASSES[0] / "0.png"
    predicted(run_main, run / LAST, one, tmp_path, "--top_k=1", "--batch_size=1")
    (row,) = table(tmp_path)
    assert list(row) == ["file", "class", "probability", "error"] and row["file"] == "0.png"
    other = data / "val" / "c" / "0.png"
    (data / "list.txt").write_text(f"{other}\n\nval/{CLASSES[0]}/0.png\nval/gone.png\n")
    out = predicted(run_main, run / LAST, data / "list.txt", tmp_path / "list")
    rows = table(tmp_path / "list")
    assert [row["file"] for row in rows] == [str(other), f"val/{CLASSES[0]}/0.png", "val/gone.png"]
    assert float(rows[1]["probability"]) == pytest.approx(float(row["probability"]), rel=2e-6)
    assert rows[2]["class"] == ""
    assert rows[2]["error"] == "No such file or directory"
    assert "3 images, 1 of them cannot be decoded" in out


def test_images_that_cannot_be_decoded_have_a_row(
    run: Path, data: Path, tmp_path: Path, run_main
) -> None:
    for name in ("0.jpg", "sub/1.jpg"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    flags = [f"--checkpoint={run / LAST}", f"--data_path={tmp_path}", *ALONE]
    code, out, err = run_main("main_predict", [*flags, f"--output_dir={tmp_path / 'none'}"])
    assert "2 images, 2 of them cannot be decoded" in out and "cannot decode 0.jpg: no image" in out
    assert code == 1 and "no image of" in err
    assert all(row["error"] for row in table(tmp_path / "none"))
    Image.new("RGB", (9, 9)).save(tmp_path / "sub/2.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "sub/3.png")
    more = ["--num_workers=1", "--max_pixels=100"]
    predicted(run_main, run / LAST, tmp_path, tmp_path / "some", *more)
    rows = table(tmp_path / "some")
    assert [row["file"] for row in rows] == ["0.jpg", "sub/1.jpg", "sub/2.png", "sub/3.png"]
    assert [bool(row["error"]) for row in rows] == [True, True, False, True]
    assert [row["class"] != "" for row in rows] == [row["probability_3"] != "" for row in rows]
    assert rows[3]["error"].endswith("exceeds limit of 100; --max_pixels N allows more")
    predicted(run_main, run / LAST, tmp_path / "sub/2.png", tmp_path / "alone")
    (alone,) = table(tmp_path / "alone")
    # What cannot be decoded changes nothing.
    assert float(alone["probability"]) == pytest.approx(float(rows[2]["probability"]), rel=2e-6)


@pytest.mark.dist
def test_two_processes_write_one_table(run: Path, data: Path, tmp_path: Path, run_main) -> None:
    flags = [f"--checkpoint={run / LAST}", f"--data_path={data / 'val' / 'c'}", "--batch_size=1"]
    flags += [*ALONE, f"--output_dir={tmp_path / 'two'}"]
    assert wait(launch(flags, tmp_path / "out", 2, module="main_predict")) == [0, 0]
    predicted(run_main, run / LAST, data / "val" / "c", tmp_path / "one", "--batch_size=1")
    one, two = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("one", "two"))
    assert one == two and one.count(b"\n") == 7
    assert (tmp_path / "out.1").read_text().count("images:") == 0


def test_no_margin_where_training_had_none(tmp_path: Path, run_main) -> None:
    """A digit is looked at whole, as --eval looks at it."""
    flags = ["--dataset=digits", "--model=vit_micro_patch4", "--input_size=8", "--train_images=64"]
    flags += ["--epochs=1", "--warmup_epochs=0", "--eval_every=0", "--patch_size=4", *ALONE]
    main_finetune.main([*flags, f"--output_dir={tmp_path / 'run'}"])
    checkpoint = tmp_path / "run" / LAST
    assert load_file(checkpoint)["data"]["eval_margin"] is False
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "digit.png")
    predicted(run_main, checkpoint, tmp_path / "digit.png", tmp_path)
    model, _, state = load_classifier(str(checkpoint), head="own")
    pixels = EvalTransform((8, 8), margin=False)(Image.open(tmp_path / "digit.png"))[None]
    images = normalize(pixels, state["data"]["mean"], state["data"]["std"])
    with torch.no_grad():
        shares = model.eval()(images)[0].softmax(0)
    (row,) = table(tmp_path)
    assert row["class"] == str(shares.argmax().item())
    assert float(row["probability"]) == pytest.approx(shares.max().item(), rel=1e-5)


def test_weights_without_names_of_classes(run: Path, data: Path, tmp_path: Path, run_main) -> None:
    state = load_file(run / LAST)
    write_signed(tmp_path / "old.pth", {"model": state["model"], "model_args": state["model_args"]})
    image = data / "val" / "c" / "0.png"
    out = predicted(run_main, tmp_path / "old.pth", image, tmp_path)
    assert "does not name its classes: they are numbers" in out
    assert "normalised by ImageNet's mean" in out
    assert table(tmp_path)[0]["class"] in ("0", "1", "2")
    named = tmp_path / "own"
    stats = ["--mean", *map(str, IMAGENET_MEAN), "--std", *map(str, IMAGENET_STD)]
    predicted(run_main, run / LAST, image, named, *stats)
    assert table(named)[0]["probability"] == table(tmp_path)[0]["probability"]
    told = predicted(run_main, tmp_path / "old.pth", image, tmp_path / "told", *stats)
    assert "does not name its classes" in told and "normalised by" not in told


def test_what_cannot_predict_is_refused(data: Path, run: Path, tmp_path: Path, run_main) -> None:
    flags = ["--dataset=synthetic", "--model=mae_vit_micro_patch8", "--input_size=32", *ALONE]
    flags += ["--batch_size=128", "--epochs=1", "--warmup_epochs=0", "--picture_every=0"]
    main_pretrain.main([*flags, f"--output_dir={tmp_path / 'pre'}"])
    pretrained = tmp_path / "pre" / LAST
    images = f"--data_path={data / 'val'}"
    for given, expected in (
        ([f"--checkpoint={pretrained}", images], "fine-tune it first: main_finetune.py --finetune"),
        ([images], "--checkpoint is missing"),
        ([f"--checkpoint={run / LAST}"], "--data_path is missing"),
        ([f"--checkpoint={run / LAST}", f"--data_path={tmp_path / 'no'}"], "does not exist"),
        ([f"--checkpoint={run / LAST}", images, "--mean=7"], "mean is 7"),
        ([f"--checkpoint={tmp_path / 'no.pth'}", images], "no.pth"),
    ):
        code, _, err = run_main("main_predict", [*given, f"--output_dir={tmp_path / 'o'}", *ALONE])
        assert code == 2 and expected in err and err.count("\n") == 1, err
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_every_image_below_a_folder_is_seen(
    data: Path, run: Path, tmp_path: Path, run_main
) -> None:
    """Also in linked folders; one that contains itself is refused."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(data / "val" / "c")
    shutil.copy(next((data / "val" / "c").glob("*.png")), images / "own.png")
    predicted(run_main, run / LAST, images, tmp_path / "o")
    names = [row["file"] for row in table(tmp_path / "o")]
    assert len(names) == 7 and sum(name.startswith("linked/more/") for name in names) == 3
    (images / "deep").mkdir()
    (images / "deep" / "round").symlink_to(images)
    flags = [f"--checkpoint={run / LAST}", f"--data_path={images}", *ALONE]
    code, _, err = run_main("main_predict", [*flags, f"--output_dir={tmp_path / 'p'}"])
    assert code == 2 and "is a link to a folder that contains it" in err


def test_a_list_as_windows_writes_it(data: Path, run: Path, tmp_path: Path, run_main) -> None:
    """With a mark in front, and names that hold what some take for the end of a line."""
    names = ["one.png", "two \u2028 lines.png"]
    for name in names:
        shutil.copy(next((data / "val" / "c").glob("*.png")), tmp_path / name)
    (tmp_path / "list.txt").write_bytes(("\ufeff" + "\r\n".join(names) + "\r\n").encode())
    out = predicted(run_main, run / LAST, tmp_path / "list.txt", tmp_path / "o")
    assert "2 images" in out and "cannot" not in out
    assert [row["file"] for row in table(tmp_path / "o")] == names


# ---- Label maps --------------------------------------------------------------------------------


def test_label_maps_are_those_of_main_segment(tmp_path: Path, run_main) -> None:
    write_pairs(tmp_path / "pairs", count=4)
    flags = [*SMALL, f"--output_dir={tmp_path / 'run'}", "--nb_classes=4", "--iterations=2"]
    main_segment.main([*flags, *NEW, "--eval_every=0", f"--data_path={tmp_path / 'pairs'}"])
    checkpoint, images = tmp_path / "run" / LAST, tmp_path / "pairs/val/images"
    one, two = tmp_path / "one", tmp_path / "two"
    resume = [f"--resume={checkpoint}", f"--predict={images}", f"--output_dir={one}", *ALONE]
    code, out, err = run_main("main_segment", ["--dataset=folder", *resume])
    assert code == 0 and f"main_predict.py --checkpoint {checkpoint}" in out, err
    predicted(run_main, checkpoint, images, two)
    files = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(files) == 8
    for file in [*files, "classes.txt"]:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    (images / "broken.png").write_bytes(b"no image")
    out = predicted(run_main, checkpoint, images, tmp_path / "some")
    assert "cannot decode" in out and "5 images, 1 of them cannot be decoded" in out
    for file in files:
        assert (one / file).read_bytes() == (tmp_path / "some" / file).read_bytes()
    assert not (tmp_path / "some/maps/broken.png").exists()
    # A list of names; and maps among the images would be images of the next start.
    (images / "list.txt").write_text("p0.jpg\np1.jpg\n")
    predicted(run_main, checkpoint, images / "list.txt", tmp_path / "listed")
    assert len(list((tmp_path / "listed/maps").iterdir())) == 2
    flags = [f"--checkpoint={checkpoint}", f"--data_path={images}", *ALONE]
    code, _, err = run_main("main_predict", [*flags, f"--output_dir={images / 'o'}"])
    assert code == 2 and "would be images of the next start" in err
    flags = [f"--checkpoint={checkpoint}", f"--data_path={images}", "--top_k=2", *ALONE]
    code, _, err = run_main("main_predict", [*flags, f"--output_dir={two}"])
    assert code == 2 and "is a segmenter, which takes no --top_k" in err
