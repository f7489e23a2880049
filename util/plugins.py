"""Plugins: files of a user that register models, encoders, masks, data sets or targets.

A plugin is a Python file outside of this repository. `--plugin FILE.py` runs it before the flags
are read, so that what it registers has its names, choices and flags like everything else. A
checkpoint holds the name and the hash of each plugin that its run had.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import BadInput
from util.names import registering_for


@dataclass(frozen=True)
class Plugin:
    """A plugin that was loaded.

    Attributes:
        name: of its file, without the ending.
        path: absolute.
        sha256: of its content, hexadecimal.
    """

    name: str
    path: Path
    sha256: str


LOADED: dict[str, Plugin] = {}  # by name, in the order in which they were loaded


def load_plugin(path: Path) -> Plugin:
    """Run a plugin's file; one that is loaded already, and has not changed, is not run again.

    Its module has the file's name, and its folder is appended to `sys.path`: loading processes
    that start anew find it there.

    Raises:
        BadInput: no such file, a name that is taken, or a fault while it runs.
    """
    path = path.resolve()
    name = path.stem
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"--plugin {path} cannot be read: {error.strerror}") from error
    plugin = Plugin(name, path, hashlib.sha256(content).hexdigest())
    if LOADED.get(name) == plugin:
        return plugin
    if path.suffix != ".py" or not name.isidentifier():
        raise BadInput(
            f"--plugin {path} must be a .py file whose name could be a Python variable's"
        )
    if name in LOADED and LOADED[name].path != path:
        raise BadInput(f"--plugin {path}: {LOADED[name].path} has that name already; rename one")
    if name not in LOADED and (name in sys.modules or _is_installed(name, path)):
        raise BadInput(f"--plugin {path}: there is a module {name!r} already; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes are pickled by their module's name
    try:
        with registering_for(name):
            spec.loader.exec_module(module)
    except BadInput as error:
        del sys.modules[name]
        raise BadInput(f"--plugin {path}: {error}") from error
    except Exception as error:
        del sys.modules[name]
        what = f"{type(error).__name__}: {error} ({_line(error, path)})"
        raise BadInput(f"--plugin {path} cannot be loaded: {what}") from error
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    LOADED[name] = plugin
    return plugin


def _is_installed(name: str, path: Path) -> bool:
    """Whether Python finds another module of that name."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return True
    return spec is not None and (spec.origin is None or Path(spec.origin).resolve() != path)


def _line(error: BaseException, path: Path) -> str:
    """Where in the plugin it went wrong."""
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.lineno:
        number = error.lineno
    return f"line {number}"


def loaded_plugins() -> list[dict[str, str]]:
    """The plugins of this process, for a checkpoint: name, path and hash of each."""
    return [{"name": p.name, "path": str(p.path), "sha256": p.sha256} for p in LOADED.values()]


def check_plugins(wanted: Iterable[Mapping[str, Any]], source: str) -> list[str]:
    """See that the plugins of a checkpoint's run are here.

    Args:
        wanted: what `loaded_plugins` gave then.
        source: the checkpoint's name, for messages.

    Returns:
        a text for each whose content has changed since.

    Raises:
        BadInput: one is missing.
    """
    changed = []
    for one in wanted:
        here = LOADED.get(one["name"])
        if here is None:
            raise BadInput(
                f"{source} was made with the plugin {one['name']} ({one['path']}, sha256 "
                f"{one['sha256'][:12]}); give it with --plugin FILE.py"
            )
        if here.sha256 != one["sha256"]:
            changed.append(
                f"plugin {here.name} has changed since {source} was written: sha256 "
                f"{one['sha256'][:12]} then, {here.sha256[:12]} now ({here.path})"
            )
    return changed
