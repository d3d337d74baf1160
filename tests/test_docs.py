"""README.md and docs/: commands parse, links, anchors, paths, config keys and quoted messages exist, examples
run, no number of a table stands on two pages, and a Chinese page has the commands, numbers and links of its
English one.
"""

import argparse
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
import pytest
import yaml
from safetensors.numpy import save_file

import ppcoat
from ppcoat.cli.main import COMMANDS, main
from ppcoat.config.ai_toolkit_keys import KEYS
from ppcoat.config.explain import schema_keys
from ppcoat.data import garments
from ppcoat.models.loading import parameter_shapes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TRANSLATED = sorted((DOCS / "zh").glob("*.md"))
COMING: set[str] = set()  # linked before it is there
NOT_OURS = {"pip", "cp", "apt", "apt-get", "export", "visualdl", "docker", "cd", "source", "playwright"}
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


def ids(page):
    return str(page.relative_to(ROOT))


def every_page(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=ids)


class Page(NamedTuple):
    """blocks: (language, text) of fenced and indented code; prose: all else; spans: code within prose."""

    blocks: list
    prose: str
    spans: list


@cache
def read(page):
    blocks, prose, fence = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("```"):
            if fence is None:
                fence = (line.strip()[3:], [])
            else:
                blocks.append((fence[0], "\n".join(fence[1])))
                fence = None
        elif fence:
            fence[1].append(line)
        elif line.startswith("    ") and not (prose and prose[-1].lstrip()[:1] in tuple("-123456789")):
            blocks.append(("bash", line.strip()))
        else:
            prose.append(line)
    assert fence is None, f"{page.name}: a block of code without an end"
    text = "\n".join(prose)
    return Page(blocks, text, [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)])


def commands_of(page):
    """Lines of shell blocks without comments, as words; and the commands of ours that stand in prose."""
    variables, found = {}, []
    for language, block in read(page).blocks:
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = [re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), word) for word in words]
                while "&&" in words:
                    found.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                if len(words) == 1 and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    variables.update([words[0].split("=", 1)])
                elif words:
                    found.append(words)
    named = re.compile(rf"python |make |pytest |ppcoat ({'|'.join(COMMANDS)})\b")
    return found + [shlex.split(span, comments=True) for span in read(page).spans if named.match(span)]


@cache
def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise AssertionError(message)


def check_flags(name, argv):
    """Parse without running. "..." and what stands in [] or <> leaves a command open."""
    command = COMMANDS[name]
    parser = Parser(prog=name, allow_abbrev=False)
    command.add_flags(parser)
    if not argv or {"...", "-h", "--help"} & {*argv}:  # the command is named, not given
        known = {option for action in parser._actions for option in action.option_strings}
        assert {word for word in argv if word.startswith("--")} <= known
        return
    argv = [word for word in argv if not re.fullmatch(r"\[-.*|[^[]*\]|\|", word)]
    given = (parser.parse_intermixed_args if command.mixed else parser.parse_args)(argv)
    for override in getattr(given, "set", None) or []:
        check_key(override.split("=", 1)[0])


def check_key(key):
    """A key of our schema or of ai-toolkit, or a section of them."""
    key = re.sub(r"\[\]", ".0", re.sub(r"\.\d+(?=\.|$)", ".0", key))
    known = {*schema_keys(), *(each.replace("[]", ".0") for each in KEYS)}
    assert any(each == key or each.startswith(key + ".") for each in known), f"no key {key}"


def check_command(words):
    words = [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]  # variables before it
    program = words[0].rpartition("/")[2]
    if program == "make":
        assert {word for word in words[1:] if "=" not in word} <= targets(), words
        return
    if program == "ppcoat":
        words = ["python", "-m", *words]
    if program == "pytest":
        words = ["python", "-m", *words]
    if program in NOT_OURS:
        files = [each for option, each in zip(words, words[1:], strict=False) if option in ("-r", "-f")]
        assert all((ROOT / file).is_file() for file in files), words
        return
    assert words[0].rpartition("/")[2].startswith("python"), f"what is {words[0]}?"
    words = [word for word in words[1:] if word != "-u"]
    if words[:2] == ["-m", "paddle.distributed.launch"]:
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        words = words[script:] if script else ["-c", ""]
    if words[0] == "-c":
        compile(words[1], "<docs>", "exec")
    elif words[:2] in (["-m", "venv"], ["-m", "build"]):
        return
    elif words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:])
    elif words[:2] == ["-m", "ppcoat"]:
        if not words[2:] or words[2].startswith("-"):
            return
        length = 2 if " ".join(words[2:4]) in COMMANDS else 1
        check_flags(" ".join(words[2 : 2 + length]), words[2 + length :])
    elif words[0].endswith(".py"):
        script = (ROOT / words[0]).read_text(encoding="utf-8")
        named = re.search(r'^__command__ = "(.+)"', script, flags=re.MULTILINE)
        if named:
            check_flags(named[1], words[1:])
    else:
        raise AssertionError(f"what is {' '.join(words)}?")


def check_pytest(words):
    """Files exist, and what -k selects is in their names of tests."""
    files = [ROOT / word for word in words if word.startswith("tests")]
    assert all(file.exists() for file in files), words
    if "-k" in words and files:
        chosen = words[words.index("-k") + 1]
        sources = [
            source for file in files for source in ([file] if file.is_file() else file.rglob("test_*.py"))
        ]
        text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
        assert re.search(rf"def test_\w*{chosen}", text) or re.search(
            rf"\b\w*{chosen}\w*\.py", str(sources)
        ), chosen


@every_page()
def test_every_command_parses(page):
    for words in commands_of(page):
        try:
            check_command(words)
        except (AssertionError, OSError, SyntaxError) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@pytest.fixture
def quickstart_lora(tmp_path, monkeypatch):
    """A folder to work in, where quickstart has left a LoRA."""
    shapes, rng = parameter_shapes(ROOT / "ppcoat/assets/tiny_flux", "transformer"), np.random.default_rng(0)
    tensors = {}
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"):
        rows, columns = shapes["transformer"][f"{path}.weight"]
        tensors[f"transformer.{path}.lora_A.weight"] = rng.standard_normal([8, columns], "float32")
        tensors[f"transformer.{path}.lora_B.weight"] = rng.standard_normal([rows, 8], "float32")
    file = tmp_path / "output/quickstart/quickstart.safetensors"
    file.parent.mkdir(parents=True)
    save_file(tensors, file)
    monkeypatch.chdir(tmp_path)


def test_the_commands_that_work_on_files_run_as_they_stand(quickstart_lora, capsys):
    ran = []
    for words in commands_of(DOCS / "files.md"):
        if words[:3] == ["python", "-m", "ppcoat"] and words[3] in ("inspect", "convert", "merge", "lora"):
            status = main(words[3:])
            assert status == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
            ran.append(words[3])
    assert ran == ["inspect", "convert", "merge", "lora", "lora", "lora"]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return "".join(mark for mark in text if mark.isalnum() or mark in " -_").strip().replace(" ", "-")


@cache
def anchors(page):
    return {slug(line.lstrip("#")) for line in read(page).prose.splitlines() if re.match(r"#+ ", line)}


def links(page):
    """(path, anchor) of the links of a page into the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page).prose):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@every_page()
def test_links_and_anchors_lead_somewhere(page):
    for path, anchor in links(page):
        if str(path.relative_to(ROOT)) in COMING and not path.exists():
            continue
        assert path.exists(), f"{page.name}: no {path.relative_to(ROOT)}"
        assert not anchor or anchor in anchors(path), f"{page.name}: no #{anchor} in {path.name}"


@cache
def python_files():
    return {file.name for folder in ("ppcoat", "tests", "train_scripts", "inference")
            for file in (ROOT / folder).rglob("*.py")}  # fmt: skip


@every_page()
def test_paths_exist(page):
    for span in read(page).spans:
        for path in re.findall(
            r"(?<![\w/.])(?:ppcoat|docs|configs|tests|train_scripts|inference)/[\w./-]*\w/?(?![\w*])", span
        ):
            in_clone = path.replace("ppcoat/configs", "configs")  # the package has them inside
            assert (ROOT / in_clone).exists(), f"{page.name}: no {path}"
        for path in re.findall(r"(?<![\w*>])[\w/]+\.py\b", span):
            assert path.rpartition("/")[2] in python_files(), f"{page.name}: no {path}"


def test_pages_that_the_code_names_exist():
    for file in (ROOT / "ppcoat").rglob("*.py"):
        for name in re.findall(r"docs/\w+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or name in COMING, f"{file.name} names {name}"


@every_page()
def test_config_keys_exist(page):
    sections = "train|model|datasets|network|coat|save|sample|logging"
    for span in read(page).spans:
        if span.endswith((".py", ".safetensors")):
            continue
        if found := re.fullmatch(rf"((?:{sections})(?:\[\])?(?:\.[a-z_0-9]+(?:\[\])?)+)(?:[:=] .*)?", span):
            check_key(found[1])
    for language, block in read(page).blocks:
        for where in _paths(yaml.safe_load(block)) if language == "yaml" else ():
            check_key(where)


def _paths(node, above=""):
    """The dotted keys of a YAML block down to its values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _paths(value, f"{above}.{key}" if above else str(key))
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        for value in node:
            yield from _paths(value, f"{above}.0")
    else:
        yield above


@cache
def messages():
    """The source of the package with texts that are written in several pieces put together."""
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "ppcoat").rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources)).replace('\\"', '"')


@every_page([page for page in PAGES if page.name == "troubleshooting.md"])
def test_quoted_messages_are_those_of_the_code(page):
    first = [
        row[0] for table in tables(page)[:-1] for row in table[1:] if row[0][0] == "`"
    ]  # the last is doctor's
    quoted = [part.strip(" '") for cell in first for span in re.findall(r"`([^`]+)`", cell)
              for part in span.split("...")]  # fmt: skip
    assert len(quoted) > 80
    for part in quoted:
        assert part in messages(), f"no message says {part!r}"


def tables(page):
    """Every table as its rows of cells; the first is the head."""
    found, rows = [], []
    for line in [*read(page).prose.splitlines(), ""]:
        if line.startswith("|"):
            if not re.fullmatch(r"[|\s:-]+", line):
                rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_no_number_of_a_table_stands_on_two_pages():
    """Of tables and printed output. Numbers of four digits that count do not meet by chance, and neither do
    two rows with the same four numbers."""
    seen = {}
    for page in [each for each in PAGES if each not in TRANSLATED]:
        rows = [" ".join(row) for table in tables(page) for row in table[1:]]
        rows += [line for language, block in read(page).blocks if not language for line in block.splitlines()]
        for found in map(NUMBER.findall, rows):
            for said in [each for each in found if re.search(r"\.", each) and len(each.strip("0.")) > 4]:
                assert seen.setdefault(said, page) == page, f"{said}: {seen[said].name} and {page.name}"
            if len(found) > 3:
                assert seen.setdefault(tuple(found), page) == page, f"{page.name}: {found} stands twice"


def example(name):
    """The fenced Python block after `<!-- example: name -->`."""
    pattern = rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)```"
    blocks = re.findall(pattern, (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1, f"docs/python.md has {len(blocks)} examples named {name!r}"
    return blocks[0]


def test_coat_on_any_model_learns_and_keeps_less(capsys):
    source = example("any model")
    paddle.seed(0)
    names = {}
    exec(compile(source, "docs/python.md", "exec"), names)
    # An untrained model is off by about 1 + its own variance.
    assert float(names["loss"]) < 0.3
    saved, optimizer = names["saved"], names["optimizer"]
    assert saved.bytes_kept < 0.4 * saved.bytes_unpacked
    parameters = sum(p.size for p in names["model"].parameters())
    assert 2 < optimizer.state_bytes() / parameters < 2.1
    assert capsys.readouterr().out.startswith("loss 0.")


def test_coat_in_a_loop_of_ones_own_trains(capsys):
    [source] = [text for language, text in read(DOCS / "python.md").blocks if "fp8_saved_tensors" in text]
    model = paddle.nn.Sequential(paddle.nn.Linear(64, 256), paddle.nn.GELU(), paddle.nn.Linear(256, 1))
    before = model[0].weight.numpy()
    names = {"model": lambda x: model(x).mean(), "trainable": model.parameters(), "x": paddle.ones([64, 64])}
    source = source.replace("replace_linear_with_fp8(model)", "replace_linear_with_fp8(net)")
    exec(compile(source, "docs/python.md", "exec"), names | {"net": model})
    assert (model[0].weight.numpy() != before).any()
    kept, unpacked, states = map(int, capsys.readouterr().out.split())
    assert 0 < kept < unpacked and states > 0


@pytest.mark.slow
def test_commands_of_the_tiny_model_run_in_order(tmp_path, monkeypatch, capsys):
    """Train, draw, draw from Python: as they stand, but for fewer pictures and steps."""
    for folder in ("configs", "ppcoat"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    garments.write_folder(tmp_path / "output/quickstart_data", 4, 7, 64, "gold star", "[trigger] ")
    train, draw = commands_of(DOCS / "training.md")[0], commands_of(DOCS / "drawing.md")[0]
    short = ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "sample.sample_every=0"]
    assert train[3:5] == ["train", "configs/quickstart.yaml"] and draw[3] == "generate"
    assert main([*train[3:], *short]) == 0
    (tmp_path / "output/short").rename(tmp_path / "output/quickstart")
    (tmp_path / "output/quickstart/short.safetensors").rename(
        tmp_path / "output/quickstart/quickstart.safetensors"
    )
    assert main([*draw[3:], "--num_images", "1", "--steps", "2"]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "output/pictures").glob("*.png"))) == 1
    [source] = [text for language, text in read(DOCS / "python.md").blocks if "DiffusionPipeline" in text]
    exec(compile(source, "docs/python.md", "exec"), {})
    assert (tmp_path / "dress.png").is_file()


def test_the_example_takes_ten_lines_beside_imports_model_and_output():
    lines = [line for line in example("any model").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("import", "from", "model =", "print"))]
    assert len(own) <= 10


@every_page()
def test_python_blocks_compile_and_what_they_import_is_there(page):
    for language, block in read(page).blocks:
        if language == "python":
            compile(block, str(page), "exec")
            for names in re.findall(r"^from ppcoat import (.+)$", block, flags=re.MULTILINE):
                assert {*names.split(", ")} <= {*ppcoat.__all__}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(not TRANSLATED, reason="docs/zh is not there yet")
@every_page(TRANSLATED or [ROOT / "README.md"])
def test_a_chinese_page_has_the_commands_numbers_and_links_of_its_english_one(page):
    english = ROOT / "README.md" if page.name == "README.md" else DOCS / page.name
    assert english.exists(), f"{page.name} has no English page"
    for what, found in {"code": code_of, "tables": numbers_of, "links": places_of}.items():
        ours, theirs = found(page), found(english)
        for number, (mine, wanted) in enumerate(zip(ours, theirs, strict=False), 1):
            assert mine == wanted, f"zh/{page.name}, {what} {number}: {mine} where English has {wanted}"
        assert len(ours) == len(theirs), f"zh/{page.name}: {len(ours)} {what}, English has {len(theirs)}"


def code_of(page):
    """Blocks of code without comments, then the commands that stand in prose."""
    blocks = []
    for language, text in read(page).blocks:
        lines = [line if not language else re.sub(r"(^|\s)(#|//) .*", "", line) for line in text.splitlines()]
        blocks.append((language, [line.split() for line in lines if line.strip()]))
    commands = [span for span in read(page).spans if span.startswith(("python ", "make ", "pytest "))]
    return [*blocks, *sorted(commands)]


def numbers_of(page):
    """Of each row of each table: how many cells, and of each the numbers and the code."""

    def said(cell):
        text = re.sub(r"\]\([^)]*\)", "", cell)
        return sorted(NUMBER.findall(text)), sorted(re.findall(r"`([^`]+)`", text))

    return [[said(cell) for cell in row] for table in tables(page) for row in table]


def places_of(page):
    """What a page links to, sorted: a Chinese page counts as its English one; without anchors, and without
    the two links from one language to the other."""
    own = ROOT / "README.md" if page.name == "README.md" else DOCS / page.name
    places = []
    for path, _ in links(page):
        if path.parent == DOCS / "zh":
            path = ROOT / "README.md" if path.name == "README.md" else DOCS / path.name
        if path != own:
            places.append(str(path.relative_to(ROOT)))
    return sorted(places)
