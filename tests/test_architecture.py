"""The rules of the house (CONTRIBUTING.md), checked on the syntax of every file.

Each rule is a function from sources, {path: text}, to a list of violations. It is applied to the
project, and to small faulty sources that it must catch.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from commands import program_files

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
Sources = dict[str, str]
Rule = Callable[[Sources], list[str]]

# Which files belong to a place, and which other places they may import; see CONTRIBUTING.md.
# The first pattern that fits a path decides.
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "slurm": (("util/slurm.py",), ("root", "train", "config")),
    "root": (("util/*.py",), ()),
    "mask": (("util/mask/*.py",), ("root",)),
    "data": (("util/data/*.py", "util/data/sets/*.py"), ("root", "mask")),
    "train": (("util/train/*.py",), ("root", "data")),
    "measure": (("util/measure/*.py",), ("root", "mask", "data", "train")),
    "weights": (("util/weights/*.py",), ("root", "mask", "train")),
    "dry run": (("util/dry_run/*.py",), ("root", "data", "train")),
    "config": (("util/config/*.py",), ("root", "mask", "data", "train", "dry run")),
    "runs": (("util/runs/*.py",), ("root", "train", "measure", "config")),
    # What models owe to the rest, and what several of them are made of.
    "pieces": (
        ("models_layers.py", "models_batchnorm.py", "models_decoders.py", "models_targets.py",
         "models_encoder.py", "models_protocols.py"),
        ("root", "mask"),
    ),
    "encoders": (
        ("models_vit.py", "models_vit_names.py", "models_vit_relative.py",
         "models_vit_relative_names.py", "models_swin.py", "models_swin_names.py"),
        ("root", "mask", "pieces"),
    ),
    "models": (
        ("models_mmae.py", "models_pixio.py", "models_simmim.py", "models_upernet.py"),
        ("root", "mask", "pieces", "encoders"),
    ),
    # By name and from files.
    "zoo": (
        ("models_zoo.py", "models_registry.py", "models_load.py", "models_load_kinds.py",
         "models_segmenters.py"),
        ("root", "mask", "train", "weights", "pieces", "encoders", "models"),
    ),
    "engines": (("engine_*.py",), ("root", "mask", "data", "train", "measure", "pieces")),
    # What of a command a reader of its epoch loop can do without: what it is made of, what it
    # would cost, and the use of what it trained.
    "parts": (
        ("build_*.py",),
        ("root", "mask", "data", "train", "measure", "weights", "config", "pieces", "encoders",
         "models", "zoo", "engines"),
    ),
    "uses": (
        ("plan_*.py", "eval_*.py"),
        ("root", "mask", "data", "train", "measure", "weights", "dry run", "config", "pieces",
         "encoders", "models", "zoo", "engines", "parts"),
    ),
    "mains": (
        ("main_*.py",),
        ("root", "mask", "data", "train", "measure", "weights", "dry run", "config", "runs",
         "pieces", "encoders", "models", "zoo", "engines", "parts", "uses"),
    ),
    "jobs": (("submitit_*.py",), ("root", "slurm", "mains")),
    "lab": (
        ("lab/*.py", "lab/*/*.py"),
        ("root", "mask", "data", "train", "measure", "weights", "dry run", "config", "runs",
         "slurm", "pieces", "encoders", "models", "zoo", "engines", "parts", "uses", "mains",
         "jobs"),
    ),
}  # fmt: skip
# Places whose files import none of their own kind: a command is read without the others.
ALONE = ("mains", "jobs", "parts", "uses", "engines", "encoders", "models")
EXTENDS = {"models_pixio": "models_mmae"}  # a method file: the one that it is a preset of
# Folders of modules: a name of theirs goes on after the dot.
PACKAGES = {
    pattern.rpartition("/")[0] for patterns, _ in PLACES.values() for pattern in patterns
} | {"lab/bench", "lab/comparison", "lab/gpu", "lab/study"}
# A model knows nothing of data or optimisers, by itself or through what it imports.
NOT_FOR_MODELS = (
    "util.data.datasets",
    "util.data.samples",
    "util.data.transforms",
    "util.train.optim",
    "util.train.schedule",
    "util.train.step",
    "torch.optim",
    "torch.utils.data",
    "torchvision",
    "timm.data",
    "timm.optim",
    "timm.scheduler",
)
PRINTING = ("util/console.py", "util/train/rank_log.py", "util/progress.py")
LOADER = "util/train/checkpoint.py"
REQUIRED = {"torch", "torchvision", "timm", "submitit", "numpy", "tensorboard", "PyYAML", "tqdm"}
# What may be imported when a file is: those, by their import names, and torchvision's Pillow.
ALWAYS_THERE = (REQUIRED - {"PyYAML"}) | {"yaml", "PIL"}


# ---- Reading sources ---------------------------------------------------------------------------


def project_sources() -> Sources:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in program_files()}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def find_place(path: str) -> str | None:
    """The place that a file belongs to; None: to none."""
    for place, (patterns, _) in PLACES.items():
        if any(fnmatch(path, pattern) and path.count("/") == pattern.count("/")
               for pattern in patterns):  # fmt: skip
            return place
    return None


def imported(node: ast.AST, path: str) -> list[str]:
    """Modules that one node imports; `from a import b` gives a.b, for b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = path.split("/")[: -node.level] if node.level else []
        origin = ".".join([*package, *([node.module] if node.module else [])])
        return [f"{origin}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("import_module", "__import__", "needs"):
            return [str(node.args[0].value)]
    return []


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, also inside functions and by name at run time."""
    for node in ast.walk(ast.parse(text, path)):
        for module in imported(node, path):
            yield getattr(node, "lineno", 0), module


def project_module(name: str) -> str | None:
    """The module of the project that an imported dotted name means; None for other packages."""
    parts = name.split(".")
    if parts[0] in ("util", "lab"):
        depth = 1
        while depth < len(parts) and "/".join(parts[:depth]) in PACKAGES:
            depth += 1
        return ".".join(parts[:depth])
    return parts[0] if find_place(f"{parts[0]}.py") else None


# ---- Rules -------------------------------------------------------------------------------------


def imports_fit(sources: Sources) -> list[str]:
    """Each place imports what `PLACES` names; engines get models as arguments."""
    found = []
    for path, text in sources.items():
        here = find_place(path)
        if here is None and path.endswith("__init__.py"):
            here = find_place(path.replace("__init__", "face"))
        if here is None:
            found.append(f"{path}: belongs to no place; see PLACES")
            continue
        for line, name in imports(path, text):
            module = project_module(name)
            if module is None or module == module_of(path):
                continue
            place = find_place(f"{module.replace('.', '/')}.py")
            among = here not in ALONE or module == EXTENDS.get(module_of(path))
            if place is None or not (place in PLACES[here][1] or (place == here and among)):
                found.append(f"{path}:{line}: imports {module}")
    return found


def models_know_no_data(sources: Sources) -> list[str]:
    """models_* reach no data set, transform, optimiser or schedule, also not through util."""
    paths = {module_of(path): path for path in sources}

    def reached(path: str, chain: tuple[str, ...], seen: set[str]) -> Iterator[str]:
        # By one way alone: all ways through util/ took 85 seconds.
        seen.add(path)
        text = sources[path]
        modules = list(imports(path, text))
        attributes = [
            (node.lineno, ast.unparse(node))
            for node in ast.walk(ast.parse(text, path))
            if isinstance(node, ast.Attribute)
        ]
        for line, name in modules + attributes:
            for forbidden in NOT_FOR_MODELS:
                if f"{name}.".startswith(f"{forbidden}."):
                    yield f"{' -> '.join(chain)}:{line}: {forbidden}"
        for _, name in modules:
            below = paths.get(project_module(name) or "")
            if below and below.startswith("util/") and below not in seen:
                yield from reached(below, (*chain, below), seen)

    models = [path for path in sources if path.startswith("models_")]
    return sorted({violation for path in models for violation in reached(path, (path,), set())})


def one_torch_load(sources: Sources) -> list[str]:
    """Files are unpickled in one file alone, and there as tensors and plain types."""
    loaders = {"torch.load", "torch.hub.load_state_dict_from_url", "pickle.load", "pickle.loads"}
    found = []
    for path, text in sources.items():
        nodes = list(ast.walk(ast.parse(text, path)))
        known = {local: name for node in nodes for local, name in local_names(node, path)}
        for node in nodes:
            if path != LOADER and isinstance(node, ast.Attribute | ast.Name):
                first, dot, rest = ast.unparse(node).partition(".")
                if known.get(first, "") + dot + rest in loaders:
                    found.append(f"{path}:{node.lineno}: loads a file; use {LOADER}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if path == LOADER and given.get("weights_only") != "True":
                    found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
    return found


def local_names(node: ast.AST, path: str) -> Iterator[tuple[str, str]]:
    """(name in this file, what it stands for) of one import."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias, name in zip(node.names, imported(node, path), strict=True):
            if alias.asname or isinstance(node, ast.ImportFrom):
                yield alias.asname or alias.name, name
            else:  # `import torch.hub` binds torch
                yield name.split(".")[0], name.split(".")[0]


def names_say_the_job(sources: Sources) -> list[str]:
    """No file or folder is called misc or utils."""
    return [
        f"{path}: name it after its one job"
        for path in sources
        if {"misc", "utils"} & set(path.removesuffix(".py").lower().split("/"))
    ]


def no_bare_except(sources: Sources) -> list[str]:
    """Every except names what it expects."""
    return [
        f"{path}:{node.lineno}: bare except"
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text, path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of parameters, variables and attributes that are set.

    A variadic ``*args`` is Python's idiom for passing on, not a set of flags; it does not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            given = [*node.posonlyargs, *node.args, *node.kwonlyargs, node.kwarg]
            yield from ((a.lineno, a.arg) for a in given if a is not None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, a.asname) for a in node.names if a.asname)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def args_stops_at_main(sources: Sources) -> list[str]:
    """Below the commands functions take named parameters; util/config/flags.py makes the flags.

    A command is its main and the files beside it that are its own.
    """
    return [
        f"{path}:{line}: args; take named parameters"
        for path, text in sources.items()
        if not path.startswith(("main_", "submitit_", "build_", "plan_", "eval_"))
        and path not in ("util/config/flags.py", "lab/gpu/roofline.py")
        and not re.fullmatch(r"lab/\w+/command\.py", path)
        for line, name in bound_names(ast.parse(text, path))
        if name == "args"
    ]


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Nodes that run when the file is imported: not functions' bodies, nor TYPE_CHECKING's."""
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))


def extras_where_used(sources: Sources) -> list[str]:
    """At import a file needs the standard library, the project, and requirements.txt alone."""
    found = []
    for path, text in sources.items():
        for node in run_at_import(ast.parse(text, path).body):
            for name in imported(node, path):
                package = name.split(".")[0]
                known = package in ALWAYS_THERE or package in sys.stdlib_module_names
                if not known and project_module(name) is None:
                    found.append(
                        f"{path}:{getattr(node, 'lineno', 0)}: imports the extra {package}"
                    )
    return found


def text_through_console(sources: Sources) -> list[str]:
    """What is printed may hold escape sequences: util.console (or say, for a run) shows them."""
    return [
        f"{path}:{node.lineno}: prints; use util.console.print_text"
        for path, text in sources.items()
        if path not in PRINTING
        for node in ast.walk(ast.parse(text, path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write")
    ]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        imports_fit,
        models_know_no_data,
        one_torch_load,
        names_say_the_job,
        no_bare_except,
        args_stops_at_main,
        extras_where_used,
        text_through_console,
    )
}


@pytest.mark.parametrize("rule", RULES)
def test_project_keeps_rule(rule: str) -> None:
    sources = project_sources()
    assert "util/errors.py" in sources, "the project was not found"
    violations = RULES[rule](sources)
    assert not violations, "\n".join([str(RULES[rule].__doc__), *violations])


def test_names_of_all_files_say_the_job() -> None:
    hidden_or_made = re.compile(r"(^|/)(\.|__pycache__|output_dir)")
    paths = [p.relative_to(ROOT).as_posix() for top in ROOT.iterdir() for p in _python_files(top)]
    assert "tests/test_architecture.py" in paths
    assert not names_say_the_job({p: "" for p in paths if not hidden_or_made.search(p)})


def _python_files(top: Path) -> list[Path]:
    if top.name.startswith("."):
        return []  # .venv is large
    return list(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py")


FAULTS = [
    ("imports_fit", "main_a.py", "import main_b", "main_b"),
    ("imports_fit", "main_a.py", "def f():\n    from main_b import x", "main_a.py:2"),
    ("imports_fit", "main_a.py", "import submitit_pretrain", "submitit_pretrain"),
    ("imports_fit", "main_a.py", "from lab.bench.limits import x", "lab.bench.limits"),
    ("imports_fit", "submitit_a.py", "import submitit_b", "submitit_b"),
    ("imports_fit", "plan_a.py", "import main_a", "main_a"),
    ("imports_fit", "plan_finetune.py", "import eval_finetune", "eval_finetune"),
    ("imports_fit", "build_a.py", "from util.dry_run.report import x", "util.dry_run.report"),
    ("imports_fit", "build_a.py", "from build_finetune import x", "build_finetune"),
    ("imports_fit", "engine_a.py", "from build_finetune import x", "build_finetune"),
    ("imports_fit", "engine_a.py", "from models_vit import x", "models_vit"),
    ("imports_fit", "engine_a.py", "import engine_b", "engine_b"),
    ("imports_fit", "engine_a.py", "from main_pretrain import main", "main_pretrain"),
    ("imports_fit", "engine_a.py", "from util.config import flags", "util.config.flags"),
    ("imports_fit", "models_mmae.py", "import engine_pretrain as e", "engine_pretrain"),
    ("imports_fit", "models_mmae.py", "import models_upernet", "models_upernet"),
    ("imports_fit", "models_vit.py", "import models_mmae", "models_mmae"),
    ("imports_fit", "util/a.py", "from models_zoo import create_model", "models_zoo"),
    ("imports_fit", "util/a.py", "from util.train.run import Run", "util.train.run"),
    ("imports_fit", "util/mask/a.py", "from ..data import images", "util.data.images"),
    ("imports_fit", "util/data/a.py", "from util.train.step import x", "util.train.step"),
    ("imports_fit", "util/data/sets/a.py", "import util.measure.knn", "util.measure.knn"),
    ("imports_fit", "util/train/a.py", "from util.config.flags import x", "util.config.flags"),
    ("imports_fit", "util/runs/a.py", "from lab.study.rates import x", "lab.study.rates"),
    ("imports_fit", "util/a.py", "import importlib\nimportlib.import_module('main_b')", "main_b"),
    ("imports_fit", "util/other/a.py", "", "belongs to no place"),
    ("imports_fit", "helpers_a.py", "", "belongs to no place"),
    ("models_know_no_data", "models_a.py", "from util.data.samples import x", "util.data.samples"),
    ("models_know_no_data", "models_a.py", "from util.train import optim", "util.train.optim"),
    ("models_know_no_data", "models_a.py", "import util.data.transforms", "util.data.transforms"),
    ("models_know_no_data", "models_a.py", "from torch.utils.data import Dataset", "torch.utils"),
    ("models_know_no_data", "models_a.py", "import torch\ntorch.optim.SGD", "torch.optim"),
    ("models_know_no_data", "models_a.py", "import torchvision", "torchvision"),
    ("one_torch_load", "main_a.py", "import torch\ntorch.load('f')", "main_a.py:2"),
    ("one_torch_load", "util/a.py", "import torch as t\nt.load('f')", "util/a.py:2"),
    ("one_torch_load", "util/a.py", "from torch import load as read\nread('f')", "util/a.py:2"),
    ("one_torch_load", "util/a.py", "import torch.hub\nf = torch.load", "util/a.py:2"),
    ("one_torch_load", "util/a.py", "import pickle\npickle.load(f)", "util/a.py:2"),
    ("one_torch_load", "util/train/checkpoint.py", "import torch\ntorch.load('f')", "weights_only"),
    (
        "one_torch_load",
        "util/train/checkpoint.py",
        "torch.load('f', weights_only=False)",
        "weights_only",
    ),
    ("names_say_the_job", "util/misc.py", "", "util/misc.py"),
    ("names_say_the_job", "utils/masking.py", "", "utils/masking.py"),
    ("no_bare_except", "util/a.py", "try:\n    f()\nexcept:\n    pass", "util/a.py:3"),
    ("args_stops_at_main", "engine_a.py", "def f(args): ...", "engine_a.py:1"),
    ("args_stops_at_main", "engine_a.py", "def f(*, args=None): ...", "engine_a.py:1"),
    ("args_stops_at_main", "models_a.py", "f = lambda args: args", "models_a.py:1"),
    ("args_stops_at_main", "util/a.py", "args = 1", "util/a.py:1"),
    ("args_stops_at_main", "util/a.py", "for i, args in x: ...", "util/a.py:1"),
    ("args_stops_at_main", "util/a.py", "def f(self, a):\n    self.args = a", "util/a.py:2"),
    ("text_through_console", "main_a.py", "print(path)", "main_a.py:1"),
    ("text_through_console", "util/a.py", "sys.stderr.write(name)", "util/a.py:1"),
    ("extras_where_used", "util/a.py", "import skimage", "skimage"),
    ("extras_where_used", "util/a.py", "try:\n    import onnx\nexcept ImportError: ...", "onnx"),
    ("extras_where_used", "main_a.py", "from transformers import ViTMAEModel", "transformers"),
]


@pytest.mark.parametrize(("rule", "path", "text", "expected"), FAULTS)
def test_rule_catches_fault(rule: str, path: str, text: str, expected: str) -> None:
    violations = RULES[rule]({path: text})
    assert len(violations) == 1, violations
    assert expected in violations[0]


def test_every_rule_is_shown_a_fault() -> None:
    assert {rule for rule, *_ in FAULTS} == set(RULES)


def test_model_reaches_data_through_util() -> None:
    sources = {
        "models_a.py": "from util.rows import f",
        "util/rows.py": "from util.columns import g",
        "util/columns.py": "from torch.utils.data import Dataset\nfrom util.rows import f",
    }
    (violation,) = models_know_no_data(sources)
    assert violation.startswith("models_a.py -> util/rows.py -> util/columns.py:1:")


def test_rules_accept_what_is_right() -> None:
    sources = {
        "submitit_a.py": "import submitit\nimport main_a\nfrom util.slurm import submit",
        "main_a.py": "import engine_a, models_zoo\nfrom util.train import optim\nargs = 1",
        "engine_a.py": "import torch.optim\nfrom util.data.datasets import build_loader",
        "models_zoo.py": "import models_mmae, timm.layers\nfrom util.mask.patches import p",
        "models_mmae.py": "from torch import nn\nimport models_layers, models_vit",
        "models_segmenters.py": "import models_zoo\nfrom util.weights.files import load_state",
        "models_layers.py": "",
        "lab/bench/a.py": "import main_a, models_zoo\nfrom lab.study import rates",
        LOADER: "import torch\ndef f(): return torch.load(p, weights_only=True)",
        "util/data/b.py": "import torch.utils.data\nfrom . import a\nfrom ..names import n",
        "util/data/sets/cifar.py": "from util.data import images\nfrom util.mask.patches import p",
        "util/mask/patches.py": "import yaml, PIL\ndef f():\n    import skimage",
        "util/config/flags.py": "def parse(args): ...",
        "util/errors.py": "import json\ndef w(*args, **kwargs): return json.load(*args, **kwargs)",
    }
    assert {name: rule(sources) for name, rule in RULES.items()} == {name: [] for name in RULES}


# ---- Requirements and skips --------------------------------------------------------------------


def test_requirements_are_the_eight() -> None:
    text = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]
    assert sorted(names) == sorted(REQUIRED)
    without_range = [line for line in lines if not re.fullmatch(r"[\w.-]+>=[\d.]+", line)]
    assert not without_range, "give a lower bound; cap a version only with a comment that says why"


@pytest.mark.parametrize(
    ("ci", "reason", "code"),
    [("true", "no cluster", 1), ("true", "gpu: none here", 0), ("", "no cluster", 0)],
)
@pytest.mark.parametrize("module_level", [False, True])
def test_ci_fails_on_a_skip_it_can_avoid(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    ci: str,
    reason: str,
    code: int,
    module_level: bool,
) -> None:
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    call = f"pytest.skip({reason!r}, allow_module_level=True)"
    body = call if module_level else f"def test_it():\n    {call}"
    pytester.makepyfile(test_skips=f"import pytest\n{body}", test_runs="def test_it(): assert True")
    result = pytester.runpytest_inprocess()
    assert result.ret == code
    assert ("skips that CI can avoid" in result.stdout.str()) == bool(code)
