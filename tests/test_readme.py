"""What the README shows is what happens."""

import ast
import re
from pathlib import Path

import pytest

from mlx_parity.report import Report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(mended: bool = False) -> str:
    """The first Python of the README, and what it prints there."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    if mended:
        block, n = re.subn(
            r"(?<!torch\.)nn\.GroupNorm\(4, 8\)",
            "nn.GroupNorm(4, 8, pytorch_compatible=True)",
            block,
        )
        assert n == 1
    return block


def run(code: str) -> Report:
    names: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names["report"]


def test_the_example_finds_the_group_norm_and_the_line_to_change(capsys):
    report = run(example())
    assert not report.ok
    shown = capsys.readouterr().out
    for line in (
        "TorchNet → Net: different in forward, in norm (group) [GroupNorm]",
        "norm-groups  GroupNorm's groups are strided channels",
        "fix    nn.GroupNorm(groups, channels, pytorch_compatible=True)",
    ):
        assert line in shown
        assert line in README


def test_the_example_is_equal_once_mended(capsys):
    report = run(example(mended=True))
    report.assert_ok()
    rungs = "structure, forward, loss, gradients, compiled, reloaded"
    assert f"TorchNet → Net: equal ({rungs};" in capsys.readouterr().out
    assert f"TorchNet → Net: equal ({rungs};" in README


def test_every_session_named_exists():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        next((k.value.value for k in node.decorator_list[0].keywords if k.arg == "name"), node.name)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    assert set(re.findall(r"nox -s ([\w-]+)", README)) <= sessions
    assert sessions <= set(re.findall(r"nox -s ([\w-]+)", README))


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_or_shows_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links or page.name != "README.md"
    assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []
