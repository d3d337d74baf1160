"""README and docs/: their examples run as they stand."""

import re
from pathlib import Path

import paddle

PYTHON = Path(__file__).parents[1] / "docs" / "python.md"


def example(name):
    """The fenced Python block after `<!-- example: name -->`."""
    pattern = rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)```"
    blocks = re.findall(pattern, PYTHON.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1, f"{PYTHON.name} has {len(blocks)} examples named {name!r}"
    return blocks[0]


def test_coat_on_any_model_learns_and_keeps_less(capsys):
    source = example("any model")
    paddle.seed(0)
    names = {}
    exec(compile(source, str(PYTHON), "exec"), names)
    # An untrained model is off by about 1 + its own variance.
    assert float(names["loss"]) < 0.3
    saved, optimizer = names["saved"], names["optimizer"]
    assert saved.bytes_kept < 0.4 * saved.bytes_unpacked
    parameters = sum(p.size for p in names["model"].parameters())
    assert 2 < optimizer.state_bytes() / parameters < 2.1
    assert capsys.readouterr().out.startswith("loss 0.")


def test_the_example_takes_ten_lines_beside_imports_model_and_output():
    lines = [line for line in example("any model").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("import", "from", "model =", "print"))]
    assert len(own) <= 10
