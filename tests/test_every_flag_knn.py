"""Every flag of main_knn.py: another value changes what it should, and nothing else."""

from pathlib import Path
from typing import Any

import every_flag_training as alike
import numpy as np
import pytest
from every_flag import Command, Row, Table, Told, Trace, Watched, cases, check_complete, digest
from every_flag_files import write_all

import main_knn
from util.measure import features

pytestmark = pytest.mark.smoke

BASE = [
    "--dataset=imagefolder", "--checkpoint={pretrained}", "--data_path={data}", "--num_workers=0",
    "--device=cpu", "--batch_size=4", "--k=3", "--save_features",
]  # fmt: skip
ALL = "features labels names votes"

TABLE: Table = {
    # ---- The encoder
    "--checkpoint": Row("--checkpoint={wide}", "features votes"),
    "--model": Row(
        "--model=vit_heads_patch4",
        "features votes",
        "--checkpoint={official} --model=vit_nano_patch4",
    ),
    "--num_heads": Row("--num_heads=4", "features votes", "--checkpoint={official} --num_heads=2"),
    "--weights_key": Row(
        "--weights_key=b", "features votes", "--checkpoint={nested} --weights_key=a --num_heads=2"
    ),
    "--pos_resize": Row("--pos_resize=extend", "features votes", "--input_size=24"),
    # ---- Data
    "--dataset": Row("--dataset=synthetic", ALL, "--train_images=12 --val_images=6"),
    "--data_path": Row("--data_path={other}", "features votes"),
    "--input_size": Row("--input_size=24", "features votes"),
    "--mean": Row("--mean 0.1 0.2 0.3", "features votes"),
    "--std": Row("--std 0.1 0.2 0.3", "features votes"),
    "--max_pixels": Row("--max_pixels=2200", "features labels votes"),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--prefetch_factor": Row("--prefetch_factor=5", "loader", "--num_workers=1"),
    "--no_pin_mem": Told("test_no_pin_mem"),
    "--val_fraction": Row("--val_fraction=0.25", ALL),
    "--val_seed": Row("--val_seed=1", "features names votes", "--val_fraction=0.25"),
    # ---- Features and neighbours
    "--features": [Row(f"--features={f}", "features votes") for f in ("cls", "both")],
    "--k": Row("--k 5 1", "votes"),
    "--temperature": Row("--temperature=1", "votes"),
    "--train_images": Row("--train_images=8", ALL),
    "--val_images": Row("--val_images=3", ALL),
    "--batch_size": Row("--batch_size=3", "loader"),
    "--query_chunk": Row("--query_chunk=2", "chunks"),
    "--bank_chunk": Row("--bank_chunk=5", "chunks"),
    # ---- The run
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--device": Told("test_device"),
    "--save_features": Row(
        "--save_features", "files features labels names", without="--save_features"
    ),
    "--dry_run": Told("test_dry_run"),
    "--dry_run_measure": Told("test_dry_run_measure"),
    **alike.DRY_RUN,
    "--dry_run_processes": Row(
        "--dry_run_processes=2", "said", "--dry_run --dry_run_images=1000000"
    ),
}


class Neighbours(Command):
    """Features, votes and what is handed on beside them."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """The loader, the chunks and the votes."""
        votes: list[str] = []
        loaders = trace["loader"] = []
        build, find = features.build_loader, main_knn.neighbours

        def build_loader(samples: Any, sampler: Any, **more: Any) -> Any:
            loaders.append((sampler.batch_size, more))
            return build(samples, sampler, **more)

        def neighbours(*rest: Any, query_chunk: int, bank_chunk: int) -> Any:
            trace["chunks"] = query_chunk, bank_chunk
            return find(*rest, query_chunk=query_chunk, bank_chunk=bank_chunk)

        def voted(scores: Any) -> None:
            votes.extend(map(digest, scores))
            trace["votes"] = votes

        patch.setattr(features, "build_loader", build_loader)
        patch.setattr(main_knn, "neighbours", neighbours)
        # In the order of the queries, whatever their chunks.
        note = Watched(main_knn.vote, voted)
        patch.setattr(main_knn, "vote", note)

    def read(self, root: Path, trace: Trace) -> None:
        """What --save_features wrote, rounded: another batch changes the last bits."""
        for name, end in (("features", "npy"), ("labels", "npy"), ("names", "txt")):
            kind = "files" if name == "names" else name
            parts = {}
            for path in root.rglob(f"{kind}-*.{end}"):
                parts[path.name] = (
                    np.load(path).round(4).tolist()
                    if end == "npy"
                    else ["/".join(Path(line).parts[-2:]) for line in path.read_text().split()]
                )
            if parts:
                trace[name] = digest(parts)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Neighbours:
    root = tmp_path_factory.mktemp("knn")
    return Neighbours("main_knn", BASE, write_all(root), root)


def test_every_flag_has_an_entry() -> None:
    check_complete(TABLE, main_knn.build_parser(), __name__)


@cases(TABLE)
def test_another_value(row: Row, runner: Neighbours) -> None:
    runner.check(row)


def test_fewer_images_are_evenly_spaced(runner: Neighbours, tmp_path: Path) -> None:
    for limit in ("", "--train_images=8 --val_images=4"):
        runner(limit, folder=tmp_path / ("some" if limit else "all"))
    for split, places in (("train", (0, 1, 3, 4, 6, 7, 9, 10)), ("val", (0, 1, 3, 4))):
        whole, some = (
            (tmp_path / name / "run" / f"files-{split}.txt").read_text().split()
            for name in ("all", "some")
        )
        assert some == [whole[i] for i in places]


def test_no_pin_mem(runner: Neighbours) -> None:
    alike.check_no_pin_mem(runner, main_knn, "")


def test_device(runner: Neighbours) -> None:
    alike.check_device(runner)


def test_dry_run(runner: Neighbours) -> None:
    alike.check_dry_run(runner)


def test_dry_run_measure(runner: Neighbours) -> None:
    trace = runner("--dry_run --dry_run_measure=1")
    assert trace["ends"] == 2 and "main_knn measures no rate" in trace["text"]
