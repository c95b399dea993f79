"""Who may import whom, and that the two sides mirror each other."""

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """The top-level packages that a file imports, anywhere or at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"{room}/ holds no Python"
    return found


@pytest.mark.parametrize("path", files("reference"), ids=lambda p: p.name)
def test_reference_never_imports_mlx(path: Path):
    assert not imported(path) & {"mlx", "mlx_impl", "mlx_parity"}


@pytest.mark.parametrize("path", files("mlx_impl"), ids=lambda p: p.name)
def test_mlx_impl_imports_no_torch_at_module_level(path: Path):
    assert not imported(path, top_level_only=True) & {"torch", "torchvision"}
    assert not imported(path) & {"reference", "mlx_parity"}


@pytest.mark.parametrize("path", files("mlx_parity"), ids=lambda p: p.name)
def test_the_kit_knows_nothing_of_our_models(path: Path):
    assert not imported(path) & {"reference", "mlx_impl"}


@pytest.mark.parametrize("path", files("reference"), ids=lambda p: p.name)
def test_every_reference_file_has_its_twin(path: Path):
    assert (ROOT / "mlx_impl" / path.name).exists()


@pytest.mark.parametrize("path", files("reference"), ids=lambda p: p.name)
def test_the_twins_have_the_same_names_and_arguments(path: Path):
    ours = import_module(f"reference.{path.stem}" if path.stem != "__init__" else "reference")
    theirs = import_module(ours.__name__.replace("reference", "mlx_impl", 1))

    def public(module: ModuleType) -> dict[str, list[str]]:
        found = {}
        for name, item in vars(module).items():
            if getattr(item, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if not callable(item):  # a constant made of a class of this file
                continue
            function = item.__init__ if inspect.isclass(item) else item
            found[name] = list(inspect.signature(function).parameters)
        return found

    assert public(ours) == {k: v for k, v in public(theirs).items() if k in public(ours)}
    # what a file hands on of another's is looked for there by name
    assert getattr(ours, "__all__", None) == getattr(theirs, "__all__", None)


def test_an_import_is_seen_wherever_it_hides(tmp_path: Path):
    """The reader of these tests: nested imports count, unless only the top level is asked for."""
    path = tmp_path / "m.py"
    path.write_text("import os.path\ndef f():\n    from torch import nn\n")
    assert imported(path) == {"os", "torch"}
    assert imported(path, top_level_only=True) == {"os"}
