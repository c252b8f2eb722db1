"""The README's table of values, made of values.yaml and its comments."""

import re

from chart import CHART

BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def _entries():
    """Each key's path, the comment before it and what stands behind it."""
    path, comment, inside = [], [], None
    for line in (CHART / "values.yaml").read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if inside is not None and indent > inside:
            continue
        inside = None
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
        elif match := re.fullmatch(r"([A-Za-z_]+):\s*(.*)", text):
            path = path[: indent // 2] + [match[1]]
            yield ".".join(path), " ".join(comment), match[2]
            comment = []
        elif text.startswith("- "):
            inside = indent - 1
        else:
            comment = []


def _whole(entries):
    """A default that goes over several lines is a map that its entries tell of, or a list that is only named."""
    keys = [key for key, _, _ in entries]
    for key, comment, default in entries:
        if default or comment or not any(k.startswith(f"{key}.") for k in keys):
            yield key, comment, default or ("…" if not any(k.startswith(f"{key}.") for k in keys) else "")


def table():
    rows = ["| value | default | |\n|---|---|---|\n"]
    for key, comment, default in _whole(list(_entries())):
        shown = f"`{default}`" if default and default != "…" else default
        rows.append(f"| `{key}` | {shown} | {comment.replace('|', chr(92) + '|')} |\n")
    return "".join(rows)


def in_readme(text):
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after
