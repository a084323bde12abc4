"""The words of the package: plain international English, and shapes wherever tensors are taken or returned.

That every configuration key has a comment is tested in `config/test_describe.py`.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "m4train").rglob("*.py"))

# What readers stumble over, and the plain word. "There is no" and "no longer" are fine.
DIALECT = {
    r"\bbeside\b": "next to, alongside, in addition to",
    r"(?<!here )(?<!here's )\b(is|are|was|were) no (?!(longer|more|less|further|reason|need|one)\b)": "is not a, is not",
    r"\banew\b|\bafresh\b": "again, from the beginning",
    r"\bin place of\b": "instead of",
    r"\b(None|empty|none|\w*Error|BadSample) where\b": "if",
    r"\bmisspelt\b|\bspelt\b": "misspelled, spelled",
    r"\b(lest|whence|whither|thereof|therein|whereof|naught|nought|amongst|whilst)\b": "a plain word",
}
# A shape: () or (T, H), (B, N, 3, H, W), (...,), (I * n, kv_heads, head_dim).
SHAPE = re.compile(r"\(\)|\(\.\.\.,?\)|\((?:[\w+*^/ .']+,)+[\w+*^/ .']*\)")


def prose(source: str) -> list[tuple[int, str]]:
    """Comments, docstrings and messages of a module, with their lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = (
        tokenize.COMMENT,
        tokenize.STRING,
        getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
    )  # from Python 3.12 on
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def dialect_in(source: str) -> list[str]:
    found = []
    for line, text in prose(source):
        for pattern, plain in DIALECT.items():
            for match in re.finditer(pattern, " ".join(text.split())):
                found.append(f"{line}: {match[0]!r}, say {plain}")
    return found


@pytest.mark.parametrize("package", sorted({path.relative_to(ROOT / "m4train").parts[0] for path in MODULES}))
def test_words_are_plain(package):
    modules = [path for path in MODULES if path.relative_to(ROOT / "m4train").parts[0] == package]
    found = {str(path.relative_to(ROOT)): dialect_in(path.read_text(encoding="utf-8")) for path in modules}
    assert not {path: words for path, words in found.items() if words}


@pytest.mark.parametrize("pattern", ["conf/**/*.yaml", "docs/*.md", "*.md"])
def test_words_of_files_are_plain(pattern):
    found = {}
    for path in sorted(ROOT.glob(pattern)):
        words = " ".join(path.read_text(encoding="utf-8").split())
        found[str(path.relative_to(ROOT))] = [match[0] for word in DIALECT for match in re.finditer(word, words)]
    assert found
    assert not {name: words for name, words in found.items() if words}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# written beside it", True),
        ("# that is no number", True),
        ("# there is no number", False),
        ("# it is no longer there", False),
        ('"""Raises DataError where it is missing."""', True),
        ('"""Raises DataError if it is missing."""', False),
        ('save_beside = "save_beside"', False),
    ],
)
def test_dialect_is_found(text, found):
    assert bool(dialect_in(text)) == found


def functions(tree: ast.AST):
    for node in ast.walk(tree):
        for inner in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
            if isinstance(inner, ast.FunctionDef):
                yield (node.name if isinstance(node, ast.ClassDef) else ""), inner


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Whether an argument or the result is a tensor or array itself, not a mapping or list of them."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    hints = [ast.unparse(hint) for hint in (*(a.annotation for a in arguments), function.returns) if hint is not None]
    return any(
        part in ("Tensor", "torch.Tensor", "np.ndarray") for hint in hints for part in re.split(r"\s*\|\s*", hint)
    )


def shown(path: Path, owner: str, function: ast.FunctionDef) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {owner + '.' if owner else ''}{function.name}"


def test_every_forward_gives_shapes():
    silent, count = [], 0
    for path in MODULES:
        for owner, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            if function.name == "forward":
                count += 1
                if not SHAPE.search(ast.get_docstring(function) or ""):
                    silent.append(shown(path, owner, function))
    assert count >= 30
    assert not silent, f"say in the docstring which shapes go in and come out: {silent}"


@pytest.mark.parametrize("package", ["models", "processing", "data"])
def test_public_functions_of_tensors_give_shapes(package):
    silent = []
    for path in sorted((ROOT / "m4train" / package).rglob("*.py")):
        for owner, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            public = not function.name.startswith("_") and not owner.startswith("_")
            if public and takes_tensors(function) and not SHAPE.search(ast.get_docstring(function) or ""):
                silent.append(shown(path, owner, function))
    assert not silent, f"say in the docstring which shapes go in and come out: {silent}"
