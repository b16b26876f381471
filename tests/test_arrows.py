"""Which folders and files of the package import which others, read from the import statements."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import elastic_hf


PACKAGE = Path(elastic_hf.__file__).parent
# What each folder or file of the package imports of the others; "" is the package itself.
ARROWS = {
    "models": set(),
    "baselines": {"models"},
    "registry": {"baselines", "models"},
    "data": {"results"},
    "item_index": {"models"},
    "plots": {"results"},
    "results": {"version"},
    "version": set(),
    "serving": {"models"},
    "sharing": {"models", "registry", "results"},
    "training": {"data", "models", "results", "sharing"},
    "commands": {"baselines", "data", "models", "plots", "registry", "results", "sharing", "training"},
    "__main__": {"version"},
    "": {"baselines", "models", "registry", "version"},
}


def name_of(path):
    """Return `elastic_hf/data/readers.py` as `data.readers`, and `elastic_hf/data/__init__.py` as `data`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
COPIED = {name for name in FILES if name.startswith("sharing.templates.")}


def statements(tree):
    """Yield a tree's nodes, without those that run for type checkers only."""
    yield tree
    if not (isinstance(tree, ast.If) and getattr(tree.test, "id", None) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(tree):
            yield from statements(child)


def imported_names(name):
    """Return the modules of the package that a module imports, whether at its top or in a function."""
    folder = FILES[name].relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in statements(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            inside = module.removeprefix("elastic_hf").removeprefix(".")
            submodules = {alias.name for alias in node.names if f"{inside}.{alias.name}".lstrip(".") in FILES}
            found |= {f"{module}.{submodule}" for submodule in submodules} or {module}
    ours = {module for module in found if module.split(".")[0] == "elastic_hf"}
    return {module.removeprefix("elastic_hf").removeprefix(".") for module in ours}


IMPORTED = {name: imported_names(name) for name in FILES.keys() - COPIED}


def test_every_import_is_found():
    assert {"baselines", "models.modeling_elastic"} == IMPORTED["registry"]
    assert "baselines" in IMPORTED[""] and "results" in IMPORTED["training.metrics"]
    assert imported_names("sharing.templates.handler") == set()
    assert set().union(*IMPORTED.values()) <= FILES.keys()


def test_folders_import_what_comes_before_them():
    found = {}
    for name, imported in IMPORTED.items():
        first = name.split(".")[0]
        found.setdefault(first, set()).update({other.split(".")[0] for other in imported} - {first})
    assert found == ARROWS


def test_nothing_imports_in_a_circle():
    assert len([*TopologicalSorter(IMPORTED).static_order()]) == len(IMPORTED)


def test_what_is_copied_to_the_hub_is_not_imported():
    assert COPIED == {"sharing.templates.handler"}
    assert not COPIED & set().union(*IMPORTED.values())
