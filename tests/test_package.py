import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import softcfg

ROOT = Path(__file__).parents[1]


def printed(code: str) -> str:
    """What a fresh process prints that runs this code."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import softcfg",
        "from softcfg.cli.main import build_parser; build_parser()",
        "import softcfg.zoo.registry",
        "from softcfg.cli.main import main; main(['models'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    code += "; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_drawing_does_not_import_a_compiler_of_graphs() -> None:
    """It takes a second, and a function of PyTorch's that looks harmless may need it."""
    code = (
        "import sys, softcfg; softcfg.Pipeline.from_pretrained('fashion-small')([0]); "
        "print(sorted({'sympy', 'torch._dynamo', 'torch._inductor', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    )
    assert printed(code) == "[]"


def test_guidance_imports_nothing_of_the_rest() -> None:
    code = (
        "import sys, softcfg.guidance; "
        "print(sorted({n for n in sys.modules if n.startswith('softcfg.') and 'guidance' not in n}))"
    )
    assert printed(code) == "['softcfg.lazy', 'softcfg.version']"


def test_packages_do_not_need_each_other() -> None:
    home = Path(softcfg.__file__).parent
    needs: dict[str, set[str]] = defaultdict(set)
    for path in home.rglob("*.py"):
        part = path.relative_to(home).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            needs[part] |= {name.split(".")[1] for name in names if name.startswith("softcfg.")}
        needs[part].discard(part)
    del needs["__init__"], needs["__main__"]  # the public names, and the command
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError
    assert needs["guidance"] == set()
    assert needs["nn"] <= {"errors", "files"}
    # The rows of the table, from top to bottom: what stands in it imports upwards alone.
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| package |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)(?:\.py)?`", row.split("|")[1]) for row in table.splitlines()[2:]]
    known = [name for row in rows for name in row]
    serves_all = {
        "errors",
        "files",
        "kept",
        "configuration",
        "interpolation",
        "images",
        "layouts",
        "plugins",
        "lazy",
    } | {"version"}
    assert serves_all | set(known) == needs.keys() | {"version"}
    for number, row in enumerate(rows):
        above = {name for other in rows[: number + 1] for name in other}
        for name in row:
            assert needs[name] <= above | serves_all, name


def test_modules_do_not_need_each_other() -> None:
    home = Path(softcfg.__file__).parent
    modules = {
        ".".join(("softcfg", *path.relative_to(home).with_suffix("").parts)): path for path in home.rglob("*.py")
    }

    def imports(node: ast.AST) -> Iterator[ast.ImportFrom]:
        """Those that are run, inside functions too."""
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from imports(child)

    needs: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        for node in imports(ast.parse(path.read_text())):
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            needs[name] |= {node.module or "", *full} & modules.keys()
    assert "softcfg.evaluation.features" in needs["softcfg.evaluation.inception"]
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_public_names() -> None:
    assert set(dir(softcfg)) == set(softcfg.__all__)
    for name in softcfg.__all__:
        assert getattr(softcfg, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        softcfg.nothing  # noqa: B018


def test_module_runs() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "softcfg", "--version"], check=True, capture_output=True, text=True
    ).stdout
    assert shown.strip() == f"softcfg {softcfg.__version__}"
