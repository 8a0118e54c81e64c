"""Laws of the code base that no linter knows: names, sizes, homes of third-party packages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from sat_train.config.catalog import all_keys
from tests.longest_first import SECONDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sat_train"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("sat_train", "launch", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)

SECTION_GROUPS = {
    path.rpartition(".")[2] for path in all_keys() if path.startswith("model.") and path.endswith("_config")
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FORWARD_LINES = 45

# Where a third-party package may be imported; a path is a folder or a file under sat_train/.
HOMES = {
    "omegaconf": ("config/",),
    "pydantic": ("config/", "json_record.py"),
    "sat": ("distributed/", "models/"),
    "deepspeed": ("distributed/", "engine/"),
    "transformers": ("engine/optim/adafactor.py",),
    "sentencepiece": ("models/text/tokenizer.py",),
    "tokenizers": ("models/text/tokenizer.py",),
    "bitsandbytes": ("engine/optim/adamw8bit.py",),
    "diffusers": ("interchange/", "weights/"),
    "av": ("data/", "sampling/video_file.py"),
    "fsspec": ("data/clips/remote.py",),
    "upath": ("data/clips/remote.py",),
    "wandb": ("training/callbacks/wandb.py",),
}


def imported_packages(tree: ast.AST) -> set[str]:
    """Returns the top-level names of all absolute imports, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def functions(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_third_party_packages_stay_at_home() -> None:
    strays = []
    for path in MODULES:
        place = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strays += [
            f"{place} imports {name}, which lives in {HOMES[name]}"
            for name in imported_packages(tree) & HOMES.keys()
            if not any(place == home or place.startswith(home) for home in HOMES[name])
        ]
    assert strays == []


def test_deepspeed_is_started_through_import_deepspeed() -> None:
    """Anything else lets it compile an extension behind a lock that a killed process never gives back."""
    ours = PACKAGE / "engine" / "build.py"
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES if path not in (ours, Path(__file__))}
    assert not [str(path) for path, text in texts.items() if re.search(r"deepspeed\.initialize\(", text)]


def test_files_and_functions_stay_short() -> None:
    limits = {"forward": MAX_FORWARD_LINES}
    long = [
        f"{path}: {name} has {lines} lines, limit {limits.get(name, MAX_FUNCTION_LINES)}"
        for path in MODULES
        for name, lines in functions(path)
        if lines > limits.get(name, MAX_FUNCTION_LINES)
    ]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long += [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert long == []


def test_only_the_spec_reads_the_nested_model_section() -> None:
    """CogVideo's `model.*_config.params.*` ends at `ModelSpec`; keys in texts are names, and no reading."""
    readers = {PACKAGE / "config/model_spec.py", *(PACKAGE / "config/schema").iterdir()}
    strays = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.attr}"
        for path in MODULES
        if path not in readers
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in SECTION_GROUPS
    ]
    assert not strays


def test_no_grab_bag_modules() -> None:
    banned = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in banned]


def test_no_unfinished_work() -> None:
    markers = ("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")
    strays = [
        f"{path.relative_to(ROOT)}: {marker}"
        for path in SOURCES
        for marker in markers
        if marker in path.read_text(encoding="utf-8")
    ]
    assert not strays


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.read_text(encoding="utf-8").strip()
        and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert not silent


def test_errors_are_never_swallowed() -> None:
    """A bare `except:` or an `except ...: pass` hides the first cause from the person who could repair it."""
    strays = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                strays.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not strays


def test_data_are_pixels_and_know_nothing_of_the_cache() -> None:
    """Encoding is a stage of its own above; a reader of `data/` need not know that it may be skipped."""
    word = re.compile(r"cache|encoding", re.IGNORECASE)
    # words of libraries, and the folder of the user where tables of contents of archives are remembered
    other = re.compile(r'XDG_CACHE_HOME|~/\.cache|functools\.\w+|encoding="|invalidate_cache|cache_type')
    strays = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((PACKAGE / "data").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(other.sub("", line))
    ]
    assert not strays, "\n".join(strays)


def test_the_long_files_of_tests_are_there() -> None:
    assert [name for name in SECONDS if not (ROOT / "tests" / name).is_file()] == []


def test_shipped_assets_keep_their_size() -> None:
    """The pack is at most 10 MB, the demo data set at most 3 MB."""
    assets = PACKAGE / "assets"

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(assets / "tiny") <= 10_000_000
    assert size(assets / "demo") <= 3_000_000


def test_prose_of_the_docs_fits_120_columns() -> None:
    """Tables and code are as wide as they are."""
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    wide = []
    for page in pages:
        is_code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            is_code ^= line.lstrip().startswith("```")
            is_prose = not is_code and not line.startswith(("    ", "|", "<", "!["))
            if is_prose and len(line) > 120:
                wide.append(f"{page.name}:{number}")
    assert not wide


def test_the_step_path_of_the_design_is_that_of_the_code() -> None:
    """`docs/design.md` counts the files of the step path and names them; all of them exist."""
    section = (
        (ROOT / "docs/design.md")
        .read_text(encoding="utf-8")
        .partition("## Step path")[2]
        .partition("\n## ")[0]
    )
    names = re.findall(r"`([\w/]+\.py)`", section)
    assert not [name for name in names if not any((folder / name).is_file() for folder in (ROOT, PACKAGE))]
    assert f"data and model included: {len(set(names))}." in section


def test_nobody_looks_up_a_free_port_and_lets_it_go() -> None:
    """Another process may take it before ours listens: `sat_train.testing.ports.HeldPort` keeps it."""
    home = PACKAGE / "testing" / "ports.py"
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES if path != home}
    assert not [path for path, text in texts.items() if re.search(r"\.bind\(\(.*, 0\)\)", text)]
