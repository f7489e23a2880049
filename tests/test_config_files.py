"""Every YAML file that a command reads: what is odd is refused at once, by file and place."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import main_pretrain
from util.config.recipes import read_layers
from util.errors import BadInput
from util.flag_types import expanded_path
from util.runs.arms import read_arms
from util.runs.curves import read_curve
from util.runs.paper_tables import read_paper
from util.runs.plan import read_plan
from util.yaml_files import MOST_BYTES, MOST_VALUES, read_settings, read_yaml


def read_run(path: Path) -> object:
    """A run folder whose saved settings are this file; the curve's own file is in order."""
    path.rename(path.with_name("config.yaml"))
    path.with_name("metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1}\n')
    return read_curve(path.with_name("metrics.jsonl"))


READERS: dict[str, Callable[[Path], object]] = {
    "recipe": read_layers,
    "command line": lambda path: main_pretrain.build_parser().parse([f"--config={path}"]),
    "plan": lambda path: read_plan(path, ["main_pretrain"]),
    "paper": lambda path: read_paper(path, path.parent),
    "run": read_run,
}
LAUGHS = "a0: &a0 [ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
ODD = {
    "nested aliases": (LAUGHS, f"more than {MOST_VALUES:,} values.*line 6"),
    "itself": ("a: &a [1, *a]", "stands inside of what it is.*line 1, column 11"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "more than 32 levels"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(500)), "more than 32 levels"),
    "no date": ("epochs: 1\nblr: 2020-13-45", "month must be in 1..12.*line 2"),
    "digits": ("epochs: " + "9" * 5000, "line 1, column 9"),
    "hexadecimal digits": ("epochs: 0x" + "f" * 5000, "more than 40 digits.*line 1"),
    "NUL": ("output_dir: a\0b", "not YAML"),
    "half a character": (b"output_dir: \xff", "not YAML"),
    "large": ("#" * (MOST_BYTES + 1), "larger than"),
    "twice": ("blr: 1\nblr: 2", "'blr' stands twice.*line 2"),
    "a key that is a list": ("[1, 2]: 3", "must be one word.*line 1"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]", "line 1, column 4"),
    "a list": ("- 1\n- 2", "mapping|tables like"),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ODD)
def test_odd_contents_are_refused(reader: str, kind: str, tmp_path: Path) -> None:
    content, expected = ODD[kind]
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        READERS[reader](path)
    text = str(caught.value)
    assert re.search(expected, text) and "yaml" in text, text
    assert len(text) < 1000 and "\n" not in text


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_waited_for(reader: str, tmp_path: Path) -> None:
    for kind, make in {
        "pipe": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink("/dev/zero", p),
    }.items():  # fmt: skip
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / "odd.yaml")
        with pytest.raises(BadInput, match=r"cannot read|holds no curve"):
            READERS[reader](folder / "odd.yaml")


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b", "x" * 5000, ""):
        with pytest.raises(BadInput):
            read_yaml(Path(name), "the file")
        with pytest.raises(BadInput):
            main_pretrain.build_parser().parse([f"--config={name}"])


def test_aliases_and_merges_of_a_person_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    a = {"x": 1, "y": [1, 2]}
    assert read_yaml(path, "it") == {"a": a, "b": a, "c": {"x": 3, "y": [1, 2]}}


def test_saved_settings_with_aliases_are_read(tmp_path: Path) -> None:
    """PyYAML writes an alias where two flags have the same list."""
    stats, path = [0.5, 0.5], tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"mean": stats, "std": stats}))
    assert "*id001" in path.read_text()
    assert read_settings(path) == {"mean": stats, "std": stats}


def test_combinations_without_end_are_refused(tmp_path: Path) -> None:
    factors = {f"f{i}": {"on": {}, "off": {}} for i in range(60)}
    with pytest.raises(BadInput, match="combinations of levels; expected at most 1000"):
        read_arms({"set": {"factors": factors}}, tmp_path)


# ---- Values of a recipe are those of a command line --------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("betas: [[1, 2], 3]", "betas in .* cannot be"),
        ("mean: [.5, null]", "mean in .* cannot be"),
        ("mean: [.5, '--seed=3']", "is a flag, not a value"),
        ("mean: !!set {a, b}", "cannot be"),
        ("output_dir: ''", "output_dir: is empty"),
        ('output_dir: "a\\0b"', "NUL"),
        ("crop_scale: [1.0e-9, 1.0e-9]", "at least 0.0001"),
    ],
)
def test_values_that_a_flag_does_not_take(text: str, expected: str, tmp_path: Path) -> None:
    import main_finetune

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=expected):
        main_finetune.build_parser().parse([f"--config={path}"])


def test_home_is_expanded_in_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("log_dir: ~/logs\nresume: ~/start.pth\n")
    (tmp_path / "sub").mkdir()
    recipe = tmp_path / "sub" / "recipe.yaml"
    recipe.write_text("extends: ~/base.yaml\noutput_dir: ~/x\ndata_path: packed:~/data\n")
    found = main_pretrain.build_parser().parse(["--config=~/sub/recipe.yaml"])
    assert found.output_dir == f"{tmp_path}/x" and found.data_path == f"packed:{tmp_path}/data"
    assert (found.log_dir, found.resume) == (f"{tmp_path}/logs", f"{tmp_path}/start.pth")


def test_what_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in {
        "~": "/home/me", "~/x": "/home/me/x", "hf:~/x?image=a": "hf:/home/me/x?image=a",
        "hf:name/of": "hf:name/of", "a/~/b": "a/~/b", "./~x": "./~x", "https://a/~b": "https://a/~b",
        "auto": "auto", "$HOME/x": "$HOME/x",
    }.items():  # fmt: skip
        assert expanded_path(text) == expected
