"""Who may import whom, and that every package and data file reaches the wheel."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each layer may import itself and the layers listed for it; nothing else of ours.
MAY_IMPORT = {
    "rlrnn": {"rlrnn"},
    "envs": {"rlrnn"},
    "agents": {"rlrnn"},
}
# The files of the core that wire agents and environments together.
TOP = {"cli.py", "flows.py", "meta.py", "running.py", "demo.py", "play.py", "export.py"}
FOLDERS = ("rlrnn", "envs", "agents", "configs")


def layer_of(module: str) -> str:
    """`rlrnn.envs.recall` -> `envs`; `rlrnn.core` -> `rlrnn`."""
    parts = module.split(".")
    sibling = len(parts) > 1 and parts[1] in ("envs", "agents")
    return parts[1] if sibling else parts[0]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(folder: str) -> list[Path]:
    return [
        path
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def test_dependency_direction() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for layer, allowed in MAY_IMPORT.items()
        for path in sources(layer)
        if not (layer == "rlrnn" and path.name in TOP)
        for name in imports(path)
        if name.split(".")[0] == "rlrnn" and layer_of(name) not in allowed | {layer}
    ]
    assert not wrong, "\n".join(wrong)


def test_only_tracking_imports_wandb() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sources(folder)
        if path.name != "tracking.py"
        if any(name.split(".")[0] == "wandb" for name in imports(path))
    ]
    assert not wrong, wrong


def test_every_package_is_in_the_wheel() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in sources(folder)
        if path.name == "__init__.py"
    }
    expected = {p if p.startswith("rlrnn") else f"rlrnn.{p}" for p in on_disk}
    assert set(tool["packages"]) == expected
    assert all((ROOT / folder).is_dir() for folder in tool["package-dir"].values())


def test_siblings_are_links_and_flat() -> None:
    for name in ("envs", "agents", "configs"):
        link = ROOT / "rlrnn" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        folders = [p for p in (ROOT / name).iterdir() if p.is_dir()]
        assert [p.name for p in folders if p.name != "__pycache__"] == []
