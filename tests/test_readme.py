"""The README stays true: its file map is the first lines of the files."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def file_map():
    """`path`: first line of the docstring, for each module that says something."""
    lines = []
    for path in sorted((REPOSITORY / "vlm").rglob("*.py")):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        name = path.relative_to(REPOSITORY)
        if path.name == "__init__.py" and path.parent.name != "vlm":
            name = f"{name.parent}/"
        lines.append(f"| `{name}` | {first} |")
    return "\n".join(lines)


def test_file_map_has_one_line_a_file():
    assert file_map() in (REPOSITORY / "README.md").read_text(), f"put this in:\n{file_map()}"
