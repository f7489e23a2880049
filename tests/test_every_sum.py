"""Whatever is added up over processes and micro-steps is the same however a global batch is split.

The mains run on 1, 2 and 3 real processes (gloo) and in 1 and 2 micro-steps. Processes are started
once for each count and do one case after the other, so that all of it is quick; they meet in a file
of the run folder, as those of a Slurm step do, and not at a port.

Models compute in float64 here, so that a fault cannot be taken for rounding: what is left of it is
that of losses and of predictions, which the engines make float32. Faults of the kind (a mean of
means, a share that is missing or counted twice, gradients that are not exchanged) change these
numbers by parts in a hundred or more, the bounds are parts in a hundred thousand or less.
"""

import contextlib
import csv
import importlib
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import CONTEXT, wait
from PIL import Image
from torch import Tensor, nn

from util.train.checkpoint import LAST, load_file
from util.train.logger import MACHINE

# Nothing waits for the clock; on a busy machine all the processes together may take minutes.
SECONDS = 900
pytestmark = [pytest.mark.dist, pytest.mark.timeout(SECONDS + 60)]

WORLDS = (1, 2, 3)
SPLITS = [(world, accum) for world in WORLDS for accum in (1, 2)]
GLOBAL_BATCH = 12

# ---- Data --------------------------------------------------------------------------------------

CLASSES, TRAIN_IMAGES, VAL_IMAGES = 3, 27, 7  # which no number of processes divides
BROKEN = {"train/c0/04.png", "train/c1/13.png", "train/c2/22.png"}
TRAIN_PAIRS, VAL_PAIRS, BROKEN_PAIR = 14, 4, 5


def write_images(root: Path) -> None:
    """A folder of classes; some files of train cannot be decoded."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for i in range(count):
            path = root / split / f"c{i * CLASSES // count}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
            coarse.resize((24, 20)).save(path)
            if path.relative_to(root).as_posix() in BROKEN:
                path.write_bytes(b"no image")


def write_pairs(root: Path) -> None:
    """Pairs of which some are ignored for the most part, so that their pixels weigh unevenly."""
    rng = np.random.default_rng(1)
    for split, count in (("train", TRAIN_PAIRS), ("val", VAL_PAIRS)):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            shape = (36 + i, 44 - i)
            pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"images/{i:02d}.png")
            label = rng.integers(0, CLASSES, shape, np.uint8)
            label[: (i % 4) * 9] = 255
            label[-1, :CLASSES] = range(CLASSES)
            Image.fromarray(label).save(root / split / f"masks/{i:02d}.png")
    (root / f"train/images/{BROKEN_PAIR:02d}.png").write_bytes(b"no image")


# ---- Cases: what each process runs -------------------------------------------------------------

RUN = ["--device=cpu", "--num_workers=0", "--save_every=0"]
PRETRAIN = [
    *RUN, "--log_every=3", "--model=mae_vit_micro_patch8", "--input_size=16", "--decoder_depth=1",
    "--epochs=2", "--warmup_epochs=0", "--lr=1e-3", "--mask=mixed", "--pos_offset=jitter",
    "--clip_grad=0.5", "--picture_every=0",
]  # fmt: skip
FINETUNE = [
    *RUN, "--log_every=3", "--model=vit_micro_patch8", "--input_size=16", "--epochs=2",
    "--warmup_epochs=0", "--lr=1e-3", "--mixup=0", "--cutmix=0", "--reprob=0", "--drop_path=0",
    "--aa=none", "--eval_every=1", "--layer_decay=1",
]  # fmt: skip
SEGMENT = [
    *RUN, "--log_every=3", "--dataset=folder", "--model=vit_micro_patch8", "--input_size=32",
    "--resize", "48", "32", "--window=32", "--stride=24", "--channels=8", "--aux_channels=8",
    "--iterations=3", "--warmup_iterations=0", "--lr=1e-3", "--drop_path=0", "--dropout=0",
    "--eval_every=3", "--pictures=0", "--loss_mean=valid",
]  # fmt: skip
KNN = ["--device=cpu", "--num_workers=0", "--batch_size=4", "--k", "1", "5", "--query_chunk=4"]


@dataclass(frozen=True)
class Case:
    """One command on several processes.

    Attributes:
        flags: beside data, folder and batch; {case} stands for the run folder of another one.
        splits: processes and micro-steps.
        stop: a signal reaches the last process in this step; then the same command goes on.
        norms: BatchNorm by its running statistics, which a micro-step does not change.
    """

    main: str
    flags: list[str]
    splits: list[tuple[int, int]]
    stop: int = 0
    still_norms: bool = False


ONE_STEP = [(world, 1) for world in WORLDS]
ENDS = [(1, 1), (3, 1)]
PCA = [*PRETRAIN, "--target=pca", "--pca_components=6", "--pca_patches=40", "--eval_every=1",
       "--eval_images=2"]  # fmt: skip
MEASURED = "{{{}-1-1}}/checkpoint-last.pth"
CASES = {
    "pretrain": Case("main_pretrain", PCA, SPLITS),
    "cross": Case(
        "main_pretrain", [*PRETRAIN, "--decoder=cross", "--predict_ratio=0.5"], [(1, 1), (2, 1)]
    ),
    "finetune": Case("main_finetune", FINETUNE, SPLITS),
    "probe": Case("main_finetune", [*FINETUNE, "--tune=linear", "--lr=0.1"], ENDS),
    "segment": Case("main_segment", SEGMENT, SPLITS, still_norms=True),
    "segment with norms": Case("main_segment", [*SEGMENT, "--iterations=2"], ENDS),
    "pretrain stopped": Case("main_pretrain", PCA, ONE_STEP[1:], stop=1),
    "finetune stopped": Case("main_finetune", FINETUNE, [(3, 1)], stop=1),
    # Stopped before its last step: what was summed up before is to weigh as what comes after.
    "segment stopped": Case("main_segment", SEGMENT, [(2, 1)], stop=1, still_norms=True),
    # With two images the third process has none.
    "finetune measured": Case(
        "main_finetune", [*RUN, "--eval", "--resume=" + MEASURED.format("finetune"),
                          "--val_images=2"], ONE_STEP,
    ),
    "segment measured": Case(
        "main_segment", [*SEGMENT, "--eval", "--resume=" + MEASURED.format("segment"),
                         "--val_images=2"], ONE_STEP,
    ),
    "neighbours": Case(
        "main_knn", [*KNN, "--checkpoint=" + MEASURED.format("pretrain")], ONE_STEP
    ),
}  # fmt: skip


def find_place(root: Path, case: str, split: tuple[int, int]) -> Path:
    return root / f"{case.replace(' ', '-')}-{split[0]}-{split[1]}"


def command(root: Path, name: str, split: tuple[int, int]) -> list[str]:
    """The arguments of a case."""
    case, (world, accum) = CASES[name], split
    flags = []
    for flag in case.flags:
        for other in CASES:
            flag = flag.replace(f"{{{other}-1-1}}", str(find_place(root, other, (1, 1))))
        flags.append(flag)
    data = root / ("pairs" if case.main == "main_segment" else "images")
    flags += [f"--data_path={data}", f"--output_dir={find_place(root, name, split)}"]
    if case.main != "main_knn":
        flags += [f"--batch_size={GLOBAL_BATCH // world // accum}", f"--accum_iter={accum}"]
    return flags


class Watch:
    """What a process does beside the program: float64, gradients noted, a signal to itself."""

    def __init__(self, world: int, rank: int) -> None:
        self.gradients: list[Tensor] = []
        self.stop, self.precise, self.still_norms = 0, True, False
        self._compute_in_float64()
        self._note_gradients()
        self._agree_at_once()
        self._send_signals(world, rank)
        self._keep_norms_still()

    def _compute_in_float64(self) -> None:
        from util.train import session

        for task in ("pretrain", "finetune", "segment"):
            engine = importlib.import_module(f"engine_{task}")

            def normalize(*args: Any, original: Callable = engine.normalize) -> Tensor:
                images = original(*args)
                return images.double() if self.precise else images

            engine.normalize = normalize

        original = session.distribute

        def distribute(model: nn.Module, *rest: Any, **more: Any) -> nn.Module:
            return original(model.double(), *rest, **more)

        session.distribute = distribute
        # A prediction is made float32 before it is turned into pixels.
        from models_targets import PatchPCA

        inverse = PatchPCA.inverse
        PatchPCA.inverse = lambda pca, x: inverse(pca, x.to(pca.basis))  # type: ignore

    def _note_gradients(self) -> None:
        """For each parameter two numbers that any change of its gradient changes."""
        from util.train.step import OptimizerStep

        original = OptimizerStep._update

        def update(step: OptimizerStep, loss: Tensor) -> Any:
            generator = torch.Generator().manual_seed(0)
            rows = []
            for p in step.parameters:
                weights = torch.rand(p.numel(), generator=generator, dtype=torch.float64)
                flat = p.grad.flatten().double()
                rows.append(torch.stack([flat.norm(), flat @ weights / weights.norm()]))
            self.gradients.append(torch.stack(rows))
            return original(step, loss)

        OptimizerStep._update = update  # type: ignore[method-assign]

    def _agree_at_once(self) -> None:
        """Exchange wishes after each step: the runs are shorter than the usual four."""
        import util.train.run
        from util.train.agreement import Agreement

        util.train.run.Agreement = lambda *args: Agreement(*args, every=1)  # type: ignore

    def _send_signals(self, world: int, rank: int) -> None:
        from util.train.logger import StepLog, StepReport

        original = StepLog.__call__

        def call(log: StepLog, report: StepReport) -> None:
            if report.step == self.stop and rank == world - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            original(log, report)

        StepLog.__call__ = call  # type: ignore[method-assign]

    def _keep_norms_still(self) -> None:
        from models_batchnorm import GlobalBatchNorm

        original = GlobalBatchNorm.forward

        def forward(norm: GlobalBatchNorm, x: Tensor) -> Tensor:
            if not self.still_norms:
                return original(norm, x)
            values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return nn.functional.batch_norm(x, *values, training=False, eps=norm.eps)

        GlobalBatchNorm.forward = forward  # type: ignore[method-assign]


def run_once(main: Any, argv: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it says on stderr."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main.main(argv)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return code, said.getvalue()


def work(rank: int, world: int, root: Path) -> None:
    """One process: all cases of its number of processes, then what is checked without a main."""
    handle = os.open(root / f"log-{world}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    watch, number = Watch(world, rank), 0
    for name, case in CASES.items():
        for split in case.splits:
            if split[0] != world:
                continue
            main = importlib.import_module(case.main)
            watch.precise = "measured" not in name and case.main != "main_knn"
            watch.still_norms = case.still_norms
            ends = []
            for stop in [case.stop, 0] if case.stop else [0]:
                number += 1
                if world > 1:
                    os.environ |= {
                        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                        "SLURM_JOB_ID": str(number), "SLURM_STEP_ID": "0",
                        "SLURM_STEP_NUM_TASKS": str(world),
                        "SLURM_STEP_TASKS_PER_NODE": str(world),
                    }  # fmt: skip
                watch.stop, watch.gradients = stop, []
                ends.append(run_once(main, command(root, name, split)))
            torch.save(
                {"ends": ends, "gradients": watch.gradients},
                root / f"{find_place(root, name, split).name}.rank{rank}",
            )
    torch.save(alone_checks(rank, world, root), root / f"checks-{world}.rank{rank}")


# ---- What is checked without a main ------------------------------------------------------------


class Told(nn.Module):
    """Says of an image what its pixels say, and nothing finite of one that is all white."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x[:, :, 0, :CLASSES].mean(dim=1)
        return logits.masked_fill((x == 1).all(dim=(1, 2, 3))[:, None], torch.nan)

    def predict(self, x: Tensor) -> Tensor:
        white = (x == 1).all(dim=1, keepdim=True)
        return torch.cat([x[:, :1], -x[:, :1], x[:, 1:2]], dim=1).masked_fill(white, torch.nan)


def images_of(rank: int, world: int, what: str, size: int) -> list[dict[str, Any]]:
    """Five batches of one image, of which this process has its own; the fourth has a fault."""
    from util.data.randomness import EvalSampler

    found = []
    for ((key,),) in [(keys,) for keys in EvalSampler(range(5), 1, world_size=world, rank=rank)]:
        generator = torch.Generator().manual_seed(key.index)
        image = torch.randint(0, 255, (1, 3, size, size), generator=generator, dtype=torch.uint8)
        label = torch.randint(0, CLASSES, (1, size, size), generator=generator, dtype=torch.uint8)
        label[:, 0] = 255
        bad = torch.full((1, 4), -1)
        if key.index == 3 and what == "broken":
            image[:] = 255
        if key.index == 3 and what == "bad":
            bad[0, 0] = 3
        classes = torch.tensor([key.index % CLASSES])
        found.append({"x": image, "y": label, "class": classes, "bad": bad})
    return found


def alone_checks(rank: int, world: int, root: Path) -> dict[str, Any]:
    """What the engines' evaluations and the agreements come to, with real processes."""
    import engine_finetune
    import engine_segment
    from engine_segment import Inference, PixelLoss
    from util.train.agreement import Agreement
    from util.train.dist import Place, join

    place = Place(rank, world, rank, world, f"file://{root}/meeting-{world}")
    procs, found = join(place, torch.device("cpu")), {}
    options: dict[str, Any] = {
        "mean": (0.0,) * 3, "std": (1.0,) * 3, "device": procs.device, "sum_over_ranks": procs.sum,
        "gather": procs.gather,
    }  # fmt: skip

    def outcome(do: Callable[[], Any]) -> Any:
        try:
            return do()
        except (RuntimeError, ValueError) as error:
            return type(error).__name__, str(error)

    engine_finetune.normalize = engine_segment.normalize = lambda x, *rest: x.float() / 255
    for what in ("whole", "broken", "bad"):
        batches = images_of(rank, world, what, 6)
        classified = [{**b, "y": b["class"]} for b in batches]

        def classify(batches: list = classified) -> Any:
            result = engine_finetune.evaluate(Told(), batches, CLASSES, **options)
            return result.summary(), result.broken, result.confusion.tolist()

        def segment(batches: list = batches) -> Any:
            result = engine_segment.evaluate(Told(), batches, CLASSES, Inference(), **options)
            return result.summary(), result.ignored, result.classes

        found[f"classes, {what}"] = outcome(classify)
        found[f"pixels, {what}"] = outcome(segment)
    label = torch.zeros(1, 4, 4, dtype=torch.uint8)
    label[0, : rank + 1] = 255
    found["pixels of a loss"] = [
        procs.sum(PixelLoss(0.4, mean).pixels(label)).item() for mean in ("all", "valid")
    ]

    # Each process in turn gets a signal after its third step: all leave after the same one.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for receiver in range(world):
            with Agreement(procs, every=2) as agreement:
                wishes = []
                while not wishes or not wishes[-1].stop:
                    assert len(wishes) < 20
                    if len(wishes) == 3 and rank == receiver:
                        os.kill(os.getpid(), number)
                    wishes.append(agreement.after_step())
            found[f"stop by {receiver}, {number}"] = len(wishes), int(wishes[-1].stop)
    # The clock of the main process alone says when to save.
    for due in (True, False):
        minutes = 1e-9 if (rank == 0) == due else 0.0
        with Agreement(procs, save_minutes=minutes, every=1) as agreement:
            found[f"save, {due}"] = sum(agreement.after_step().save for _ in range(4))
    found["gathered"] = procs.gather(rank)
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


# ---- All of it, once ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all cases have run."""
    root = tmp_path_factory.mktemp("sums")
    write_images(root / "images")
    write_pairs(root / "pairs")
    for worlds in (WORLDS[:1], WORLDS[1:]):  # what one process has trained, the others measure
        children = [
            CONTEXT.Process(target=work, args=(rank, world, root))
            for world in worlds
            for rank in range(world)
        ]
        for child in children:
            child.start()
        codes = wait(children, SECONDS / 2)
        if any(codes):
            logs = [path.read_text()[-2000:] for path in sorted(root.glob("log-*"))]
            pytest.fail(f"processes ended with {codes}:\n" + "\n".join(logs))
    return root


def ends_of(root: Path, name: str, split: tuple[int, int]) -> list[list[tuple[int, str]]]:
    """Exit codes and errors of each rank's commands."""
    paths = [Path(f"{find_place(root, name, split)}.rank{rank}") for rank in range(split[0])]
    return [torch.load(path)["ends"] for path in paths]


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records by kind, without what they say of the machine."""
    (path,) = folder.glob("metrics*.jsonl")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = {k: v for k, v in json.loads(line).items() if k not in MACHINE}
        found.setdefault(record["kind"], []).append(record)
    return found


def same(found: Any, expected: Any, rel: float, at: str = "") -> list[str]:
    """Where two nestings differ by more than a share."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        if found.keys() != expected.keys():
            return [f"{at}: {sorted(map(str, found))} instead of {sorted(map(str, expected))}"]
        return [x for k in expected for x in same(found[k], expected[k], rel, f"{at}/{k}")]
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [f"{at}: {len(found)} instead of {len(expected)}"]
        return [x for i, v in enumerate(expected) for x in same(found[i], v, rel, f"{at}/{i}")]
    if isinstance(expected, float) and isinstance(found, float):
        if math.isnan(expected) and math.isnan(found):
            return []
        fine = math.isclose(found, expected, rel_tol=rel, abs_tol=1e-12)
        return [] if fine else [f"{at}: {found} instead of {expected}"]
    return [] if found == expected else [f"{at}: {found} instead of {expected}"]


# float64, but for losses and predictions, which are float32: 1e-7 each, 1e-6 after some steps.
LOSSES, GRADIENTS, WEIGHTS = 1e-5, 1e-5, 1e-5
TRAINED = [name for name, case in CASES.items() if case.main not in ("main_knn",)
           and "measured" not in name]  # fmt: skip
OTHERS = [(name, split) for name in TRAINED for split in CASES[name].splits if split != (1, 1)]


def ids(pair: tuple[str, tuple[int, int]]) -> str:
    return f"{pair[0]} {pair[1][0]}x{pair[1][1]}"


def base_of(name: str) -> str:
    """The case that was not stopped, of one that was."""
    return name.removesuffix(" stopped")


@pytest.mark.parametrize("name", CASES)
def test_every_process_ends_as_it_should(name: str, root: Path) -> None:
    for split in CASES[name].splits:
        for ends in ends_of(root, name, split):
            codes = [code for code, _ in ends]
            assert codes == ([75, 0] if CASES[name].stop else [0]), (split, ends)


@pytest.mark.parametrize("pair", OTHERS, ids=ids)
def test_what_a_run_records_is_the_same(pair: tuple[str, tuple[int, int]], root: Path) -> None:
    """Losses, gradient norms, counts of bad images, measurements."""
    name, split = pair
    expected = records(find_place(root, base_of(name), (1, 1)))
    assert len(expected["train"]) > 0
    found = records(find_place(root, name, split))
    assert same(found, expected, LOSSES) == []


@pytest.mark.parametrize("pair", [p for p in OTHERS if not CASES[p[0]].stop], ids=ids)
def test_gradients_are_those_of_the_global_batch(
    pair: tuple[str, tuple[int, int]], root: Path
) -> None:
    name, (world, accum) = pair
    paths = [Path(f"{find_place(root, name, (1, 1))}.rank0")]
    paths += [Path(f"{find_place(root, name, (world, accum))}.rank{r}") for r in range(world)]
    expected, *found = [torch.load(path)["gradients"] for path in paths]
    assert len(expected) > 1
    for mine in found:
        assert len(mine) == len(expected)
        for step, (a, b) in enumerate(zip(mine, expected, strict=True)):
            # Some true gradients are zero: relative to the largest, of one parameter.
            assert (a - b).abs().max() < GRADIENTS * b.abs().max(), step


@pytest.mark.parametrize("pair", OTHERS, ids=ids)
def test_checkpoints_are_the_same(pair: tuple[str, tuple[int, int]], root: Path) -> None:
    """Weights, running statistics and fits; the optimiser's state; lists and sums."""
    name, split = pair
    paths = [find_place(root, base_of(name), (1, 1)), find_place(root, name, split)]
    expected, found = (load_file(path / LAST) for path in paths)
    assert found["step"] == expected["step"] and found["stage"] == expected["stage"]
    assert found["bad_images"] == expected["bad_images"]
    for key, value in expected["model"].items():
        difference = (found["model"][key].double() - value.double()).abs().max()
        assert difference <= WEIGHTS * value.double().abs().max().clamp(min=1), key
    # One process done wrongly would change every weight by about the rate, 1e-3.
    for part in ("sums", "best"):
        if part in expected:
            assert same(found[part], expected[part], LOSSES) == []


@pytest.mark.parametrize("name", ["pretrain", "finetune", "segment"])
def test_bad_images_are_listed_once_by_all(name: str, root: Path) -> None:
    listed = {}
    for split in CASES[name].splits:
        (path,) = find_place(root, name, split).glob("bad_images*.txt")
        lines = path.read_text().splitlines()
        listed[split] = sorted(line.split(": ")[0] for line in lines)
        assert len(set(lines)) == len(lines) > 0
    assert all(files == listed[1, 1] for files in listed.values())
    images = root / "pairs" if name == "segment" else root / "images"
    broken = {f"train/images/{BROKEN_PAIR:02d}.png"} if name == "segment" else BROKEN
    assert {Path(f).relative_to(images).as_posix() for f in listed[1, 1]} <= broken


def test_a_pca_is_fitted_on_the_patches_of_all(root: Path) -> None:
    fits = [load_file(find_place(root, "pretrain", s) / LAST)["model"] for s in SPLITS]
    for fit in fits[1:]:
        for name in ("pca.mean", "pca.basis"):
            torch.testing.assert_close(fit[name], fits[0][name], rtol=0, atol=1e-6)
    lines = {
        line.split("hold")[1]
        for world in WORLDS
        for line in (root / f"log-{world}-0").read_text().splitlines()
        if "PCA coefficients of" in line
    }
    assert len(lines) == 1 and "training patches" in lines.pop()


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


@pytest.mark.parametrize("name", ["finetune measured", "segment measured", "neighbours"])
def test_measurements_are_the_same_on_any_number(name: str, root: Path) -> None:
    """Also where a process has no image."""
    results = []
    for split in ONE_STEP:
        folder = find_place(root, name, split)
        (path,) = [p for p in folder.glob("*.json") if p.name != "config.json"]
        results.append(json.loads(path.read_text()))
        if name == "finetune measured":
            results[-1]["confusion"] = table(folder / "confusion-eval.csv")
            results[-1]["classes"] = table(folder / "per_class-eval.csv")
    for result in results[1:]:
        assert same(result, results[0], 1e-6) == []
    count = VAL_IMAGES if name == "neighbours" else 2
    assert results[0]["images"] == count
    if name == "neighbours":
        assert results[0]["bank_images"] == TRAIN_IMAGES - len(BROKEN)
        assert len(results[0]["bad_images"]) == len(BROKEN)


@pytest.mark.parametrize("name", ["finetune", "segment"])
def test_results_of_a_run_are_the_same(name: str, root: Path) -> None:
    expected = None
    for split in SPLITS:
        folder = find_place(root, name, split)
        result = json.loads((folder / "result.json").read_text())
        if name == "finetune":
            result["confusion"] = table(folder / "confusion.csv")
            assert result["images"] == VAL_IMAGES
        expected = expected or result
        assert same(result, expected, LOSSES) == [], split


def checks(root: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for world in WORLDS:
        for rank in range(world):
            yield world, rank, torch.load(root / f"checks-{world}.rank{rank}")


def test_evaluations_come_to_the_same_on_every_process(root: Path) -> None:
    *_, expected = next(checks(root))
    for world, rank, found in checks(root):
        for name in expected:
            if name.startswith(("classes", "pixels, ")):
                assert same(found[name], expected[name], 1e-6) == [], (world, rank, name)
    summary, broken, confusion = expected["classes, whole"]
    assert summary["images"] == 5 == np.sum(confusion) and broken == 0
    assert expected["classes, broken"][1] == 1  # `measurement` refuses it
    summary, ignored, rows = expected["pixels, whole"]
    assert summary["pixels"] == 5 * 30 and ignored == 5 * 6 and len(rows) == CLASSES
    assert expected["pixels, broken"][0] == "RunFailed"
    assert "30 pixels are not finite" in expected["pixels, broken"][1]
    for kind in ("classes", "pixels"):
        error, text = expected[f"{kind}, bad"]
        assert error == "BadInput" and "1 image of the evaluation set" in text and "3)" in text


def test_pixels_of_a_loss_are_counted_over_all(root: Path) -> None:
    for world, _, found in checks(root):
        valid = sum(16 - 4 * (rank + 1) for rank in range(world))
        assert found["pixels of a loss"] == [16.0 * world, valid]


def test_all_stop_after_the_same_step_whoever_was_told(root: Path) -> None:
    by_world: dict[int, list[dict[str, Any]]] = {}
    for world, rank, found in checks(root):
        assert found["gathered"] == list(range(world))
        by_world.setdefault(world, []).append(found)
        assert found["save, True"] > 0 and found["save, False"] == 0, (world, rank)
    for world, found in by_world.items():
        stops = [{k: v for k, v in f.items() if k.startswith("stop")} for f in found]
        assert len(stops[0]) == 2 * world
        assert all(stop == stops[0] for stop in stops)
        for name, (steps, number) in stops[0].items():
            assert number == int(name.split(", ")[1])
            # After the fourth step alone; of several within two exchanges.
            assert steps == 4 if world == 1 else 4 < steps <= 8
