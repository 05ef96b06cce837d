"""The code of a module with `__lines__[n] = 1` before each statement, n being the line where it begins."""

from __future__ import annotations

import ast
from pathlib import Path
from types import CodeType


def compiled(path: Path) -> CodeType:
    """The module at a path, with marks."""
    tree = _Marker().visit(ast.parse(path.read_bytes(), str(path)))
    return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)


class _Marker(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, _marked(node, block))
        return node


def _marked(node: ast.AST, block: list[ast.stmt]) -> list[ast.stmt]:
    out: list[ast.stmt] = []
    if isinstance(node, (ast.ExceptHandler, ast.match_case)):
        out.append(_mark(getattr(node, "pattern", node).lineno, block[0]))
    for statement in block:
        marks = [_mark(part.lineno, statement) for part in (*getattr(statement, "decorator_list", ()), statement)]
        if _stays_first(statement):
            out.append(statement)
        else:
            out += [*marks, statement]
    return out


def _stays_first(statement: ast.stmt) -> bool:
    """Whether nothing may come before it: a docstring, an import from __future__."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _mark(line: int, at: ast.stmt) -> ast.stmt:
    where = ast.Subscript(ast.Name("__lines__", ast.Load()), ast.Constant(line), ast.Store())
    return ast.copy_location(ast.Assign([where], ast.Constant(1)), at)
