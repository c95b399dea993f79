"""What the README shows is what happens."""

import ast
import re
from pathlib import Path

import pytest

from mlx_parity import NotProven

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block.replace("examples=50", "examples=5")


def test_the_example_finds_the_group_norm():
    with pytest.raises(NotProven) as error:
        exec(compile(example(), "README.md", "exec"), {"__name__": "readme"})
    shown = re.search(r"NotProven: (my port: .*?) at", README).group(1)
    assert str(error.value).startswith(shown)
    assert "forward y: different" in str(error.value)


def test_the_example_passes_once_mended():
    mended = re.sub(
        r"(?<!torch\.)nn\.GroupNorm\(4, 8\)",
        "nn.GroupNorm(4, 8, pytorch_compatible=True)",
        example(),
    )
    assert mended.count("pytorch_compatible=True") == 1
    exec(compile(mended, "README.md", "exec"), {"__name__": "readme"})


def test_every_session_named_exists():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        next((k.value.value for k in node.decorator_list[0].keywords if k.arg == "name"), node.name)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    assert set(re.findall(r"nox -s ([\w-]+)", README)) <= sessions
    assert sessions <= set(re.findall(r"nox -s ([\w-]+)", README))


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
