"""The README's table from equations to code is true, and has every equation that the code cites."""

import functools
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ("treevae", "path_encoder", "diffusion", "train", "sample", "metrics")
CODE = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
README = (ROOT / "README.md").read_text()
ROWS = [row.split("|")[1:-1] for row in
        README.split("| tested by |\n")[1].split("\n\n")[0].splitlines()[1:]]


def numbers(text):
    """"(9), (12)-(14)" -> {9, 12, 13, 14}."""
    return {n for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", text)
            for n in range(int(first), int(last or first) + 1)}


def test_every_equation_is_in_the_map_and_cited_in_the_code():
    mapped = set().union(*[numbers(row[0]) for row in ROWS])
    lists = re.findall(r"eqs?\.\s+((?:\(\d+\)(?:-\(\d+\))?(?:\s+and\s+|[,;]?\s+)?)+)", CODE)
    assert mapped == set(range(1, 31)) - {19} == numbers(" ".join(lists))


def test_every_name_in_the_map_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for _, _, where, tested_by in ROWS:
        held = re.findall(r"`(\w+)`", tested_by)
        assert held and "`" in where and all(f"def {name}(" in tests for name in held)
    for name in re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!p[ty]`)\w[\w.]+)`", README):
        module, *rest = name.split(".")
        functools.reduce(getattr, rest, importlib.import_module(module))
