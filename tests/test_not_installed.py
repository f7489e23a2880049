"""M-MAE is run from its folder: pip refuses in one sentence, and PYTHONPATH makes it importable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

from util import not_installed


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, text=True, capture_output=True)


@pytest.mark.smoke
def test_pip_says_why_and_what_to_do_without_a_traceback(tmp_path: Path) -> None:
    words = ["-m", "pip", "--isolated", "--disable-pip-version-check", "wheel", "--no-index"]
    words += ["--no-deps", "--no-build-isolation", str(ROOT), "-w", str(tmp_path)]
    ended = run(*words, cwd=tmp_path)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 1 and list(tmp_path.iterdir()) == []
    assert output.count(not_installed.REASON) == 1 and "Traceback" not in output
    for words_of in ("pip install -r requirements.txt", "main_pretrain.py --help", "PYTHONPATH"):
        assert words_of in not_installed.REASON
    assert "\n" not in not_installed.REASON and (ROOT / "requirements.txt").exists()


HOOKS = (
    "get_requires_for_build_wheel", "prepare_metadata_for_build_wheel", "build_wheel",
    "get_requires_for_build_editable", "prepare_metadata_for_build_editable", "build_editable",
    "get_requires_for_build_sdist", "build_sdist",
)  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_builds_anything(hook: str) -> None:
    with pytest.raises(SystemExit, match="put the clone on PYTHONPATH"):
        getattr(not_installed, hook)("folder", None)


def test_the_backend_needs_nothing_but_python(tmp_path: Path) -> None:
    """An editable install, as pip's build environment would start it: -S has no site-packages."""
    code = "import util.not_installed as backend; backend.build_editable('.')"
    ended = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert ended.returncode == 1 and ended.stderr == f"{not_installed.REASON}\n"


@pytest.mark.smoke
def test_the_clone_on_the_path_can_be_imported_from_anywhere(tmp_path: Path) -> None:
    code = (
        "import models_zoo; print(type(models_zoo.create_model('mae_vit_micro_patch4')).__name__)"
    )
    ended = run("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert ended.stdout == "MaskedAutoencoderViT\n", ended.stderr
