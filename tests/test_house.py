"""What keeps the house in order, read from the source: room sizes, callers, names, shapes in docstrings.

The rules of who may import whom are in test_imports.py. A new exception needs a reason beside it.
"""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ppcoat"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "train_scripts").glob("*.py"), *(ROOT / "inference").glob("*.py")])
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_SCRIPT = 251, 400, 40

# Public names that nothing in the package uses: those of DESIGN's public interface, and what another program
# calls by its name.
FOR_USERS = {
    "extra_repr": "Paddle calls it for the repr of a Layer",
    "scale_noise": "diffusers' image-to-image pipelines call it",
    **dict.fromkeys(
        ("get_active_torch_device", "get_device_interface", "get_empty_cache_for_benchmark", "is_active"),
        "Triton calls it on its driver",
    ),
    "get_active_adapters": "diffusers' users call it",
    "get_list_adapters": "diffusers' users call it",
    "delete_adapters": "diffusers' users call it",
    "from_single_file": "diffusers' users call it",
    "enable_sequential_cpu_offload": "diffusers' users call it",
}
# An op has one name: its reference in fp8/, its kernel, its truth, and the op that models call.
SAME_OP = ("_triton.py", "fp8/truth", "nn/ops.py")
# Names that several modules define on purpose.
SHARED = {
    "add_arguments": "every command's module has it, for cli/main.py",
    "run_command": "every command's module has it, for cli/main.py",
}
# The one module that adds arguments to a parser: all flags are fields of a dataclass or of a config section.
FLAGS = "config/flags.py"
# A shape in a docstring: in brackets a capital letter, a number, several axes or `...` ("[trigger]" is none).
SHAPE = re.compile(r"\[(?=[^\]]*(?:[A-Z0-9,]|\.\.\.))[\w\s,.*/+()<=-]+\]|\bscalar|\bany\s+shape")
DTYPE = re.compile(r"\bb?float(?:16|32|64|ing|s)?\b|\bu?int(?:8|16|32|64)\b|\bdtypes?\b|\bbool\b")


def name_of(file):
    """Path inside the package, with slashes."""
    return file.relative_to(PACKAGE).as_posix()


@pytest.fixture(scope="module")
def trees():
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in [*FILES, *SCRIPTS]}


def public(tree):
    """Public functions and classes at the top of a module, and public methods of its public classes as
    (class, node)."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield None, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield node, method


def words_of(tree):
    """How often each identifier stands in a module, definitions left out, docstrings and strings too."""
    found = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.keyword) and node.arg:
            found[node.arg] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            found.update(re.findall(r"\w+", node.value))  # names in tables: the backend's ops, commands
    return found


def test_the_house_stays_small():
    sizes = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(sizes) <= MOST_FILES
    assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_script_is_a_docstring_and_a_call(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < MOST_LINES_OF_A_SCRIPT


def test_a_room_says_what_it_is_for():
    rooms = [file for file in FILES if file.name == "__init__.py"]
    assert [name_of(f) for f in rooms if not ast.get_docstring(ast.parse(f.read_text("utf-8")))] == []


def test_every_public_name_has_a_caller(trees):
    """A caller is any use of the name outside the tests; a name that is used only where it is defined should
    be private."""
    used = Counter()
    for tree in trees.values():
        used.update(words_of(tree))
    idle = {
        f"{name_of(file)}: {node.name}"
        for file in FILES
        for owner, node in public(trees[file])
        if not used[node.name] and node.name not in FOR_USERS
    }
    assert sorted(idle) == []
    assert [name for name in FOR_USERS if used[name]] == [], "these have a caller now"


def test_a_public_name_means_one_thing(trees):
    places = defaultdict(list)
    for file in FILES:
        if any(pattern in name_of(file) for pattern in SAME_OP):
            continue
        for owner, node in public(trees[file]):
            if owner is None:
                places[node.name].append(name_of(file))
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED}
    assert twice == {}


def test_flags_are_made_from_fields(trees):
    by_hand = [
        f"{name_of(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(trees[file])
        if isinstance(node, ast.Attribute) and node.attr == "add_argument" and name_of(file) != FLAGS
    ]
    assert by_hand == []


def takes_tensors(node):
    annotations = [arg.annotation for arg in [*node.args.args, *node.args.kwonlyargs]] + [node.returns]
    return any(a is not None and "paddle.Tensor" in ast.unparse(a) for a in annotations)


def docstrings(*nodes):
    return "\n".join(ast.get_docstring(node) or "" for node in nodes if node is not None)


def functions_of_tensors(trees):
    """(file, module, class or None, function) of those that are public."""
    for file in FILES:
        for owner, node in public(trees[file]):
            if isinstance(node, ast.FunctionDef) and takes_tensors(node):
                yield file, trees[file], owner, node


def test_public_functions_of_tensors_say_their_shapes(trees):
    """In their own docstring or that of their class."""
    silent = [
        f"{name_of(file)}:{node.lineno} {node.name}"
        for file, _, owner, node in functions_of_tensors(trees)
        if not SHAPE.search(docstrings(node, owner))
    ]
    assert silent == []


def test_public_functions_of_tensors_say_their_dtypes(trees):
    """In their own docstring, that of their class, or that of the module."""
    silent = [
        f"{name_of(file)}:{node.lineno} {node.name}"
        for file, module, owner, node in functions_of_tensors(trees)
        if not DTYPE.search(docstrings(node, owner, module))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x [B, tokens, dim]", True),
        ("[..., D]", True),
        ("[3]", True),
        ("any shape", True),
        ("[trigger]", False),
    ],
)
def test_a_shape_is_more_than_a_word_in_brackets(text, says):
    assert bool(SHAPE.search(text)) == says
