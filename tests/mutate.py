"""How tight the net of tests is: small faults are put into the code, one at a time, and tests run.

    python tests/mutate.py --record                                     # once: who runs which line
    python tests/mutate.py --count 160 --json output_dir/mutate/result.json
    python tests/mutate.py --count 160 --again output_dir/mutate/result.json --enough 900  # unseen

Faults are drawn at random, the same for a seed, over the core files: an argument that is not handed
on, a condition turned round, a call for its effect left out, a number one off, an entry of a
dictionary or a tuple lost, two operators exchanged. For each, the tests that run its line are made,
the quickest first, until one fails. A fault that none sees is listed, for someone to look at: many
do not change behaviour (a message, a speed, a check of what cannot be).

Nothing here touches the working tree: each lane has a copy of it.
"""

import argparse
import ast
import bisect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a fault may change in: the product's core. Words for people and the laboratory are not in it.
CORE = (
    "main_pretrain", "main_finetune", "main_segment", "main_knn", "main_export", "main_predict",
    "build_finetune", "build_knn", "build_pretrain", "build_segment", "engine_finetune",
    "engine_pretrain", "engine_segment", "engine_train", "eval_finetune", "eval_pretrain",
    "eval_segment", "models_batchnorm", "models_decoders", "models_encoder", "models_layers",
    "models_load",
    "models_load_kinds", "models_mmae", "models_pixio", "models_protocols", "models_registry",
    "models_segmenters", "models_simmim", "models_swin", "models_swin_names", "models_targets",
    "models_upernet", "models_vit", "models_vit_names", "models_vit_relative",
    "models_vit_relative_names", "models_zoo", "util/data/class_names",
    "util/data/datasets", "util/data/hub_pairs", "util/data/images", "util/data/label_maps",
    "util/data/label_values", "util/data/listing", "util/data/loading", "util/data/packed",
    "util/data/packing", "util/data/pair_files", "util/data/pixels", "util/data/randomness",
    "util/data/replace", "util/data/samples", "util/data/segmentation_sets",
    "util/data/segmentation_transforms", "util/data/source", "util/data/splits",
    "util/data/transforms", "util/files", "util/mask/cells", "util/mask/patches", "util/mask/pca",
    "util/mask/pos_embed", "util/mask/relative", "util/mask/strategies", "util/measure/accuracy",
    "util/measure/confusion", "util/measure/features", "util/measure/knn", "util/measure/metrics",
    "util/measure/predictions", "util/measure/segmentation_results", "util/measure/windows",
    "util/names", "util/plugins", "util/signals", "util/train/agreement", "util/train/bad_images",
    "util/train/checkpoint", "util/train/checksums", "util/train/dist", "util/train/events",
    "util/train/lease", "util/train/logger", "util/train/optim", "util/train/owner",
    "util/train/rank_log", "util/train/results", "util/train/resume", "util/train/run",
    "util/train/schedule", "util/train/session", "util/train/shard", "util/train/step",
    "util/train/timeline", "util/weights/convert", "util/weights/export",
    "util/weights/export_files", "util/weights/export_model", "util/weights/export_onnx",
    "util/weights/export_targets", "util/weights/export_timm", "util/weights/export_transformers",
    "util/weights/files", "util/weights/nested_weights",
)  # fmt: skip
# Where --record leaves what the tests run, and how long they take.
RECORD = ROOT / "output_dir" / "mutate"
# By module, tests of it whose runs are processes of their own: nothing is recorded there.
ELSEWHERE = {
    "engine_pretrain": ("test_every_sum", "test_processes"),
    "engine_finetune": ("test_every_sum",),
    "engine_segment": ("test_every_sum",),
    "models_batchnorm": ("test_batchnorm",),
    "util/train/agreement": ("test_every_sum", "test_signals"),
    "util/train/dist": ("test_every_sum", "test_signals", "test_lease"),
    "util/measure/features": ("test_knn",),
    "util/measure/knn": ("test_knn",),
    "util/train/lease": ("test_lease",),
    "util/data/loading": ("test_bad_images", "test_loading"),
    "util/train/logger": ("test_every_sum",),
    "util/data/packing": ("test_pack",),
    "util/mask/pca": ("test_every_sum",),
    "util/train/run": ("test_every_sum", "test_lease"),
    "util/train/shard": ("test_shard",),
    "util/signals": ("test_signals",),
    "util/train/step": ("test_every_sum", "test_processes"),
}
# Arguments that no fault takes away: words, checks, speed, layout, what is there already.
ASIDE = {
    "help", "metavar", "strict", "non_blocking", "indent", "frozen", "slots", "exist_ok", "parents",
}  # fmt: skip
# Functions whose calls are words for people: no fault is put into them.
WORDS = {"say", "say_once", "warn", "print", "BadInput", "add_argument", "needs", "note", "help"}

# ---- Faults ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A piece of a file and what stands in its place.

    Attributes:
        start, end: bytes of the file.
    """

    file: str
    line: int
    kind: str
    start: int
    end: int
    old: str
    new: str

    @property
    def words(self) -> str:
        """One line for people; also the fault's name."""
        old, new = (re.sub(r"\s+", " ", text) for text in (self.old, self.new))
        return f"{self.file}:{self.line} {self.kind}: {old} -> {new or '(nothing)'}"


SWAPS: dict[type, tuple[type, str]] = {
    ast.Lt: (ast.LtE, "<="), ast.LtE: (ast.Lt, "<"), ast.Gt: (ast.GtE, ">="),
    ast.GtE: (ast.Gt, ">"), ast.Eq: (ast.NotEq, "!="), ast.NotEq: (ast.Eq, "=="),
    ast.Is: (ast.IsNot, "is not"), ast.IsNot: (ast.Is, "is"), ast.In: (ast.NotIn, "not in"),
    ast.NotIn: (ast.In, "in"), ast.Add: (ast.Sub, "-"), ast.Sub: (ast.Add, "+"),
    ast.Mult: (ast.Div, "/"), ast.Div: (ast.Mult, "*"), ast.FloorDiv: (ast.Mult, "*"),
    ast.Mod: (ast.FloorDiv, "//"),
}  # fmt: skip
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any"}


class Places(ast.NodeVisitor):
    """All faults of one file, in its order."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.lines = [0]
        for line in text.encode().splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.data = text.encode()
        self.found: list[Fault] = []
        self.visit(ast.parse(text))

    def place(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.lines[node.lineno - 1] + node.col_offset,
            self.lines[node.end_lineno - 1] + node.end_col_offset,
        )

    def source(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        start, end = self.place(node)
        return self.data[start:end].decode()

    def add(
        self, node: ast.expr | ast.stmt | ast.keyword, kind: str, new: str, comma: bool = False
    ) -> None:
        """Put `new` in the place of a node; of an item of a list its comma goes with it."""
        start, end = self.place(node)
        old = self.data[start:end].decode()
        if comma and (after := re.match(rb"\s*,", self.data[end:])):
            end += after.end()
        self.found.append(Fault(self.file, node.lineno, kind, start, end, old, new))

    # Not for faults: annotations, docstrings, words for people, checks of what cannot be.

    def visit_Raise(self, node: ast.Raise) -> None: ...
    def visit_Assert(self, node: ast.Assert) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...
    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None: ...

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and self.name(node.value) not in WORDS:
            self.add(node, "call left out", "pass")
            self.generic_visit(node)

    @staticmethod
    def name(call: ast.Call) -> str:
        return ast.unparse(call.func).rpartition(".")[2]

    def visit_Call(self, node: ast.Call) -> None:
        if self.name(node) in WORDS:
            return
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in ASIDE:
                self.add(keyword, "argument not handed on", "", comma=True)
        if self.name(node) in NAMES and isinstance(node.func, ast.Name):
            self.add(node.func, "other function", NAMES[self.name(node)])
        if self.name(node) in ("derive_seed", "make_generator", "seeded") and len(node.args) > 2:
            for argument in node.args[2:]:
                self.add(argument, "part of a key lost", "", comma=True)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.add(node.test, "condition turned round", f"not ({self.source(node.test)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        for branch in (node.body, node.orelse):
            self.add(node, "one of two branches", f"({self.source(branch)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for value in node.values:
            self.add(node, "one of several conditions", f"({self.source(value)})")
        self.generic_visit(node)

    def operator(self, node: ast.expr, left: ast.expr, right: ast.expr, op: ast.AST) -> None:
        if type(op) in SWAPS and not any(
            isinstance(side, ast.JoinedStr)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (left, right)
        ):
            sides = (f"({self.source(side)})" for side in (left, right))
            self.add(node, "other operator", f" {SWAPS[type(op)][1]} ".join(sides))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.operator(node, node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            self.operator(node, node.left, node.comparators[0], node.ops[0])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        target, value = self.source(node.target), self.source(node.value)
        self.add(node, "sum forgotten", f"{target} = {value}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, "other constant", str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, "other constant", str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, "other constant", f"({node.value!r} * 1.1 + 0.01)")

    def items(self, node: ast.expr, values: Sequence[ast.expr]) -> None:
        if len(values) > 1 and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            for value in values:
                self.add(value, "item lost", "", comma=True)
        self.generic_visit(node)

    def visit_List(self, node: ast.List) -> None:
        self.items(node, node.elts)

    def visit_Set(self, node: ast.Set) -> None:
        self.items(node, node.elts)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None or len(node.keys) < 2:
                continue
            start, (_, end) = self.place(key)[0], self.place(value)
            old = self.data[start:end].decode()
            if after := re.match(rb"\s*,", self.data[end:]):
                end += after.end()
            self.found.append(Fault(self.file, key.lineno, "item lost", start, end, old, ""))
        for value in node.values:
            self.visit(value)

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add(node, "jump left out", "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self.add(node, "jump left out", "pass")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        self.visit(node.slice)


def compiles(fault: Fault, text: str) -> bool:
    """Whether the file with the fault in it is Python, and another program."""
    try:
        return ast.dump(ast.parse(put(fault, text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def put(fault: Fault, text: str) -> str:
    """The file with the fault in it."""
    data = text.encode()
    return (data[: fault.start] + fault.new.encode() + data[fault.end :]).decode()


def draw(seed: int, count: int, files: Sequence[str]) -> list[Fault]:
    """Faults, each file as often as its share of the places goes, and each at least once."""
    rng, found = random.Random(seed), []
    places = {}
    for file in files:
        text = (ROOT / f"{file}.py").read_text()
        here = Places(f"{file}.py", text).found
        rng.shuffle(here)
        if here:
            places[file] = here
    order = [file for file, here in places.items() for _ in range(round(len(here) ** 0.5))]
    rng.shuffle(order)
    order = [*rng.sample(list(places), len(places)), *order]
    while len(found) < count and order:
        file = order.pop(0)
        text = (ROOT / f"{file}.py").read_text()
        while places[file] and not compiles(places[file][-1], text):
            places[file].pop()
        if places[file]:
            found.append(places[file].pop())
            order.append(file)
    return found


# ---- Tests -------------------------------------------------------------------------------------


def record() -> None:
    """Run all tests but Slurm's, and keep which lines each runs, by name, with its seconds."""
    RECORD.mkdir(parents=True, exist_ok=True)
    config = RECORD / "coveragerc"
    config.write_text(f"[run]\ndata_file = {RECORD / 'coverage'}\nomit = tests/*,.venv/*\n")
    words = ["-n", "2", "--dist", "loadfile", "-q", "-m", "not slurm and not gpu", "--cov=."]
    words += ["--cov-context=test", "--cov-report=", f"--cov-config={config}"]
    words += [f"--junitxml={RECORD / 'junit.xml'}", "-o", "junit_family=xunit1"]
    subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, check=False)


class Recorded:
    """Who runs which line; see `record`."""

    def __init__(self) -> None:
        import xml.etree.ElementTree as tree

        from coverage import CoverageData

        self.lines = CoverageData(str(RECORD / "coverage"))
        self.lines.read()
        self.seconds: dict[str, float] = {}
        cases = [c for p in RECORD.glob("junit*.xml") for c in tree.parse(p).iter("testcase")]
        for case in cases:
            name = f"{case.get('file')}::{case.get('name')}"
            self.seconds[name] = float(case.get("time") or 0)

    def tests_for(self, fault: Fault, enough: float) -> list[str]:
        """Tests in the order in which they are tried, none of them for a line that none runs."""
        by_line = self.lines.contexts_by_lineno(str(ROOT / fault.file))
        lines = [n for n in range(fault.line, fault.line + fault.old.count("\n") + 1)]
        found: set[str] = set()
        for context in {c for line in lines for c in by_line.get(line, [])}:
            test, _, phase = context.rpartition("|")
            if phase == "run":
                found.add(test)
            elif test:  # in a fixture, which other tests of the file may ask
                file = test.partition("::")[0]
                found |= {t for t in self.seconds if t.startswith(f"{file}::")}
        order = sorted(found & self.seconds.keys(), key=lambda test: self.seconds[test])
        total = list(itertools.accumulate(self.seconds[test] for test in order))
        return order[: bisect.bisect(total, enough)]


def importers(module: str) -> list[str]:
    """Test files that name a module, those that bear its name first, then the smallest."""
    name, dotted = module.rpartition("/")[2], module.replace("/", ".")
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        if re.search(rf"\b{re.escape(dotted)}\b", text):
            found.append((path.stem != f"test_{name}", len(text), path.stem))
    return [stem for _, _, stem in sorted(found)]


def tests_for(fault: Fault, recorded: Recorded | None, enough: float, named: bool) -> list[str]:
    """Tests or files of tests in the order in which they are tried.

    Args:
        named: also the files that name the module, whether or not a test was seen to run the line.
    """
    known = recorded.tests_for(fault, enough) if recorded else []
    file = fault.file.removesuffix(".py")
    others = ["test_pinned_flags", *importers(file)] if named or not known else []
    others = (*others, *ELSEWHERE.get(file, ()))
    others = [c for c in dict.fromkeys(others) if c not in ("test_slurm", "test_architecture")]
    return known + [f"tests/{c}.py" for c in others if (ROOT / "tests" / f"{c}.py").exists()]


def run_tests(tree: str, words: list[str], log: str) -> None:
    """In a process that has torch already: pytest over a copy of the tree; its code to a file."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(tree)
    sys.path[:0] = [tree, f"{tree}/tests"]
    # A file changed twice in a second has the time and often the size that its cache says.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": f"{tree}:{tree}/tests", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["TMPDIR"] = f"{tree}-tmp"
    shutil.rmtree(f"{tree}-tmp", ignore_errors=True)  # of the run before, which may be killed
    os.mkdir(f"{tree}-tmp")
    import pytest

    code = int(pytest.main(words))
    Path(f"{log}.end").write_text(str(code))
    os.replace(f"{log}.end", f"{log}.code")
    os._exit(code)


LIBRARIES = ["torch", "torchvision.transforms.v2", "timm", "transformers", "pytest", "skimage",
             "tensorboard", "torch.utils.tensorboard", "torch._dynamo", "PIL.Image",
             "sklearn"]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: `by` is the first test that failed, None where none did."""

    fault: Fault
    by: str | None
    seconds: float


def is_there(pid: int) -> bool:
    """Whether a process has not ended; an ended one that none has asked about is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def try_fault(fault: Fault, tests: list[str], tree: Path, limit: float) -> Outcome:
    """Run tests with the fault in the file."""
    path = tree / fault.file
    text, began = path.read_text(), time.monotonic()
    words = [*tests, "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider",
             "-p", "no:randomly", f"--timeout={limit / 4:.0f}", "-o", "addopts=--strict-markers",
             "-m", "not slurm and not gpu"]  # fmt: skip
    path.write_text(put(fault, text))
    try:
        log = tree.parent / f"{tree.name}.log"
        context = multiprocessing.get_context("forkserver")
        child = context.Process(target=run_tests, args=(str(tree), words, str(log)))
        code = Path(f"{log}.code")
        code.unlink(missing_ok=True)
        child.start()
        assert child.pid is not None
        # Not `child.join`: of several threads that wait, one may read what another one is told.
        while is_there(child.pid) and not code.exists() and time.monotonic() < began + limit:
            time.sleep(0.1)
        died = not is_there(child.pid)
        with suppress(ProcessLookupError):  # what the tests started, too
            os.killpg(child.pid, signal.SIGKILL)
        output = log.read_text(errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
        by = None
        if failed:
            by = failed[0]
        elif (died and not code.exists()) or (code.exists() and code.read_text() != "0"):
            by = f"no test, but the run ended: {output[-300:]}"
    finally:
        path.write_text(text)
    return Outcome(fault, by, time.monotonic() - began)


def lanes(count: int, folder: Path) -> Iterator[Path]:
    """Copies of the files that git knows."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    for number in range(count):
        tree = folder / f"lane{number}"
        for name in filter(None, names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
        yield tree


def main() -> None:
    """Draw faults, try them, write what was seen; exit code 0 whatever was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=160, help="faults; default: 160")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument("--only", nargs="+", default=CORE, help="files without .py; default: core")
    parser.add_argument("--jobs", type=int, default=2, help="lanes; default: 2")
    parser.add_argument(
        "--enough", type=float, default=120, metavar="SECONDS",
        help="of tests, the quickest ones, after which a fault counts as unseen; default: 120",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=900, help="seconds a fault; default: 900")
    parser.add_argument("--json", type=Path, default=None, help="where results go; default: none")
    parser.add_argument("--again", type=Path, default=None, help="a result: its unseen once more")
    parser.add_argument("--record", action="store_true", help="see above; needs pytest-cov")
    parser.add_argument("--list", action="store_true", help="print the faults and try none")
    args = parser.parse_args()
    if args.record:
        record()
        return
    faults = draw(args.seed, args.count, [f for f in args.only if (ROOT / f"{f}.py").exists()])
    if args.again:
        unseen = {o["words"] for o in json.loads(args.again.read_text()) if o["by"] is None}
        faults = [f for f in faults if f.words in unseen]
    table: list[dict] = []
    if args.json and args.json.exists():  # a run that was stopped goes on
        names = {f.words for f in faults}
        table = [o for o in json.loads(args.json.read_text()) if o["words"] in names]
        faults = [f for f in faults if f.words not in {o["words"] for o in table}]
    if args.list:
        print(*(f.words for f in faults), sep="\n")
        return
    # The server is started once and has what tests import; each fault is a fork of it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(LIBRARIES)
    recorded = Recorded() if (RECORD / "coverage").exists() else None
    total = len(table) + len(faults)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        free = list(lanes(args.jobs, Path(folder)))

        def one(fault: Fault) -> None:
            tree = free.pop()
            try:
                tests = tests_for(fault, recorded, args.enough, named=args.again is not None)
                outcome = try_fault(fault, tests, tree, args.limit)
            finally:
                free.append(tree)
            said = {"words": fault.words, "by": outcome.by, "seconds": round(outcome.seconds, 1)}
            table.append(said | asdict(fault))
            seen = sum(o["by"] is not None for o in table)
            print(f"[{len(table)}/{total}, {seen} seen] {outcome.seconds:.0f} s "
                  f"{fault.words}\n    {outcome.by or 'UNSEEN'}", flush=True)  # fmt: skip
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(table, indent=1) + "\n")

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, faults))
    print(*(o["words"] for o in table if o["by"] is None), sep="\n")


if __name__ == "__main__":
    main()
