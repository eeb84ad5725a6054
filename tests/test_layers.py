"""The order of the house: every file has a floor and imports only from lower ones."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A name covers what is below it, the longest match counts. Two leaves of floor 2's folders lie a
# floor lower, as models and data both stand on them: so neither folder needs the other.
FLOORS = {
    0: "senseflow_kernels senseflow senseflow.section senseflow.config senseflow.fields senseflow.meta",
    1: "senseflow.flow senseflow.dist senseflow.logs senseflow.profiling senseflow.profile_page senseflow.presets"
    " senseflow.cli senseflow.memory senseflow.watch senseflow.data.packages senseflow.models.adapter",
    2: "senseflow.models senseflow.data senseflow.optim senseflow.checkpoint senseflow.saving senseflow.metrics"
    " senseflow.single_file senseflow.ablation",
    3: "senseflow.algo senseflow.scores",
    4: "senseflow.draws senseflow.steps senseflow.updates senseflow.iteration senseflow.student senseflow.sample"
    " senseflow.model_card senseflow.parity senseflow.export senseflow.compiling senseflow.graphs",
    5: "senseflow.evaluate senseflow.scoring senseflow.encoding senseflow.prepare senseflow.pretrain senseflow.planning"
    " senseflow.fitting senseflow.resuming senseflow.shipping",
    6: "senseflow.train",
    7: "senseflow.ablate",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}


def read_modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for package in ("senseflow", "senseflow_kernels"):
            for file in sorted((base / package).rglob("*.py")):
                parts = file.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = read_modules()


def floor_of(module: str) -> int | None:
    """Floor of the longest listed prefix; the package `senseflow` covers nothing but itself."""
    name = module
    while name not in FLOOR_OF:
        name = name.rpartition(".")[0]
    return FLOOR_OF[name] if name != "senseflow" or module == "senseflow" else None


def imports_of(tree: ast.AST) -> set[str]:
    """Our modules that a file names, imports inside functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import thing`: the thing is a module, or it is the package's own.
            names |= {name if name in MODULES else str(node.module) for name in inside}
    return {name for name in names if name.split(".")[0] in ("senseflow", "senseflow_kernels")}


GRAPH = {name: imports_of(ast.parse(file.read_text("utf8"))) for name, file in MODULES.items()}


def test_every_module_has_a_floor():
    assert {"senseflow", "senseflow_kernels", "senseflow.config"} <= set(MODULES)
    assert [name for name in MODULES if floor_of(name) is None] == []


def test_imports_go_down():
    """Lower floors, or siblings: the same floor and the same folder."""
    wrong = []
    for name, targets in GRAPH.items():
        for target in targets - {name}:
            here, there = floor_of(name), floor_of(target)
            folder = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            sibling = here == there and target.rpartition(".")[0] == folder
            if here is None or there is None or not (there < here or sibling):
                wrong.append(f"{name} (floor {here}) imports {target} (floor {there})")
    assert wrong == []


def test_kernels_stand_alone():
    kernels = {name for name in GRAPH if name.split(".")[0] == "senseflow_kernels"}
    assert set().union(*(GRAPH[name] for name in kernels)) <= kernels


def test_algo_takes_tensors_and_the_protocol():
    """No concrete model and no config below the equations."""
    reached = set().union(*(GRAPH[name] for name in GRAPH if name.startswith("senseflow.algo")))
    models = {name for name in reached if name.startswith("senseflow.models")}
    assert models <= {"senseflow.models.adapter"}
    assert "senseflow.config" not in reached


def test_no_import_cycle():
    try:
        TopologicalSorter({name: GRAPH[name] - {name} for name in GRAPH}).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
