"""Writes the lists of public names in the packages' `__init__.py`, from the modules' `__all__`.

`make format` runs it; `tests/test_layout.py` fails where a list is not up to date.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "seqmem_fast"
ROOMS = ("ops", "nn", "reference")
BEGIN, END = "# Written by `make format`:\n", "# End of what `make format` writes.\n"


def public_names(path: Path) -> list[str]:
    """The module's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def exports(room: str) -> dict[str, list[str]]:
    """Module -> what its package exports of it; of the references it is the module itself."""
    modules = sorted((PACKAGE / room).glob("[!_]*.py"))
    if room == "reference":
        return {"": [path.stem for path in modules if path.stem != "common"]}
    return {path.stem: names for path in modules if (names := public_names(path))}


def main() -> None:
    for room in ROOMS:
        file, found = PACKAGE / room / "__init__.py", exports(room)
        imports = [f"from .{module} import ({', '.join(found[module])})" for module in found]
        names = sorted(name for some in found.values() for name in some)
        head, _, rest = file.read_text().partition(BEGIN)
        block = "\n".join([*imports, "", f"__all__ = {names}", ""])
        file.write_text(head + BEGIN + block + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
