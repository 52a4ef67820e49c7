"""Two guards: who may import whom, and what importing the package brings along."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning_lance
from lightning_lance.layers import registry

ROOT = Path(lightning_lance.__file__).parent

# From the bottom up; a module imports from its own row and those below. A new module needs a place here.
LAYERS = [
    "errors",
    "tensors",
    "ops subspaces",
    "layers",
    "compression",
    "continual",
    "trainer",
    "avalanche",
    "streams",
    "cli",
    "__main__ __init__",
]
ADAPTERS = {"trainer", "avalanche", "streams", "cli", "__main__"}
FRAMEWORKS = {"lightning", "lightning_utilities", "pytorch_lightning", "avalanche", "torchmetrics", "jsonargparse"}
# Wherever they are: only inside of a function, so that importing the package does not bring them along.
OPTIONAL = {"avalanche", "torchvision", "jsonargparse", "matplotlib", "rich", "timm", "sklearn", "mlxtend"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def sources() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports; those under ``if TYPE_CHECKING`` do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def test_every_module_has_its_place() -> None:
    unplaced = {name.split(".")[0] for name in sources()} - set(LEVEL)
    assert not unplaced, f"give {sorted(unplaced)} a row in LAYERS"
    missing = set(LEVEL) - {name.split(".")[0] for name in sources()}
    assert not missing, f"LAYERS names {sorted(missing)}, which are not there"


def test_nothing_imports_upward() -> None:
    wrong = []
    for name, path in sources().items():
        own = name.split(".")[0]
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "lightning_lance":
                continue
            other = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
            if len(parts) == 1:
                continue  # "from lightning_lance import x" is listed as lightning_lance.x as well
            if other == "__init__" and parts[1] != "__version__":
                wrong.append(f"{name} imports {imported} from the package itself")
            elif other != "__init__" and LEVEL[other] > LEVEL[own]:
                wrong.append(f"{name} imports {imported} from above")
    assert not wrong, "\n".join(wrong)


def test_no_cycles() -> None:
    files = sources()
    known = {f"lightning_lance.{name}": name for name in files if name != "__init__"}
    graph = {
        name: {known[imported] for imported in imports(files[name], top_level_only=True) & set(known)} - {name}
        for name in known.values()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for following in graph.get(name, ()):
                visit(following, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_adapters_know_a_framework() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in sources().items()
        if name.split(".")[0] not in ADAPTERS
        for imported in imports(path)
        if imported.split(".")[0] in FRAMEWORKS
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_inside_their_own_adapter_only() -> None:
    homes = {
        "avalanche": {"avalanche"},
        "streams": {"avalanche", "jsonargparse", "torchvision"},
        "cli": OPTIONAL,
        "__main__": OPTIONAL,
    }
    wrong = [
        f"{name} imports {imported}"
        for name, path in sources().items()
        for imported in imports(path, top_level_only=True)
        if (package := imported.split(".")[0]) in OPTIONAL and package not in homes.get(name.split(".")[0], set())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_neither_brings_nor_needs_an_optional_package() -> None:
    """Lightning and torchmetrics themselves import torchvision and matplotlib where these are installed."""
    script = f"""
        import os, sys
        import lightning.pytorch, torchmetrics
        before = set(sys.modules)
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0, "it needs one"
            import lightning_lance
            print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
        else:
            for name in {sorted(OPTIONAL)!r}:
                sys.modules[name] = None  # importing it now raises ModuleNotFoundError
            import lightning_lance
            assert all(hasattr(lightning_lance, name) for name in lightning_lance.__all__)
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    brought = set(run.stdout.split())
    assert "lightning_lance" in brought
    assert not brought & OPTIONAL


def test_every_file_in_layers_registers_a_variant() -> None:
    shared = {"registry", "compressed", "sharing"}
    package = importlib.import_module("lightning_lance.layers")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    homes = {variant.__module__.rsplit(".", 1)[1] for variant in registry.registered().values()}
    assert shared <= files
    assert homes == files - shared, "a file in layers/ registers nothing, or is not imported in layers/__init__.py"
    assert set(package.__all__) == files - shared


def test_every_registered_variant_serves_the_forward_of_its_class() -> None:
    for stock, variant in registry.registered().items():
        assert issubclass(variant, registry.Variant)
        serves = "_conv_forward" if hasattr(stock, "_conv_forward") else "forward"
        assert serves in vars(variant), f"{variant.__name__} leaves {serves} of {stock.__name__} as it is"
        made = registry.variant_class(stock, variant)
        assert getattr(made, serves) is getattr(variant, serves)
        assert issubclass(made, stock)
        assert registry.variant_class(stock, variant) is made
