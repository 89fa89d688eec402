"""Reads our code for the API page: what is not in Google's style, or not in the source.

`mean, std: of each channel` describes two arguments at once; `Raises (when called):` says
when; `Returns:` is plain text. A Flax module has no `__init__` to be seen, and the keys of a
recipe are described by comments.
"""

import ast
import html
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Rewrites docstrings before they are parsed, and gives Flax modules their signature."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            returns = obj.returns if isinstance(obj, griffe.Function) else None
            obj.docstring.value = rewrite(obj.docstring.value, str(returns))
            if obj.name == "Config":
                obj.docstring.value += f"\n{keys_table(textwrap.dedent(obj.source))}\n"

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for cls in _classes(pkg):
            family = [*reversed(cls.mro()), cls]
            bases = [str(base) for one in family for base in one.bases]
            if any(base.endswith(("nn.Module", "PyTreeNode")) for base in bases):
                fields = {
                    name: griffe.Parameter(
                        name,
                        annotation=field.annotation,
                        default=field.value,
                        kind=griffe.ParameterKind.positional_or_keyword,
                    )
                    for one in family
                    for name, field in one.attributes.items()
                    if "instance-attribute" in field.labels  # a ClassVar is not
                }
                signature = griffe.Parameters(*fields.values())
                cls.set_member("__init__", griffe.Function("__init__", parameters=signature))


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in module.members.values():
        if isinstance(member, griffe.Class):
            yield member
        elif isinstance(member, griffe.Module):
            yield from _classes(member)


def keys_table(source: str) -> str:
    """The keys of `Config` as a table, each with its name as its anchor.

    Args:
      source: of the class, whose fields stand below the comments that describe them.
    """
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    rows = ["| key, type and default | meaning |", "|---|---|"]
    keys: list[str] = []
    meaning = ""
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        comment = list(_comment_above(lines, node.lineno - 1))
        if comment or not keys:
            keys = []
            rows.append("")
            meaning = " ".join(comment).replace("|", "&#124;")
        name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
        default = ast.unparse(node.value) if node.value else ""
        default = default.replace("field(default_factory=dict)", "{}")
        rest = html.escape(f": {kind} = {default}", quote=False).replace("|", "&#124;")
        keys.append(f'<code id="{name}"><b>{name}</b>{rest}</code>')
        rows[-1] = f"| {'<br>'.join(keys)} | {meaning} |"
    return "\n".join(rows)


def _comment_above(lines: list[str], number: int) -> Iterator[str]:
    """The comment that ends just above a line, by its number from 0."""
    first = number
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    for line in lines[first:number]:
        yield line.strip().removeprefix("#").strip()


def rewrite(docstring: str, returns: str) -> str:
    """The same in words that the parser knows.

    Args:
      docstring: its indentation is removed.
      returns: the type that the function returns.
    """
    lines: list[str] = []
    # Every entry with the lines that are indented under it.
    entries = re.split(r"^(?=\S|  \S)", docstring + "\n", flags=re.MULTILINE)
    section = when = ""
    for entry in entries:
        if not entry.startswith(" "):
            section, _, when = entry.strip().rstrip("):").partition(" (")
            lines.append("Raises:\n" if section == "Raises" else entry)
        elif section == "Returns" and lines[-1].startswith("Returns"):
            lines.append(f"  {returns}: {entry.lstrip()}")
        elif section == "Raises" and when:
            lines.append(entry.replace(": ", f": {when}, ", 1))
        elif names := re.match(r"  ([a-z_]+(?:, [a-z_]+)+): ", entry):
            text = entry[names.end() :]
            lines += [f"  {name}: {text}" for name in names[1].split(", ")]
        elif section == "Attributes" and ":" not in entry:  # and those of another class
            lines.append(f"\n{entry[2].upper()}{entry[3:]}")
        else:
            lines.append(entry)
    return "".join(lines)
