"""What README and docs show runs: every command and every program of a page, at a tiny size.

A page is read from top to bottom in one folder, as a reader would type it. Folders of theirs
(`MINE`, `DATA`, `IMAGENET` ...) are there, tiny. Length, batch and size are made small. A block
that needs what we lack says so in a comment before it: `<!-- needs: 8 GPUs -->`.
"""

import glob
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from registries import registered_apart

import main_pretrain
from engine_pretrain import show_reconstruction
from models_zoo import CLASSIFIERS, MODELS, load_pretrained
from util.config.finetune_flags import build_parser as finetune_parser
from util.config.segment_flags import build_parser as segment_parser

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
MADE = ("docs/flags.md", "docs/study.md")  # by programs that have tests of their own
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]+?) -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# What prepares a machine, or only shows a place.
NOT_RUN = ("git", "cd", "pip", "apt-get", ".")
# Measures the machine, or takes hours: its flags are looked at.
PARSED = (
    "lab.bench",
    "lab.comparison",
    "lab.study",
    "lab.gpu",
    "lab.gpu.roofline",
    "lab.compare_commits",
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    kind: str
    text: str
    title: str | None
    needs: str | None

    def commands(self) -> Iterator[list[str]]:
        """The words of each command."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def count_tuned_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(m["kind"], m["text"], m["title"], m["needs"]) for m in BLOCK.finditer(text)] + [
        Block("bash", command.replace("...", "--dry_run"), None, None)
        for command in re.findall(r"^\|[^|]+\| `(python [^`]+)` \|", text, re.MULTILINE)
    ]


# ---- A tiny world ------------------------------------------------------------------------------


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


def write_masks(images: Path, masks: Path) -> None:
    masks.mkdir(parents=True)
    for path in images.iterdir():
        labels = np.random.default_rng(len(path.name)).integers(0, 151, (40, 48), np.uint8)
        Image.fromarray(labels).save(masks / f"{path.stem}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: folders of images, and a finished run."""
    root = tmp_path_factory.mktemp("world")
    for name in ("MINE", "photos"):
        write_images(root / name, 12, 1)
    for name in ("DATA", "IMAGENET", "IN1K"):
        for split, count in (("train", 6), ("val", 3)):
            for number, label in enumerate(("ant", "bee")):
                write_images(root / name / split / label, count, number)
    for number, label in enumerate(("cat", "dog")):
        write_images(root / "classes" / label, 10, number)
    for split in ("training", "validation"):
        write_images(root / "ADE" / "images" / split, 4, 7)
        write_masks(root / "ADE" / "images" / split, root / "ADE" / "annotations" / split)
    import datasets

    saved = datasets.load_dataset("imagefolder", data_dir=str(root / "DATA"))
    saved.save_to_disk(root / "saved")
    flags = ["--data_path", str(root / "DATA"), "--output_dir", str(root / "RUN")]
    main_pretrain.main([*flags, *SMALL["main_pretrain"], *SMALL_MODEL["main_pretrain"]])
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type in, with that of the world in it."""
    for path in [*world.iterdir(), ROOT / "recipes", ROOT / "docs"]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- Made small --------------------------------------------------------------------------------

LOADING = ["--num_workers=0", "--device=cpu"]
TRAINING = [*LOADING, "--batch_size=4", "--warmup_epochs=0", "--save_every=0", "--train_images=8"]
SMALL = {
    "main_pretrain": [*TRAINING, "--accum_iter=1", "--epochs=1", "--eval_images=4"],
    "main_finetune": [*TRAINING, "--accum_iter=1", "--epochs=1", "--val_images=4"],
    "main_segment": [
        *LOADING, "--batch_size=2", "--iterations=2", "--warmup_iterations=1", "--channels=8",
        "--aux_channels=8", "--input_size=32", "--resize", "48", "40", "--window=32",
        "--stride=24", "--eval_every=2", "--save_every=0", "--train_images=4", "--val_images=2",
    ],
    "main_knn": [*LOADING, "--k=3", "--train_images=8", "--val_images=4"],
    "main_visualize": ["--device=cpu", "--num_images=2"],
    "main_predict": LOADING,
    "main_export": [],
    "main_pack": ["--num_workers=0"],
    "main_tables": [],
}  # fmt: skip
# Of a command that trains from random weights, with a model of the framework that is not small.
SMALL_MODEL = {
    "main_pretrain": ["--model=mae_vit_micro_patch8", "--input_size=32"],
    "main_finetune": ["--model=vit_micro_patch8", "--input_size=32"],
    "main_segment": ["--model=vit_micro_patch8"],
}


def small(main: str, words: list[str]) -> list[str]:
    """Further words that make a command small."""
    if "--dry_run" in words:
        return []
    if main == "main_segment" and {"--eval", "--predict"} & set(words):
        return [*LOADING, "--window=32", "--stride=24", *(["--val_images=2"] * ("--eval" in words))]
    if main == "main_finetune" and "--eval" in words:
        return [*LOADING, "--val_images=4"]
    more = list(SMALL[main])
    if main == "main_pretrain":
        args = main_pretrain.build_parser(words).parse(words)
        if args.model in MODELS and MODELS.owners[args.model] is None and "micro" not in args.model:
            more += SMALL_MODEL[main]
        if args.epochs <= 4:  # of a page that trains longer
            more.remove("--epochs=1")
    elif main in SMALL_MODEL:
        parser = finetune_parser(words) if main == "main_finetune" else segment_parser(words)
        args = parser.parse(words)
        if args.finetune is None and CLASSIFIERS.owners.get(args.model) is None:
            more += SMALL_MODEL[main]
        elif args.finetune and args.model:  # what the page pretrained before was small
            more += SMALL_MODEL[main][:1]
    return more


def run_command(words: list[str], run_main: Callable[..., tuple[int, str, str]]) -> None:
    """Do what a line of a page says."""
    words = [match for word in words for match in sorted(glob.glob(word)) or [word]]
    line = shlex.join(words)
    if words[0] in NOT_RUN:
        return
    if words[0] == "make":
        made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        targets = [word for word in words[1:] if "=" not in word and word != "&&"]
        assert set(targets) - {"."} - {w for w in targets if "/" in w} <= set(made), line
        return
    if words[:2] == ["python", "-m"]:
        assert words[2] in PARSED, line
        if words[2] == "lab.bench":
            from lab.bench.command import build_parser

            build_parser().parse(words[3:])
        return
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert words[0] in ("python", "torchrun"), f"an unknown program: {line}"
    main, flags = words[start].removesuffix(".py"), words[start + 1 :]
    if main.startswith("submitit_"):
        flags, more = [w for w in flags if w != "--dry_run"], ["--dry_run"]
    else:
        more = small(main, flags)
    code, out, err = run_main(main, [*flags, *more])
    allowed = {0, 1} if "--compare" in words else {0}
    assert code in allowed, f"{line}\n{out[-2000:]}\n{err[-3000:]}"


@pytest.mark.smoke
@pytest.mark.parametrize("page", [page for page in PAGES if page not in MADE])
def test_a_page_runs_from_top_to_bottom(page: str, here: Path, run_main: Any) -> None:
    with registered_apart():
        if page == "README.md":  # whose table names the file of another page
            for block in count_tuned_blocks("docs/extending.md"):
                if block.title:
                    (here / block.title).write_text(block.text)
        for block in count_tuned_blocks(page):
            if block.needs or block.kind in ("text", "yaml"):
                continue
            if block.title:
                (here / block.title).write_text(block.text)
            elif block.kind == "python":
                exec(compile(block.text, page, "exec"), {"__name__": "page"})
            else:
                assert block.kind == "bash", (page, block.kind)
                for words in block.commands():
                    run_command(words, run_main)


def test_every_block_of_a_page_is_one_that_is_read() -> None:
    """A fence of another form would be passed over."""
    for page in PAGES:
        fences = re.findall(r"^```", (ROOT / page).read_text(), re.MULTILINE)
        tabled = sum(
            b.text.startswith("python ") and "\n" not in b.text for b in count_tuned_blocks(page)
        )
        assert len(fences) == 2 * (len(count_tuned_blocks(page)) - tabled), page


# ---- The pages themselves ----------------------------------------------------------------------


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120]


def anchors(page: Path) -> set[str]:
    """The headings of a page as mkdocs links to them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    cleaned = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in cleaned}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M)
    for link in links:
        if link.startswith(("http", "mailto")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), (page, link)
        assert not anchor or anchor in anchors(target), (page, link, sorted(anchors(target)))


def test_the_page_of_flags_is_what_the_parsers_say() -> None:
    from lab.flags_page import PAGE, page

    assert PAGE.read_text() == page(), "it is stale: python -m lab.flags_page"


def test_the_page_of_checkpoints_has_every_key() -> None:
    from test_every_key import KEYS

    text = (ROOT / "docs" / "checkpoint.md").read_text()
    told = {name for row in re.findall(r"^\| (`[^|]+) \|", text, re.M)
            for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert {key.pattern.split(".")[0] for key in KEYS} <= told


@pytest.mark.smoke
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "search" / "search_index.json").stat().st_size > 50_000


@pytest.mark.smoke
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells in one namespace, as its kernel does, with a training of one epoch."""
    cells = json.loads((ROOT / "notebooks" / "first_run.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(len(source.splitlines()) <= 15 for source in sources)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for source in sources:
        exec(compile(source.replace("EPOCHS = 12", "EPOCHS = 1"), "first_run", "exec"), namespace)
    assert namespace["EPOCHS"] == 1 and namespace["picture"].width > 300
    assert {p.name for p in Path("first_run").glob("*.png")} == {
        "average.png", "block.png", "grid.png",
    }  # fmt: skip


def stands_in(panel: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture holds another one somewhere, enlarged by a whole number or not."""
    for scale in range(1, 9):
        large = panel.repeat(scale, 0).repeat(scale, 1)
        h, w = large.shape[:2]
        corners = np.argwhere((picture == large[0, 0]).all(-1))
        for top, left in corners:
            if np.array_equal(picture[top : top + h, left : left + w], large):
                return True
    return False


def test_a_picture_from_python_is_the_commands(world: Path, tmp_path: Path, run_main: Any) -> None:
    """`show_reconstruction` draws what `main_visualize.py` draws."""
    model, state = load_pretrained(str(world / "RUN"))
    paths = sorted((world / "MINE").iterdir())[:2]
    picture = show_reconstruction(model, paths, state, seed=3, mask="block", mask_ratio=0.5)
    folder = tmp_path / "seen"
    flags = [f"--checkpoint={world / 'RUN'}", "--seed=3", "--mask=block", "--mask_ratio=.5"]
    images = ["--images", *map(str, paths)]
    code, _, err = run_main("main_visualize", [*flags, *images, f"--output_dir={folder}"])
    assert code == 0, err
    # The command has a title and captions of PSNR; the panels stand in both, pixel for pixel.
    ours, theirs = (
        np.asarray(p.convert("RGB")) for p in (picture, Image.open(folder / "grid.png"))
    )
    panels = sorted((folder / "panels").iterdir())
    assert len(panels) == 6  # of two images: original, masked, reconstruction
    for path in panels:
        panel = np.asarray(Image.open(path).convert("RGB"))
        assert stands_in(panel, theirs), path
        assert stands_in(panel, ours), path
