"""The documentation: every Python block runs, everything public is described."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flwr_fusion as ff
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python\s*\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Net(nn.Sequential):
    """The network that the documentation takes for granted."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def given_names() -> dict[str, Any]:
    """Return what a page may use without defining it: a network, its inputs, clients, a method."""
    models = [Net() for _ in range(3)]
    return {
        "torch": torch,
        "nn": nn,
        "ff": ff,
        "Net": Net,
        "x": torch.randn(2, 4),
        "model": models[0],
        "models": models,
        "weights": [1, 2, 3],
        "my_fusion": ff.average,
        "__name__": "documentation",
    }


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    code: str

    def run(self, names: dict[str, Any]) -> None:
        """Run the block; as a doctest where it shows a session."""
        if ">>>" not in self.code:
            padding = "\n" * self.line
            exec(compile(padding + self.code, str(self.page), "exec"), names)
            return
        parser = doctest.DocTestParser()
        test = parser.get_doctest(self.code, names, self.page.name, str(self.page), self.line)
        test.globs = names
        report: list[str] = []
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(text):
        indent = len(found["indent"])
        code = "".join(line[indent:] or "\n" for line in found["code"].splitlines(keepends=True))
        blocks.append(Block(page, text[: found.start("code")].count("\n"), code))
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = given_names()
    for block in blocks_of(page):
        try:
            block.run(names)
        except Exception as error:
            error.add_note(f"in the block at {page.name}:{block.line}")
            raise


def test_blocks_are_found_and_judged(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nexit 1\n```\n1. item\n\n   ```python\n   y = 3\n   ```\n"
        "```python\n>>> y\n3\n>>> y + 1\n5\n```\n"
    )
    first, second = blocks_of(page)
    assert (first.line, first.code) == (6, "y = 3\n")
    names: dict[str, Any] = {}
    first.run(names)
    assert names["y"] == 3
    with pytest.raises(AssertionError, match="Expected"):
        second.run(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


# --- Docstrings -----------------------------------------------------------------------------------


def public_names() -> list[str]:
    names = ("", ".strategy", ".client", ".statistics")
    modules = [importlib.import_module(f"flwr_fusion{name}") for name in names]
    return [
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    ]


def public(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", public_names())
def test_public_names_have_docstrings(name: str) -> None:
    thing = public(name)
    assert thing.__doc__
    assert inspect.cleandoc(thing.__doc__).splitlines()[0].endswith(".")
    if not inspect.isclass(thing):
        return
    assert "dataclass" not in thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}("), "the dataclass's own signature"
    for attribute, value in vars(thing).items():
        described = isinstance(value, property | classmethod) or inspect.isfunction(value)
        if described and not attribute.startswith("_"):
            assert inspect.getdoc(getattr(thing, attribute)), attribute


@pytest.mark.parametrize("name", public_names())
def test_parameters_are_documented(name: str) -> None:
    thing = public(name)
    # The signatures of exceptions, enumerations and protocols are Python's.
    if inspect.isclass(thing) and issubclass(thing, Exception | Enum):
        return
    if getattr(thing, "_is_protocol", False):
        return
    documentation = inspect.getdoc(thing) or ""
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name.startswith("_") or name.endswith(".ChannelGraph"):
            continue
        # "reference, client : nn.Module" documents both.
        pattern = rf"^(\*\*?)?(\w+, )*{parameter.name}(, \w+)*( :|$)"
        assert re.search(pattern, documentation, re.M), parameter.name


def test_every_module_has_a_docstring() -> None:
    for path in sorted((REPOSITORY / "flwr_fusion").rglob("*.py")):
        relative = path.relative_to(REPOSITORY).with_suffix("")
        assert importlib.import_module(".".join(relative.parts)).__doc__, path


# --- The site -------------------------------------------------------------------------------------


def test_everything_public_is_in_the_reference() -> None:
    pages = (REPOSITORY / "docs" / "api").glob("*.md")
    shown = set(re.findall(r"auto\w+:: (\S+)", "".join(page.read_text() for page in pages)))
    modules = ["", ".strategy", ".statistics", ".client"]
    missing = [
        f"{name}.{public}"
        for name in (f"flwr_fusion{module}" for module in modules)
        for public in importlib.import_module(name).__all__
        if public != "statistics" and f"{name}.{public}" not in shown
    ]
    assert not missing


def test_every_example_has_a_title_and_is_in_the_gallery() -> None:
    scripts = sorted((REPOSITORY / "examples").glob("[0-9]*.py"))
    assert [path.name[:2] for path in scripts] == [f"{n:02}" for n in range(1, 9)]
    for path in scripts:
        docstring = re.match(r'"""\n(.+)\n(=+)\n', path.read_text(encoding="utf-8"))
        assert docstring is not None, path.name
        assert len(docstring[1]) == len(docstring[2])


def test_the_notebook_is_its_script_and_was_run() -> None:
    notebook = REPOSITORY / "examples" / "02_label_skew.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    script = ast.parse(notebook.with_suffix(".py").read_text(encoding="utf-8"))
    of_notebook = ast.parse("\n".join("".join(cell["source"]) for cell in code))
    script.body = script.body[1:]  # Without the text at its top.
    assert ast.dump(of_notebook) == ast.dump(script)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in code[-1]["outputs"])
