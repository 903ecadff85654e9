"""What the forward of a language model of transformers does between head and loss, read from its source.

A forward that is not one of the known forms is not served: what it might do besides cannot be seen from its
results for one input, and running it would cost a pass of the model.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from torch import nn

from lmkern.huggingface.swapping import own_forward

_PLAIN_LOSS = {
    f"{module}CrossEntropyLoss({option})"
    for module in ("", "nn.", "torch.nn.")
    for option in ("", "ignore_index=-100")
}

_ASKED = ("get_text_config()", "get_decoder()")


@dataclass(frozen=True, slots=True)
class Reading:
    """head: path from the model to what makes the logits. softcap: source of its value, or None.
    asks: whether self.loss_function makes the loss; else CrossEntropyLoss does, `part` of the model or not.
    shifts: whether labels become the decoder's input where that is missing, by self._shift_right."""

    head: str
    softcap: str | None
    asks: bool
    part: str | None = None
    shifts: bool = False


class _Unknown(Exception):
    pass


@cache
def read_forward(cls: type[nn.Module]) -> Reading | str:
    """How cls makes its loss, or why that is not known."""
    try:
        return _read(_function(cls))
    except _Unknown as unknown:
        return str(unknown)


def leads_to(module: Any, path: str, head: nn.Module) -> bool:
    """Whether what module.path gives is what head gave it."""
    module = reduce(lambda x, name: getattr(x, name, None), path.split("."), module)
    if module is head or not isinstance(module, nn.Module):
        return module is head
    try:
        body = _function(type(module)).body
    except _Unknown:
        return False
    returned = [node.value for line in body for node in ast.walk(line) if isinstance(node, ast.Return)]
    if len(returned) != 1 or not isinstance(body.pop(), ast.Return):
        return False
    value = returned[0]
    while isinstance(value, ast.Name) and body:
        name, before = _assigned(body.pop())
        value = before if name == value.id else None
    inner = _called(value)
    return inner is not None and leads_to(module, inner, head)


def value_of(model: Any, source: str) -> Any:
    """The value of self.a.b, where a name may be one of _ASKED."""
    value = model
    for name in source.split(".")[1:]:
        value = getattr(value, name.removesuffix("()"))
        value = value() if name in _ASKED else value
    return value


def _function(cls: type[nn.Module]) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(own_forward(cls)))).body[0]
    except (OSError, TypeError, SyntaxError, AssertionError):
        raise _Unknown(f"the source of {cls.__name__}.forward cannot be read") from None
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _read(function: ast.FunctionDef) -> Reading:
    asked = [node for node in ast.walk(function) if _called(node) == "loss_function"]
    if len(asked) > 1:
        raise _Unknown("its forward makes several losses")
    if asked:
        call: Any = asked[0]
        given = [x.value for x in call.keywords if x.arg == "logits"] or call.args[:1]
        if not given or not isinstance(given[0], ast.Name):
            raise _Unknown("its forward changes the logits before the loss")
        # `logits.shape[-1]` may stand for the size of the vocabulary.
        sizes = [x.value for x in call.keywords if x.arg == "vocab_size"] + call.args[2:3]
        known = {given[0]}.union(*map(ast.walk, sizes))
        return Reading(*_logits(function, given[0].id, known), asks=True)
    for block in function.body:
        if not isinstance(block, ast.If) or ast.unparse(block.test) != "labels is not None":
            continue
        if (found := _plain_loss(block)) is not None:
            name, loss, part = found
            head, softcap = _logits(function, name, set(ast.walk(block)))
            shifts = _shifts_labels(function, block)
            _check_loss(function, loss, block)
            return Reading(head, softcap, asks=False, part=part, shifts=shifts)
    raise _Unknown("its forward makes its loss in a way that is not known here")


def _assigned(line: ast.stmt) -> tuple[str | None, ast.expr | None]:
    if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
        return line.targets[0].id, line.value
    return None, None


def _called(node: Any) -> str | None:
    """The path "a.b" of a call self.a.b(...)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        root, _, path = ast.unparse(node.func).partition(".")
        if root == "self" and all(name.isidentifier() for name in path.split(".")):
            return path
    return None


def _logits(function: ast.FunctionDef, name: str, known: set[ast.AST]) -> tuple[str, str | None]:
    """Path of the head and source of the soft cap, if nothing else is done to the logits of that name."""
    changed = _Unknown("its forward changes the logits before the loss")
    head = softcap = None
    for line in function.body:
        target, value = _assigned(line)
        if target == name:
            while (inner := _method(value)) is not None:
                value = inner
            path = _called(value)
            if path is None and head is None:
                # What has the name before is no logits, as the stream in DistilBERT.
                continue
            if softcap is not None or path is None:
                raise changed
            head = path
            known |= _before(function, line) | set(ast.walk(line))
        elif isinstance(line, ast.If) and (cap := _soft_cap(line, name)) is not None:
            if head is None or softcap is not None:
                raise changed
            softcap = _in_full(function, cap)
            known |= set(ast.walk(line))
        elif isinstance(line, ast.If) and ast.unparse(line.test) == "not return_dict":
            known |= set(ast.walk(line))
        elif isinstance(line, ast.Return):
            for node in ast.walk(line):
                if isinstance(node, ast.keyword) and node.arg == "logits":
                    known.add(node.value)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "device":
            known.add(node.value)
    if head is None or any(_is_name(node, name) and node not in known for node in ast.walk(function)):
        raise changed
    return head, softcap


def _before(function: ast.FunctionDef, line: ast.stmt) -> set[ast.AST]:
    lines = function.body[: function.body.index(line)]
    return {node for earlier in lines for node in ast.walk(earlier)}


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _method(node: Any) -> ast.expr | None:
    """x of x.float() and x.contiguous()."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args + node.keywords:
        return node.func.value if node.func.attr in ("float", "contiguous") else None
    return None


def _soft_cap(block: ast.If, name: str) -> str | None:
    """c of `if c is not None: logits = tanh(logits / c) * c`, a line a step."""
    test = ast.unparse(block.test)
    cap = test.removesuffix(" is not None")
    written = cap.strip("()").partition(" := ")
    short = written[0] if written[1] else cap
    lines = [ast.unparse(line).replace(f"{name}.float()", name) for line in block.body]
    steps = [f"{name} = {step}" for step in (f"{name} / {short}", f"torch.tanh({name})", f"{name} * {short}")]
    if cap == test or block.orelse or lines != steps:
        return None
    return written[2] or cap


def _in_full(function: ast.FunctionDef, source: str) -> str:
    """An expression that begins with self: where it begins with a name, that name's value."""
    root, dot, rest = source.partition(".")
    if root != "self":
        values = [value for target, value in map(_assigned, function.body) if target == root]
        source = f"{ast.unparse(values[0])}{dot}{rest}" if len(values) == 1 and values[0] else ""
    names = source.split(".")
    if names[0] != "self" or not all(x.isidentifier() or x in _ASKED for x in names):
        raise _Unknown("its forward caps the logits by a value that is not read here")
    return source


def _plain_loss(block: ast.If) -> tuple[str, str, str | None] | None:
    """Names of logits and loss, and the path of a CrossEntropyLoss that is a part of the model."""
    *before, (loss, call) = map(_assigned, block.body)
    if loss is None or not isinstance(call, ast.Call) or call.keywords or block.orelse:
        return None
    rows = r"(\w+)\.view\(-1, (self(\.\w+)*\.vocab_size|\1\.size\(-1\)|\1\.shape\[-1\])\)"
    given = ", ".join(map(ast.unparse, call.args))
    if (found := re.fullmatch(rows + r", labels\.(view|reshape)\(-1\)", given)) is None:
        return None
    logits, part = found[1], _called(call)
    known = {("labels", f"labels.to({logits}.device)")}
    if part is None:
        known |= {(ast.unparse(call.func), source) for source in _PLAIN_LOSS}
    if any((name, value and ast.unparse(value)) not in known for name, value in before):
        return None
    # A name that is made before the block might be any function.
    return (logits, loss, part) if part or any(name != "labels" for name, _ in before) else None


def _shifts_labels(function: ast.FunctionDef, block: ast.If) -> bool:
    """Whether labels are shifted to the right for the decoder; what else is done with them is not known."""
    known, shifts = set(ast.walk(block)), False
    for line in function.body:
        if isinstance(line, ast.If) and not line.orelse:
            test = "labels is not None and decoder_input_ids is None and (decoder_inputs_embeds is None)"
            body = [ast.unparse(x) for x in line.body]
            if ast.unparse(line.test) == test and body == ["decoder_input_ids = self._shift_right(labels)"]:
                known, shifts = known | set(ast.walk(line)), True
    if any(_is_name(node, "labels") and node not in known for node in ast.walk(function)):
        raise _Unknown("its forward takes the labels for more than its loss")
    return shifts


def _check_loss(function: ast.FunctionDef, name: str, block: ast.If) -> None:
    known = set(ast.walk(block))
    for line in function.body:
        as_tuple = isinstance(line, ast.If) and ast.unparse(line.test) == "not return_dict"
        if as_tuple or ast.unparse(line) == f"{name} = None":
            known |= set(ast.walk(line))
        elif isinstance(line, ast.Return):
            for node in ast.walk(line):
                if isinstance(node, ast.keyword) and node.arg == "loss":
                    known.add(node.value)
    if any(_is_name(node, name) and node not in known for node in ast.walk(function)):
        raise _Unknown("its forward adds to its loss")
