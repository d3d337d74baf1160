"""Who imports whom, read from the source: packages look down only, files in no circle, and nothing reads what
can run code."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ppcoat"
FILES = sorted(PACKAGE.rglob("*.py"))
# package (or top-level module) -> what it may import; what is OPEN_TO_ALL may be imported everywhere
ALLOWED = {
    "errors": (),
    "device": (),
    "atomic": (),
    "progress": (),
    "reading": (),
    "finite": (),
    "signals": (),
    "fp8": (),
    "config": (),
    "nn": ("fp8",),
    "optim": ("fp8",),
    "models": ("nn",),
    "lora": ("nn", "models.tensor_files", "models.headers"),
    "data": ("config",),
    "infer": ("models", "lora", "data", "config.flags", "plan.GB", "plan.drawing"),
    "coat": ("config", "lora", "nn", "optim", "models.blocks"),
    "objective": ("models", "lora", "data.cache.CLASS"),
    "plan": ("config", "data", "models", "lora", "nn", "optim", "coat", "objective"),
    "train": ("config", "data", "models", "lora", "nn", "optim", "fp8", "coat", "objective",
              "plan.settings", "plan.phases", "plan.newbie"),
    "distill": ("config", "data", "fp8", "lora", "models", "nn", "optim", "coat", "objective", "train"),
    "studio": ("config", "data", "plan", "train", "infer", "lora"),
    "pretrain": ("data", "models", "infer", "train.ranks", "train.checkpoint", "config.flags"),
}  # fmt: skip
# The last are the names of FLUX's Linears and norms: data, in an __init__ that imports nothing.
OPEN_TO_ALL = ("errors", "device", "atomic", "progress", "reading", "finite", "signals",
               "models.flux.ATTENTION_AND_MLP",
               "models.flux.MODULATION", "models.flux.NORMS", "models.flux.OUTSIDE_BLOCKS",
               "models.flux.HALVES_SWAPPED")  # fmt: skip
UNRESTRICTED = ("cli", "bench", "__init__", "__main__")  # the top
IMPORTED_BY_NOBODY = "bench"  # the command table of cli names its modules in strings
MODEL_FILE_WITH_LORA = "models/flux/lora_methods.py"  # load_lora_weights and its kin
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch")
# It reads torch's checkpoints by a pickle.Unpickler whose find_class knows stand-ins for tensors only.
UNPICKLER = "models/newbie/convert.py"
# What a signal has ended says nothing else, whatever came of the exception on its way through libraries; and
# nothing keeps a process that is told to end. The one place that catches what libraries raise over a model's
# files: tokenizers raises Exception itself.
CATCHES_ALL = {"__main__.py": "except BaseException", "signals.py": "except Exception",
               "models/tensor_files.py": "except BaseException"}  # fmt: skip
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "paddle.load", "torch.load", "yaml.load",
                   "yaml.unsafe_load", "yaml.full_load", "os.system", "numpy.load", "np.load")  # fmt: skip


def name_of(file):
    """Path inside the package, with slashes."""
    return file.relative_to(PACKAGE).as_posix()


def layer_of(file):
    """The package of a file, or its own name at the top level."""
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else file.stem


@cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file, node):
    """Absolute dotted names that an import statement asks for: `from a import b` -> a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        package = ("ppcoat", *file.relative_to(PACKAGE).parts[:-1])
        module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


@cache
def imports_of(file, tree=None):
    """(dotted name, names of the functions around it) of every import, wherever it stands."""
    found = []

    def visit(node, functions):
        found.extend((name, functions) for name in imported(file, node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions = (*functions, node.name)
        for child in ast.iter_child_nodes(node):
            visit(child, functions)

    visit(tree or tree_of(file), ())
    return found


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def broken_rules(file, tree=None):
    """Imports within ppcoat that its layer does not allow: of the top, those of bench from outside."""
    layer, broken = layer_of(file), []
    for name, functions in imports_of(file, tree):
        if not is_inside(name, "ppcoat"):
            continue
        target = name.removeprefix("ppcoat").removeprefix(".")
        if layer in UNRESTRICTED:
            if is_inside(target, IMPORTED_BY_NOBODY) and layer != IMPORTED_BY_NOBODY:
                broken.append(f"{name_of(file)} imports {name}")
            continue
        allowed = (layer, *OPEN_TO_ALL, *ALLOWED[layer])
        if any(is_inside(target, package) for package in allowed):
            continue
        in_lora_method = bool(functions) and "lora" in functions[-1]
        if name_of(file) == MODEL_FILE_WITH_LORA and is_inside(target, "lora") and in_lora_method:
            continue
        broken.append(f"{name_of(file)} imports {name}")
    return broken


def test_every_package_has_a_rule():
    assert {layer_of(file) for file in FILES} <= {*ALLOWED, *UNRESTRICTED}


def test_packages_import_only_what_is_below_them():
    assert [rule for file in FILES for rule in broken_rules(file)] == []


def module_of(file):
    """Its dotted name; of an __init__.py that of its folder."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def needed_at_import(file, modules, tree=None):
    """Modules of ours that must be there before this one is: not what functions or TYPE_CHECKING import."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            for name in imported(file, child):
                found.add(name if name in modules else name.rpartition(".")[0])
            visit(child)

    visit(tree or tree_of(file))
    return found & modules - {module_of(file)}


def circle(needs):
    """{module: modules it needs} -> those that are left when all with nothing left to need are taken away."""
    needs = {module: set(others) for module, others in needs.items()}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    return sorted(needs)


def test_files_do_not_import_each_other_in_a_circle():
    modules = {module_of(file) for file in FILES}
    assert circle({module_of(file): needed_at_import(file, modules) for file in FILES}) == []


def test_packages_are_in_no_circle():
    """The rules count imports inside functions, too."""
    assert circle({room: {name.split(".")[0] for name in allowed} for room, allowed in ALLOWED.items()}) == []


def test_a_circle_is_found():
    modules = {"ppcoat.lora.files", "ppcoat.lora.layer", "ppcoat.lora.lokr"}
    sources = {
        "lora/files.py": "from .layer import a\ndef f():\n    from .lokr import b",
        "lora/layer.py": "import ppcoat.lora.files",
        "lora/lokr.py": "from ppcoat.lora import lokr",
    }
    needs = {
        module_of(PACKAGE / path): needed_at_import(PACKAGE / path, modules, ast.parse(source))
        for path, source in sources.items()
    }
    assert circle(needs) == ["ppcoat.lora.files", "ppcoat.lora.layer"]


def importers(module):
    """Files that import it or something in it."""
    return {name_of(file) for file in FILES if any(is_inside(name, module) for name, _ in imports_of(file))}


def test_triton_and_visualdl_stay_where_they_belong():
    others = {name for name in importers("triton") if not name.endswith("_triton.py")}
    assert others == {"bench/kernel_static.py"}  # asks Triton's compiler
    assert importers("visualdl") == {"train/report.py"}


def forbidden(tree):
    """Lines with a bare or blanket except, or a call that runs or unpickles what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [ast.unparse(kind) if kind else "everything" for kind in caught]
            found += [f"{node.lineno}: except {name}" for name in names
                      if name in ("everything", "Exception", "BaseException")]  # fmt: skip
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # NumPy's own arrays hold no code unless allow_pickle is asked for
            harmless = called in ("np.load", "numpy.load") and all(
                word.arg != "allow_pickle" for word in node.keywords
            )
            if called in FORBIDDEN_CALLS and not harmless:
                found.append(f"{node.lineno}: {called}()")
    return found


def test_nothing_catches_everything_or_runs_what_it_reads():
    found = {name_of(file): forbidden(tree_of(file)) for file in FILES}
    bad = {file: [line for line in lines if not line.endswith(CATCHES_ALL.get(file, "!"))]
           for file, lines in found.items()}  # fmt: skip
    assert {file: lines for file, lines in bad.items() if lines} == {}
    importing = {module: importers(module) for module in FORBIDDEN_MODULES}
    assert {module: files for module, files in importing.items() if files} == {"pickle": {UNPICKLER}}


def test_pickle_is_imported_for_its_unpickler_alone():
    uses = [
        ast.unparse(node)
        for node in ast.walk(tree_of(PACKAGE / UNPICKLER))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    ]
    assert sorted(uses) == ["pickle.Unpickler", "pickle.UnpicklingError"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fp8/quantize.py", "from ppcoat.nn.saved_tensors import pack"),
        ("fp8/quantize.py", "from ..nn import saved"),
        ("fp8/quantize.py", "import ppcoat.config.schema"),
        ("config/load.py", "def f():\n    from ppcoat.data.sources import Item"),
        ("lora/layer.py", "from ppcoat.models.flux.transformer import FluxTransformer2DModel"),
        ("models/flux/lora_methods.py", "from ppcoat.lora import load_lora"),
        ("models/flux/pipeline.py", "def load_lora():\n    from ppcoat.lora import load_lora"),
        ("models/flux/lora_methods.py", "def encode_prompt():\n    from ppcoat.lora import load_lora"),
        ("models/flux/transformer.py", "def load_lora():\n    from ppcoat.lora import load_lora"),
        ("infer/generate.py", "from ppcoat.train.trainer import Trainer"),
        ("train/trainer.py", "from ppcoat import cli"),
        ("optim.py", "from .nn.saved_tensors import pack"),
        ("device.py", "from ppcoat.fp8 import formats"),
        ("plan/model.py", "from ppcoat.train.trainer import Trainer"),
        ("plan/settings.py", "def f():\n    from ppcoat.train.model_spec import ModelSpec"),
        ("coat.py", "from ppcoat.models.flux.transformer import FluxTransformer2DModel"),
        ("objective.py", "from ppcoat.train.trainer import Trainer"),
        ("train/trainer.py", "from ppcoat.plan import kept"),
        ("train/trainer.py", "from ppcoat.bench.bench_worker import BenchmarkCase"),
        ("cli/doctor.py", "from ppcoat.bench import parity"),
        ("cli/main.py", "def f():\n    import ppcoat.bench.parity"),
    ],
)
def test_the_rule_sees_what_breaks_it(path, source):
    assert broken_rules(PACKAGE / path, ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lora/layer.py", "from ppcoat.models.flux import ATTENTION_AND_MLP\nfrom .loading import load_lora"),
        ("models/flux/lora_methods.py", "def load_lora_weights():\n    from ppcoat.lora import load_lora"),
        ("optim.py", "from .fp8.adamw import adamw_step\nfrom ppcoat.errors import ConfigError"),
        ("models/loading.py", "from ppcoat import atomic, device, errors\nimport paddle"),
        ("train/flux.py", "from ppcoat.plan.settings import with_memory_plan"),
        ("plan/model.py", "from ppcoat.coat import chosen_modules"),
        (
            "bench/parity.py",
            "from ppcoat.bench.quickstart import draw\nfrom ppcoat.config.flags import add_flags",
        ),
    ],
)
def test_the_rule_lets_pass_what_is_allowed(path, source):
    assert not broken_rules(PACKAGE / path, ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    pass\nexcept:\n    pass",
        "try:\n    pass\nexcept Exception:\n    pass",
        "try:\n    pass\nexcept (ValueError, BaseException) as e:\n    pass",
        "eval('1')",
        "paddle.load('x')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_search_finds_what_is_forbidden(source):
    assert forbidden(ast.parse(source))
    assert not forbidden(ast.parse("model.eval()\nnp.load('x')\nsafetensors.paddle.load(b'')"))
