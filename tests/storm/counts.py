"""What the storm tried and how much of it was right.

    from counts import judge
    judge("LoRA file", "kill", found == known, "operation 7")       row, column, whether right, which case

A wrong case fails its test, but only at the end, so that every case is tried. A run with -s ends with the
tables in Markdown: "tried / right / wrong", and rows that share a column share a table.
"""

COUNTS: dict[str, dict[str, list[bool]]] = {}
WRONG: list[str] = []  # in the test that runs


def judge(row: str, column: str, right: bool, told: str) -> None:
    COUNTS.setdefault(row, {}).setdefault(column, []).append(bool(right))
    if not right:
        WRONG.append(f"{row}, {column}: {told}")


def tables() -> str:
    """Rows and columns in the order in which they came; a column whose rows were joined later, too."""
    joined: list[tuple[list[str], list[str]]] = []  # rows, columns
    for row, cells in COUNTS.items():
        rows, columns = [row], [*cells]
        for other in [each for each in joined if set(each[1]) & set(columns)]:
            joined.remove(other)
            rows = other[0] + rows
            columns = list(dict.fromkeys(other[1] + columns))
        joined.append((rows, columns))
    return "\n\n".join("\n".join(_lines(rows, columns)) for rows, columns in joined)


def _lines(rows: list[str], columns: list[str]) -> list[str]:
    lines = [f"| what was tried | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [COUNTS[row].get(column, []) for column in columns]
        counts = [f"{len(c)} / {sum(c)} / {len(c) - sum(c)}" if c else "" for c in cells]
        lines.append(f"| {row} | {' | '.join(counts)} |")
    totals = [[right for row in rows for right in COUNTS[row].get(column, [])] for column in columns]
    total = " | ".join(f"{len(c)} / {sum(c)} / {len(c) - sum(c)}" for c in totals)
    return [*lines, f"| all | {total} |"]
