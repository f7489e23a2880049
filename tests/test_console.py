"""What comes from outside cannot command the terminal, and is printed in any encoding."""

import fcntl
import io
import logging
import os
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from launch import PATIENCE, ROOT, TINY, steps_done, until
from PIL import Image

from util.console import print_text, visible, visible_line
from util.data.conversions import Tally
from util.errors import EXIT_BAD_INPUT, EXIT_STOPPED, BadInput
from util.progress import say
from util.train.bad_images import BadImages
from util.train.checkpoint import load_file
from util.train.logger import RunLogger, prepare_folder
from util.train.rank_log import rank_log

CLEAR = "\x1b[2J"
NO_UTF8 = os.fsdecode(b"caf\xe9.jpg")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("50 %\rerror", "50 %\\x0derror"),
        ("\x9b2J", "\\x9b2J"),  # CSI in one character
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        (NO_UTF8, "caf\\xe9.jpg"),
        ("\ud800", "\\ud800"),
        ("Näme 名前 🐈.jpg\tb\nc", "Näme 名前 🐈.jpg\tb\nc"),
    ],
)
def test_control_characters_are_written_out_and_names_stay(text, shown):
    assert visible(text) == shown
    assert visible(visible(text)) == shown


def test_a_name_does_not_break_a_list():
    assert visible_line("a\nb\t名") == "a\\x0ab\\x09名"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_prints_any_text(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_text(f"é名{CLEAR}{NO_UTF8}", stream=stream)
    printed = stream.buffer.getvalue().decode(encoding)
    assert "\\x1b[2J" in printed and "caf\\xe9" in printed
    assert "é" in printed if encoding != "ascii" else "\\xe9\\u540d" in printed


def test_what_a_run_says_and_logs_is_visible(tmp_path, capsys):
    with rank_log(tmp_path, 0):
        say(f"images of {CLEAR}{NO_UTF8}")
        logging.getLogger("mmae").error("ends: %s", CLEAR)
    printed, logged = capsys.readouterr().out, (tmp_path / "log-rank0.txt").read_text("utf-8")
    for text in (printed, logged):
        assert "\x1b" not in text and "\\x1b[2J" in text and "caf\\xe9.jpg" in text


def test_names_that_are_no_utf8_are_listed_among_bad_images(tmp_path, capsys):
    names = [NO_UTF8, "two\nlines", CLEAR]
    bad = BadImages(
        tmp_path / "bad.txt",
        lambda i: f"{names[i]}: cut",
        9,
        lambda x: [x],
        tally=Tally(),
        write=True,
    )
    bad.note(range(3))
    assert bad.agree() == 3
    lines = (tmp_path / "bad.txt").read_text("utf-8").splitlines()
    assert lines == ["caf\\xe9.jpg: cut", "two\\x0alines: cut", "\\x1b[2J: cut"]
    assert "\x1b" not in capsys.readouterr().out


def odd_names(root: Path) -> None:
    """A training folder whose class and files are not UTF-8, or hold an escape sequence."""
    for split in ("train", "val"):
        for kind in (b"caf\xe9", b"\x1b[31mred"):
            folder = os.fsencode(root / split) + b"/" + kind
            os.makedirs(folder)
            for name in (b"gut.png", b"na\xefve.png"):
                with open(folder + b"/" + name, "wb") as file:
                    Image.new("RGB", (24, 24), "red").save(file, "PNG")
            with open(folder + b"/br\xf6ken.png", "wb") as file:
                file.write(b"no image")


@pytest.mark.smoke
@pytest.mark.parametrize("command", ["main_pretrain", "main_pack", "main_visualize", "main_knn"])
def test_a_folder_of_odd_names_works_in_a_terminal_of_ascii(tmp_path, command):
    odd_names(tmp_path / "data")
    run = tmp_path / "run"
    tiny = ["--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=4", "--epochs=2"]
    tiny += ["--warmup_epochs=0", "--num_workers=1", "--device=cpu", "--decoder_depth=1"]
    data = f"--data_path={tmp_path / 'data'}"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"MMAE_CACHE": str(tmp_path / "cache")}

    def start(module: str, *flags: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(ROOT / f"{module}.py"), *flags],
            env=environment, capture_output=True, timeout=PATIENCE,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
        assert not any(b in done.stdout + done.stderr for b in (b"\x1b", b"\xe9", b"\xf6"))
        return done

    checkpoint = f"--checkpoint={run / 'checkpoint-last.pth'}"
    if command == "main_pack":
        done = start("main_pack", data, f"--output_dir={tmp_path / 'p'}", "--num_workers=1")
        assert done.returncode == 0, done.stderr
        assert b"br\\xf6ken.png" in (tmp_path / "p/train/bad_images.txt").read_bytes()
        data = f"--data_path=packed:{tmp_path / 'p'}"
    done = start("main_pretrain", *tiny, data, f"--output_dir={run}", "--eval_every=0")
    assert done.returncode == 0, done.stderr
    if command == "main_pretrain":
        assert b"br\\xf6ken.png" in (run / "bad_images.txt").read_bytes()
        assert b"caf\\xe9" in done.stdout
    elif command == "main_visualize":
        folder = f"--output_dir={tmp_path / 'v'}"
        images = os.path.join(tmp_path, "data/val", os.fsdecode(b"caf\xe9/na\xefve.png"))
        done = start("main_visualize", checkpoint, folder, "--images", images, "--device=cpu")
        assert done.returncode == 0 and b"na\\xefve.png" in done.stdout, done.stderr
    elif command == "main_knn":
        folder = f"--output_dir={tmp_path / 'k'}"
        done = start("main_knn", checkpoint, data, folder, "--device=cpu", "--k=2")
        assert done.returncode == EXIT_BAD_INPUT and b"br\\xf6ken.png" in done.stderr


def test_a_folder_of_results_that_torch_cannot_name_is_bad_input(tmp_path):
    folder = tmp_path / os.fsdecode(b"n\xefm")
    with pytest.raises(BadInput, match=r"cannot write to folder .*--output_dir or --log_dir"):
        prepare_folder(folder)
    assert not folder.exists()
    with pytest.raises(BadInput, match=r"cannot write to folder .*--output_dir or --log_dir"):
        RunLogger(tmp_path / "m.jsonl", folder)
    prepare_folder(tmp_path / "Näme 名前")


@pytest.mark.smoke
def test_a_terminal_that_is_closed_stops_a_run_which_saves(tmp_path: Path) -> None:
    """The kernel sends SIGHUP to all of its processes, and what they write then fails."""
    held, keep = os.openpty()

    def own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.setsid()
        fcntl.ioctl(keep, termios.TIOCSCTTY, 0)

    words = ["main_pretrain.py", *TINY, "--log_every=1", "--epochs=1000", "--num_workers=1"]
    child = subprocess.Popen(
        [sys.executable, *words, f"--output_dir={tmp_path}"], cwd=ROOT,
        stdin=keep, stdout=keep, stderr=keep, preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(keep)

    def begun() -> bool:
        if select.select([held], [], [], 0)[0]:
            os.read(held, 2**16)  # or the bar would wait for somebody to read
        return steps_done(tmp_path) > 2

    until(begun)
    os.close(held)
    assert child.wait() == EXIT_STOPPED
    log = (tmp_path / "log-rank0.txt").read_text()
    assert "SIGHUP" in log and "Traceback" not in log
    assert load_file(tmp_path / "checkpoint-last.pth")["step"] >= steps_done(tmp_path) > 2


@pytest.mark.smoke
@pytest.mark.parametrize("more", [["--dry_run"], []])
def test_a_reader_who_leaves_ends_no_run(more: list[str], tmp_path: Path) -> None:
    """`| head`, or a `tee` that dies: the training goes on, and its log has everything."""
    words = ["main_pretrain.py", *TINY, "--log_every=1", *more, f"--output_dir={tmp_path}"]
    child = subprocess.Popen(
        [sys.executable, "-u", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    err = child.stderr.read().decode()
    assert child.wait() == 0 and "Traceback" not in err, err
    if not more:
        assert "checkpoint" in (tmp_path / "log-rank0.txt").read_text()
        assert (tmp_path / "checkpoint-last.pth").is_file()
