"""kNN: scikit-learn's answers, exact whatever the chunks and processes; main_knn end to end."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import OF_DIGITS, launch, start_group, wait
from PIL import Image
from trained import Trained

from models_zoo import load_encoder
from util.data.datasets import SPLITS, build_dataset
from util.data.randomness import evenly
from util.data.transforms import EvalTransform, normalize
from util.errors import BadInput
from util.measure.knn import (
    NOBODY,
    Bank,
    Neighbours,
    best,
    nearest,
    neighbours,
    rank_label,
    unit,
    vote,
)
from util.train.checkpoint import LAST, load_file, save_checkpoint
from util.train.dist import Processes, processes

ONE = Processes(0, 1, 0, 1, torch.device("cpu"))
PAIRS = [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (100, 0.02), (200, 1.0)]


def crowd(queries: int = 40, size: int = 150) -> tuple[Bank, Bank]:
    """Queries and a bank in which each vector stands up to four times, so that ties abound."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(60, 24, generator=generator)
    rows = torch.randint(60, (size,), generator=generator) // 2  # half of them: 30 vectors
    labels = torch.randint(7, (size + queries,), generator=generator)
    bank = Bank(unit(vectors[rows]), torch.arange(size), labels[:size])
    return Bank(unit(vectors[:queries]), torch.arange(queries), labels[size:]), bank


def share_of(bank: Bank, world: int, rank: int) -> Bank:
    return Bank(*(tensor[rank::world] for tensor in bank))


def same(a: Neighbours, b: Neighbours) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- Neighbours --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 37, 150])
def test_neighbours_are_those_of_exact_integers(k: int) -> None:
    queries, bank = crowd()
    # Multiples of 2^-26 as whole numbers: their products have no rounding in int64.
    q, b = (np.rint(x.features.double().numpy() * 2**26).astype(np.int64) for x in (queries, bank))
    products = q @ b.T
    order = np.stack([np.lexsort((np.arange(150), -row)) for row in products])[:, :k]
    found = nearest(queries.features, bank, k)
    assert np.array_equal(found.number, order)
    assert np.array_equal(found.similarity, np.take_along_axis(products, order, 1) / 2.0**52)
    assert torch.equal(found.label, bank.label[found.number])
    ties = (np.diff(np.sort(products)) == 0).mean()
    assert ties > 0.5, "the bank was to be full of ties"


def test_chunks_change_nothing() -> None:
    queries, bank = crowd()
    whole = nearest(queries.features, bank, 20, bank_chunk=1000)
    for bank_chunk in (1, 7, 20, 64):
        assert same(nearest(queries.features, bank, 20, bank_chunk), whole)
    for query_chunk in (1, 9, 40):
        found = list(neighbours(queries, bank, 20, ONE, query_chunk=query_chunk))
        parts, labels = zip(*found, strict=True)
        assert same(Neighbours(*(torch.cat(t) for t in zip(*parts, strict=True))), whole)
        assert torch.equal(torch.cat(labels), queries.label)


def test_fewer_than_k_leave_places_free() -> None:
    queries, bank = crowd(size=3)
    found = nearest(queries.features, bank, 5)
    assert (found.number[:, 3:] == NOBODY).all() and (found.similarity[:, 3:] == -torch.inf).all()
    # The other processes' neighbours take them.
    more = nearest(queries.features, crowd(size=9)[1], 5)
    assert (best([found, more], 5).number < NOBODY).all()


def test_unit_vectors() -> None:
    x = torch.randn(50, 768, generator=torch.Generator().manual_seed(0)) * 100
    x[7] = 0
    y = unit(x)
    assert y.dtype == torch.float32 and torch.equal(y.mul(2**26).round().div(2**26), y)
    assert not y[7].any()
    cosine = torch.nn.functional.cosine_similarity(x[:5], x[5:6])
    torch.testing.assert_close(y[:5] @ y[5], cosine, rtol=0, atol=1e-6)


def test_k_beyond_the_bank() -> None:
    queries, bank = crowd(size=10)
    with pytest.raises(BadInput, match="k is 11, but the bank holds 10 images"):
        next(neighbours(queries, bank, 11, ONE))


# ---- Votes -------------------------------------------------------------------------------------


def reference(k: int, temperature: float) -> Any:
    """scikit-learn's classifier with the same weights."""
    # Imported here: the processes below import this file, and need no scikit-learn.
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    )


@pytest.mark.parametrize(("k", "temperature"), PAIRS)
def test_equal_to_scikit_learn(k: int, temperature: float) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    model = reference(k, temperature).fit(x[:1500], y[:1500])
    bank = Bank(unit(torch.tensor(x[:1500])), torch.arange(1500), torch.tensor(y[:1500]))
    queries = Bank(unit(torch.tensor(x[1500:])), torch.arange(297), torch.tensor(y[1500:]))
    ((found, label),) = neighbours(queries, bank, 201, ONE, bank_chunk=512)
    scores = vote(found, k, temperature, 10)
    assert np.array_equal(scores.argmax(1), model.predict(x[1500:]))
    shares = scores.clamp(min=0) / scores.clamp(min=0).sum(1, keepdim=True)
    # Features are rounded by 2^-27, or to float32, and a temperature of .02 makes 50 times of it.
    # Where the k-th and the next are closer than that, either may be the one that votes.
    clear = (found.similarity[:, k - 1] - found.similarity[:, k]).numpy() > 1e-7
    assert clear.mean() > 0.99
    differences = np.abs(shares.numpy() - model.predict_proba(x[1500:]))
    assert differences[clear].max() < 1e-5
    correct = (rank_label(scores, label) < 1).double().mean().item()
    assert correct == pytest.approx(model.score(x[1500:], y[1500:]), abs=1e-12) and correct > 0.8


def ranked(similarity: list[float], label: list[int]) -> Neighbours:
    places = torch.arange(len(label))[None]
    return Neighbours(
        torch.tensor([similarity], dtype=torch.float64), places, torch.tensor([label])
    )


def test_equal_votes_go_to_the_lower_class() -> None:
    scores = vote(ranked([0.5, 0.5], [3, 1]), 2, 0.07, 5)
    assert scores.tolist() == [[-1, 1, -1, 1, -1]]
    assert [rank_label(scores, torch.tensor([c])).item() for c in (1, 3)] == [0, 1]
    assert scores.argmax(1).item() == 1


def test_a_class_without_votes_is_never_right() -> None:
    scores = vote(ranked([0.9, 0.1], [4, 2]), 2, 1e-9, 6)  # the second weight rounds to 0
    assert scores.tolist() == [[-1, -1, 0, -1, 1, -1]]
    assert [rank_label(scores, torch.tensor([c])).item() for c in range(6)] == [6, 6, 1, 6, 0, 6]


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 0.07])
def test_no_weight_overflows(temperature: float) -> None:
    scores = vote(ranked([1.0, 1.0, 0.999], [2, 2, 0]), 3, temperature, 3)
    assert scores.isfinite().all() and scores[0, 2] == 2
    assert scores[0, 0].item() == pytest.approx(np.exp(-0.001 / temperature), abs=1e-12)


# ---- Processes ---------------------------------------------------------------------------------


def look(rank: int, world: int, out: Path) -> None:
    """One of several processes, each with its share; some get no query in the last round."""
    with processes("cpu", out) as procs:
        queries, bank = crowd(queries=16, size=50)
        queries, bank = (share_of(whole, world, rank) for whole in (queries, bank))
        found = list(neighbours(queries, bank, 20, procs, query_chunk=5 * world, bank_chunk=6))
        tiny = share_of(crowd(size=world - 1)[1], world, rank)  # none for the last process
        few = next(neighbours(queries, tiny, world - 1, procs))
        with pytest.raises(BadInput, match=f"k is 51, .* {50} images"):
            next(neighbours(queries, bank, 51, procs))
        parts = [torch.cat(t) for t in zip(*(f for f, _ in found), strict=True)]
        torch.save([*parts, torch.cat([label for _, label in found]), *few[0]], out / f"{rank}.pt")


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_processes_find_what_one_finds(world: int, tmp_path: Path) -> None:
    assert wait(start_group(look, world, tmp_path)) == [0] * world
    queries, bank = crowd(queries=16, size=50)
    whole = (*nearest(queries.features, bank, 20), queries.label)
    few = nearest(queries.features, crowd(size=world - 1)[1], world - 1)
    for rank in range(world):
        for one, several in zip((*whole, *few), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.equal(one[rank::world], several)


# ---- The command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(trained: Trained) -> Path:
    """A micro model of digits, hardly trained."""
    return trained("main_pretrain", [*OF_DIGITS, "--blr=1e-4"]) / LAST


FLAGS = ["--dataset=digits", "--num_workers=0", "--device=cpu", "--batch_size=100"]


def test_some_images(checkpoint: Path, tmp_path: Path, run_main) -> None:
    """Features of a few, evenly spaced in each split, are those that all of them have there."""
    saved = {}
    for name, more in (("all", []), ("some", ["--train_images=30", "--val_images=9"])):
        flags = [*FLAGS, f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / name}"]
        assert run_main("main_knn", [*flags, *more, "--k=5", "--save_features"])[0] == 0
        saved[name] = {s: np.load(tmp_path / name / f"features-{s}.npy") for s in SPLITS}
    result = json.loads((tmp_path / "some" / "knn.json").read_text())
    assert (result["images"], result["bank_images"]) == (9, 30)
    for split, count in zip(SPLITS, (30, 9), strict=True):
        whole = saved["all"][split]
        np.testing.assert_allclose(
            saved["some"][split], whole[evenly(len(whole), count)], rtol=1e-4, atol=1e-5
        )


def test_another_checkpoint_in_the_folder_overwrites_nothing(
    checkpoint: Path, tmp_path: Path, run_main
) -> None:
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--train_images=30", "--val_images=9", "--k=5"]
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    for path, kept, told in ((checkpoint, 0, 0), (checkpoint, 0, 0), (other, 1, 1), (other, 1, 0)):
        code, text, err = run_main("main_knn", [*flags, f"--checkpoint={path}"])
        assert code == 0, err
        result = json.loads((tmp_path / "knn.json").read_text())
        assert result["checkpoint"] == str(path)
        assert len(list(tmp_path.glob("knn-*.json"))) == kept
        assert text.count("an earlier measurement of something else") == told
    aside = json.loads((tmp_path / "knn-1.json").read_text())
    assert aside["checkpoint"] == str(checkpoint)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["cls", "avg", "both"])
def test_command(kind: str, checkpoint: Path, tmp_path: Path, run_main) -> None:
    flags = [*FLAGS, f"--checkpoint={checkpoint}", f"--output_dir={tmp_path}"]
    more = ["--save_features", f"--features={kind}", "--query_chunk=50", "--bank_chunk=400"]
    code, text, err = run_main("main_knn", [*flags, *more, "--k", "20", "1", "5"])
    assert code == 0, err
    result = json.loads((tmp_path / "knn.json").read_text())
    assert [r["k"] for r in result["results"]] == [20, 1, 5]
    assert {k: result[k] for k in ("k", "top1", "top5")} == result["results"][0]
    assert (result["images"], result["bank_images"], result["bad_images"]) == (297, 1500, [])
    assert result["features"] == kind and result["dataset"] == "digits"
    assert all(f"top1 {r['top1']:6.2f} %" in text for r in result["results"])
    assert not list(tmp_path.glob(".*"))

    # What was saved is what the model says of the images, in the data set's order ...
    saved = {s: np.load(tmp_path / f"features-{s}.npy") for s in ("train", "val")}
    labels = {s: np.load(tmp_path / f"labels-{s}.npy") for s in ("train", "val")}
    model, _ = load_encoder(str(checkpoint))
    model.eval()
    source = build_dataset("digits", "val")
    indices = [0, 1, 99, 100, 296]
    transform = EvalTransform((16, 16), margin=False)
    images = torch.stack([transform(source[i][0]) for i in indices])
    with torch.no_grad():
        features = model.features(normalize(images, source.mean, source.std), kind)
    assert saved["train"].shape == (1500, 256 if kind == "both" else 128)
    assert saved["val"].dtype == np.float32
    # Another batch size only changes float32's last bits; another image or kind makes .1 and more.
    assert np.abs(saved["val"][indices] - features.numpy()).max() < 1e-3
    assert np.array_equal(labels["val"], source.labels)

    # ... and the accuracy is scikit-learn's from it, in float64: in float32 its near ties differ.
    saved = {split: features.astype(np.float64) for split, features in saved.items()}
    for k, row in zip((20, 1, 5), result["results"], strict=True):
        sk = reference(k, 0.07).fit(saved["train"], labels["train"])
        assert row["top1"] == pytest.approx(100 * sk.score(saved["val"], labels["val"]), abs=1e-9)
        best5 = np.argsort(-sk.predict_proba(saved["val"]), axis=1, kind="stable")[:, :5]
        shares = np.take_along_axis(sk.predict_proba(saved["val"]), best5, axis=1)
        hits = ((best5 == labels["val"][:, None]) & (shares > 0)).any(1)
        assert row["top5"] == pytest.approx(100 * hits.mean(), abs=1e-9)


def pictures(root: Path, broken: str) -> Path:
    """Six classes of stripes, 5 images each to train on and 2 to classify, one of them broken."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for n in range(6):
            folder = root / split / f"class{n}"
            folder.mkdir(parents=True)
            for i in range(count):
                wave = np.sin(np.arange(20) * (n + 1) / 3 + rng.random())
                noise = rng.random((20, 20))
                pixels = (100 + 60 * wave + 50 * noise).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / broken).write_bytes(b"no image")
    return root


@pytest.mark.dist
def test_several_processes_count_as_one(checkpoint: Path, tmp_path: Path) -> None:
    """With an undecodable training image, which one of them meets."""
    data = pictures(tmp_path / "data", "train/class2/3.png")
    flags = [*FLAGS, "--dataset=imagefolder", f"--data_path={data}", f"--checkpoint={checkpoint}",
             "--save_features", "--batch_size=4", "--query_chunk=7", "--k", "8", "3"]  # fmt: skip
    started = {
        world: launch(
            [*flags, f"--output_dir={tmp_path / str(world)}"], tmp_path / f"out{world}", world,
            module="main_knn",
        )
        for world in (1, 2, 3)
    }  # fmt: skip
    results, saved = [], []
    for world, children in started.items():
        assert wait(children) == [0] * world, (tmp_path / f"out{world}").read_text()
        results.append(json.loads((tmp_path / f"{world}/knn.json").read_text()))
        saved.append(np.load(tmp_path / f"{world}/features-train.npy"))
        labels = np.load(tmp_path / f"{world}/labels-train.npy")
        assert labels.tolist() == [-1 if i == 13 else i // 5 for i in range(30)]
        assert not saved[-1][13].any() and saved[-1][14].any()
    assert results[0] == results[1] == results[2]
    assert results[0]["bad_images"] == [str(data / "train/class2/3.png")]
    assert (results[0]["bank_images"], results[0]["images"]) == (29, 12)
    assert 0 < results[0]["top1"] < results[0]["top5"]
    # Batches of other shapes change float32's last bits.
    assert max(np.abs(saved[0] - s).max() for s in saved[1:]) < 1e-3
    assert "class2/3.png: no image of a known kind" in (tmp_path / "out3").read_text()


@pytest.mark.dist
def test_an_undecodable_image_to_classify_ends_all(checkpoint: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "val/class4/1.png")
    flags = [*FLAGS, "--dataset=imagefolder", f"--data_path={data}", f"--checkpoint={checkpoint}",
             f"--output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert wait(launch(flags, tmp_path / "out", 2, module="main_knn")) == [2, 2]
    for name in ("out", "out.1"):
        text = (tmp_path / name).read_text()
        assert "1 of 12 images" in text and "class4/1.png: no image of a known kind" in text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "knn.json").exists()


@pytest.mark.smoke
def test_other_statistics_are_told(checkpoint: Path, tmp_path: Path, run_main) -> None:
    flags = [*FLAGS, f"--checkpoint={checkpoint}", f"--output_dir={tmp_path}"]
    code, text, err = run_main("main_knn", [*flags, "--mean=0.5", "--std=0.25"])
    assert code == 0, err
    assert "--mean 0.3052 --std 0.3749; these images get 0.5 and 0.25" in text
    assert json.loads((tmp_path / "knn.json").read_text())["mean"] == [0.5]


@pytest.mark.smoke
def test_features_that_are_not_finite(checkpoint: Path, tmp_path: Path, run_main) -> None:
    state = load_file(checkpoint)
    state["model"]["blocks.0.mlp.fc1.bias"][0] = torch.nan
    path = save_checkpoint(tmp_path, state)
    out = f"--output_dir={tmp_path / 'out'}"
    code, _, err = run_main("main_knn", [*FLAGS, f"--checkpoint={path}", out])
    assert code == 2 and "features of val are not finite" in err


def folder_of(root: Path, classes: dict[str, list[str]]) -> Path:
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), "red").save(root / split / name / "a.png")
    return root


def unlabelled_stl10(root: Path) -> Path:
    """Files of the right sizes with nothing in them; the disk keeps no blocks for that."""
    for name, size in (("unlabeled_X", 100_000 * 27648), ("test_X", 8000 * 27648)):
        (root / f"{name}.bin").touch()
        os.truncate(root / f"{name}.bin", size)
    (root / "test_y.bin").write_bytes(bytes([1]) * 8000)
    return root


BAD = {
    "no checkpoint": ([], "--checkpoint is missing"),
    "checkpoint not there": (["--checkpoint={tmp}/no.pth"], "no.pth"),
    "k 0": (["--k", "0"], "0 is not at least 1"),
    "k too large": (["--k", "5", "1501"], "k is 1501, but the bank holds 1,500 images"),
    "temperature 0": (["--temperature=0"], "0 is not above 0"),
    "no classes": (["--dataset=photos"], "photos has no labels in train"),
    "no labels": (["--dataset=stl10_unlabeled", "--data_path={tmp}"], "has no labels in train"),
    "other classes": (
        ["--dataset=imagefolder", "--data_path={tmp}/images"],
        "2 classes, val 1: in train alone 1 (dog);",
    ),
    "statistics": (["--mean", "0.5", "0.5"], "mean has 2 numbers"),
    "size": (["--input_size=15"], "15"),
    "unknown flag": (["--temprature=1"], "did you mean --temperature?"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, checkpoint: Path, tmp_path: Path, run_main) -> None:
    flags, message = BAD[case]
    folder_of(tmp_path / "images", {"train": ["cat", "dog"], "val": ["cat"]})
    if case == "no labels":
        unlabelled_stl10(tmp_path)
    given = [] if case == "no checkpoint" else [f"--checkpoint={checkpoint}"]
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    out = f"--output_dir={tmp_path / 'out'}"
    code, _, err = run_main("main_knn", [*FLAGS, *given, out, *flags])
    assert code == 2 and message in err, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


# ---- Features alone ----------------------------------------------------------------------------


def test_features_of_a_set_without_labels(checkpoint: Path, tmp_path: Path, run_main) -> None:
    """No vote and no knn.json, which would be of something else; the features are the model's."""
    flags = [*FLAGS[1:], "--dataset=photos", f"--checkpoint={checkpoint}", "--train_images=3"]
    flags += ["--val_images=2", f"--output_dir={tmp_path}"]
    code, _, err = run_main("main_knn", flags)
    assert code == 2 and "has no labels in train" in err and "with --save_features" in err
    code, text, err = run_main("main_knn", [*flags, "--save_features"])
    assert code == 0, err
    assert "features alone, no neighbours and no knn.json: photos has no labels in train" in text
    names = [f"{kind}-{split}" for kind in ("features", "files", "labels") for split in SPLITS]
    assert {path.stem for path in tmp_path.iterdir()} == {*names, "log-rank0"}
    model, _ = load_encoder(str(checkpoint))
    for split, count in (("train", 3), ("val", 2)):
        source = build_dataset("photos", split, channels=1)
        indices = evenly(len(source), count)
        images = torch.stack([EvalTransform(model.img_size, False)(source[i][0]) for i in indices])
        with torch.no_grad():
            expected = model.eval().features(normalize(images, source.mean, source.std), "avg")
        found = np.load(tmp_path / f"features-{split}.npy")
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert (np.load(tmp_path / f"labels-{split}.npy") == -1).all()
        listed = (tmp_path / f"files-{split}.txt").read_text().splitlines()
        assert listed == [source.file_name(i) for i in indices]


@pytest.mark.parametrize("split", SPLITS)
def test_features_of_one_split(split: str, checkpoint: Path, tmp_path: Path, run_main) -> None:
    folder = tmp_path / "data" / split / "a"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (20, 20), 50 * i).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no image")
    flags = [*FLAGS[1:], f"--checkpoint={checkpoint}", f"--data_path={tmp_path / 'data'}"]
    flags += [f"--output_dir={tmp_path / 'out'}"]
    code, _, err = run_main("main_knn", flags)
    assert code == 2 and "with --save_features" in err
    code, text, err = run_main("main_knn", [*flags, "--save_features"])
    assert code == 0, err
    other = SPLITS[1 - SPLITS.index(split)]
    (reason,) = [line for line in text.splitlines() if "features alone" in line]
    assert other in reason.partition("no knn.json: ")[2]
    assert "1 of 3" in text and f"{folder}/1.png: no image" in text
    assert np.load(tmp_path / f"out/labels-{split}.npy").tolist() == [0, -1, 0]
    features = np.load(tmp_path / f"out/features-{split}.npy")
    assert features.any(axis=1).tolist() == [True, False, True]
    assert not (tmp_path / f"out/features-{other}.npy").exists()
    gone = [*flags[:-2], f"--data_path={tmp_path / 'gone'}", flags[-1], "--save_features"]
    code, _, err = run_main("main_knn", gone)
    assert code == 2 and "/gone" in err


def test_features_of_a_flat_folder(checkpoint: Path, tmp_path: Path, run_main) -> None:
    """Photographs without classes and without splits are all of train."""
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("L", (20, 20), 50 * i).save(tmp_path / "flat" / f"{i}.png")
    flags = [*FLAGS[1:], f"--checkpoint={checkpoint}", f"--data_path={tmp_path / 'flat'}"]
    flags += [f"--output_dir={tmp_path / 'out'}"]
    code, text, err = run_main("main_knn", [*flags, "--save_features"])
    assert code == 0 and "features alone" in text, err
    assert np.load(tmp_path / "out/features-train.npy").shape == (3, 128)
    assert np.load(tmp_path / "out/labels-train.npy").tolist() == [-1] * 3
    code, text, err = run_main("main_knn", [*flags, "--save_features", "--val_fraction=.4"])
    assert code == 0 and "has no labels" in text, err
    assert len(np.load(tmp_path / "out/features-val.npy")) == 1
    # What an earlier start left is not of these images.
    code, text, err = run_main("main_knn", [*flags, "--save_features"])
    assert code == 0 and "features-val.npy in" in text and "of an earlier start" in text, err
