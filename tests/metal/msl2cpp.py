"""Translates a Metal compute source into C++ for the emulator; tests only.

``clang -E`` merges includes and expands macros, Metal's own headers being empty. Then, in place and
line by line: attributes of kernels and of their parameters become registrations behind the source,
declarations of threadgroup memory ask the emulator for it, literals like 1.0h become casts. What is
left is C++ against emulator/metal_shim.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BUILTINS = frozenset(
    (
        *("thread_position_in_grid", "thread_position_in_threadgroup"),
        *("threadgroup_position_in_grid", "threadgroups_per_grid", "threads_per_threadgroup"),
        *("dispatch_threads_per_threadgroup", "threads_per_grid", "thread_index_in_threadgroup"),
        *("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"),
        *("simdgroups_per_threadgroup", "threads_per_simdgroup", "thread_execution_width"),
        *("thread_index_in_quadgroup", "quadgroup_index_in_threadgroup"),
    )
)

_TOKEN = re.compile(
    r"""(?P<directive>^[ \t]*\#[^\n]*)|(?P<space>\s+)
    |(?P<string>"(?:\\.|[^"\\])*")|(?P<character>'(?:\\.|[^'\\])+')
    |(?P<name>[A-Za-z_]\w*)|(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<open>\[\[)|(?P<close>\]\])
    |(?P<mark>::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||<<|[-+*/%&|^]=|\+\+|--|.)""",
    re.M | re.S | re.X,
)


class TranslationError(Exception):
    """The source is no Metal that the translator knows."""


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    begin: int
    end: int


@dataclass
class Kernel:
    parameters: list[str]
    unsupported: list[str]
    templated: bool
    largest_group: str


@dataclass
class Instance:
    host_name: str
    function: str
    arguments: str
    namespace: str


@dataclass
class Declarator:
    """``[[kernel, host_name("x")]] void ns::f<T>(...) [[...]]``, as far as it has been read."""

    name: str
    arguments: str
    parameters: list[Token]
    open: int  # the token before its parameters
    after: int  # the token behind it


@dataclass
class Attributes:
    is_kernel: bool = False
    host_name: str = ""
    largest_group: str = ""
    after: int = 0


def _tokens(source: str) -> list[Token]:
    found = []
    for match in _TOKEN.finditer(source):
        kind = str(match.lastgroup)
        if kind not in ("space", "directive"):
            found.append(Token(kind, match.group(), match.start(), match.end()))
    return list(_with_true_brackets(found))


def _with_true_brackets(tokens: list[Token]) -> Iterator[Token]:
    """``]]`` that closes ``a[b[i]]`` is two brackets; ``[[`` always opens an attribute."""
    stack: list[str] = []
    for t in tokens:
        if t.kind == "open" or t.text == "[":
            stack.append(t.kind)
        elif t.text == "]" and stack:
            stack.pop()
        elif t.kind == "close":
            if stack and stack[-1] == "open":
                stack.pop()
            else:
                del stack[-2:]
                yield Token("mark", "]", t.begin, t.begin + 1)
                yield Token("mark", "]", t.begin + 1, t.end)
                continue
        yield t


def _text(tokens: list[Token], between: str = " ") -> str:
    return between.join(t.text for t in tokens)


def _by_commas(tokens: list[Token]) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    depth = 0
    for t in tokens:
        depth += (t.text in ("(", "<", "[", "{") or t.kind == "open") - (
            t.text in (")", ">", "]", "}") or t.kind == "close"
        )
        if t.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(t)
    return [p for p in parts if p]


@dataclass
class _Translator:
    source: str
    lint: bool
    tokens: list[Token] = field(init=False)
    edits: list[tuple[int, int, str]] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    constants: list[tuple[str, str]] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)  # a namespace's name, or "{"
    variables: int = 0

    def run(self) -> str:
        self.tokens = _tokens(self.source)
        i = 0
        while i < len(self.tokens):
            i = self._at(i)
        return '#include "metal_shim.h"\n' + self._edited() + "\n" + "\n".join(self._registered())

    def _at(self, i: int) -> int:
        """Translate what begins at token i; the token to go on with."""
        t = self.tokens[i]
        if t.text == "namespace" and (after := self._namespace(i)):
            return after
        if t.text == "{":
            self.scopes.append("{")
        elif t.text == "}" and self.scopes:
            self.scopes.pop()
        elif t.kind == "open" or t.text == "kernel":
            if after := self._kernel(i):
                return after
            if t.kind == "open":
                return self._attribute(i)
        elif t.kind == "number":
            self._number(t)
        elif t.text == "threadgroup" and (after := self._threadgroup_variable(i)):
            return after
        return i + 1

    def _cut(self, begin: int, end: int, instead: str = "") -> None:
        """Replace, but keep the newlines: errors keep their lines."""
        self.edits.append((begin, end, instead + "\n" * self.source.count("\n", begin, end)))

    def _edited(self) -> str:
        parts, position = [], 0
        for begin, end, instead in sorted(self.edits):
            if begin < position:
                raise TranslationError(f"overlapping edits at {self.source[begin:end][:200]!r}")
            parts += [self.source[position:begin], instead]
            position = end
        return "".join(parts) + self.source[position:]

    def _close(self, i: int, opening: str, closing: str) -> int:
        """The token that closes the bracket at i."""
        depth = 0
        for j in range(i, len(self.tokens)):
            depth += (self.tokens[j].text == opening) - (self.tokens[j].text == closing)
            if depth == 0:
                return j
        raise TranslationError(f"nothing closes {opening!r}")

    def _close_angle(self, i: int) -> int:
        angles = others = 0
        for j in range(i, len(self.tokens)):
            text = self.tokens[j].text
            others += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
            if others == 0:
                angles += (text == "<") - (text == ">")
                if angles == 0:
                    return j
        raise TranslationError("nothing closes '<'")

    def _close_attribute(self, i: int) -> int:
        while self.tokens[i].kind != "close":
            i += 1
        return i

    def _namespace(self, i: int) -> int | None:
        j = i + 1
        while self.tokens[j].text not in ("{", ";", "="):
            j += 1
        if self.tokens[j].text != "{":
            return None
        self.scopes.append("namespace " + _text(self.tokens[i + 1 : j], ""))
        return j + 1

    def _enclosing(self) -> str:
        names = (s.removeprefix("namespace ") for s in self.scopes if s != "{")
        return "::".join(n for n in names if n)

    def _number(self, t: Token) -> None:
        text = t.text
        if text.lower().startswith("0x"):
            return
        if text.lower().endswith("bf"):
            self._cut(t.begin, t.end, f"bfloat({text[:-2]}f)")
        elif text[-1] in "hH":
            suffix = "f" if any(c in text for c in ".eE") else ""
            self._cut(t.begin, t.end, f"half({text[:-1]}{suffix})")

    # --- kernels ---

    def _attributes(self, i: int) -> Attributes:
        """Those in front of a function, from token i."""
        found = Attributes()
        while i < len(self.tokens):
            if self.tokens[i].text == "kernel":
                found.is_kernel = True
                i += 1
                continue
            if self.tokens[i].kind != "open":
                break
            end = self._close_attribute(i)
            for part in _by_commas(self.tokens[i + 1 : end]):
                text = _text(part, "")
                found.is_kernel |= text == "kernel"
                if match := re.match(r"host_name\((.*)\)$", text):
                    pieces = re.findall(r'"((?:\\.|[^"\\])*)"', match[1])
                    found.host_name = "".join(pieces)
                if match := re.match(r"max_total_threads_per_threadgroup\((.*)\)$", text):
                    found.largest_group = match[1]
            i = end + 1
        found.after = i
        return found

    def _declarator(self, i: int) -> Declarator:
        tokens = self.tokens
        while tokens[i].text in ("static", "inline"):
            i += 1
        if tokens[i].text == "void":
            i += 1
        elif tokens[i].text == "decltype":
            i = self._close(i + 1, "(", ")") + 1
        while tokens[i].kind == "open":
            i = self._close_attribute(i) + 1
        if tokens[i].text == "::":
            i += 1
        name = tokens[i].text
        i += 1
        while tokens[i].text == "::":
            name += "::" + tokens[i + 1].text
            i += 2
        found = Declarator(name, "", [], i, i)
        if tokens[i].text == "<":
            end = self._close_angle(i)
            found.arguments = _text(tokens[i : end + 1])
            i = end + 1
        found.open = i
        if tokens[i].text == "(":
            end = self._close(i, "(", ")")
            found.parameters = tokens[i + 1 : end]
            i = end + 1
        while i < len(tokens) and tokens[i].kind == "open":
            i = self._close_attribute(i) + 1
        found.after = i
        return found

    def _kernel(self, i: int) -> int | None:
        """A kernel, an explicit instantiation of one, or None."""
        attributes = self._attributes(i)
        if not attributes.is_kernel:
            return None
        tokens = self.tokens
        previous = tokens[i - 1].text if i else ""
        function = self._declarator(attributes.after)
        namespace = self._enclosing()
        full = f"{namespace}::{function.name}" if namespace else function.name
        host_name = attributes.host_name or function.name
        if previous == "template":
            self.instances.append(Instance(host_name, full, function.arguments, namespace))
            self._cut(tokens[i - 1].begin, tokens[function.after].end)
            return function.after + 1
        if tokens[function.after].text != "{":
            return function.after
        kinds, unsupported = self._parameters(function.parameters)
        templated = previous == ">"
        self.kernels[full] = Kernel(kinds, unsupported, templated, attributes.largest_group)
        if not templated:
            self.instances.append(Instance(host_name, full, "", namespace))
        self._cut(tokens[i].begin, tokens[attributes.after - 1].end)
        self._cut_attributes(function.open, function.after)
        return function.after

    def _cut_attributes(self, i: int, end: int) -> None:
        while i < end:
            if self.tokens[i].kind == "open":
                close = self._close_attribute(i)
                self._cut(self.tokens[i].begin, self.tokens[close].end)
                i = close
            i += 1

    def _parameters(self, tokens: list[Token]) -> tuple[list[str], list[str]]:
        """Where each parameter comes from, and those that the emulator has nothing for."""
        kinds, unsupported = [], []
        next_buffer = 0
        for part in _by_commas(tokens):
            attributes, rest = _split_attributes(part)
            text = [t.text for t in rest]
            if text == ["void"]:
                continue
            builtin = next((a for a in attributes if a in BUILTINS), None)
            buffer = next((m for a in attributes if (m := re.match(r"buffer\((.*)\)$", a))), None)
            if builtin is not None:
                kinds.append(f"emu::b_{builtin}")
            elif buffer is not None or ("device" in text or "constant" in text):
                index = _index(buffer[1]) if buffer else next_buffer
                next_buffer = index + 1
                kinds.append(f"emu::Buffer<{index}>")
            else:
                unsupported.append(" ".join(text))
        return kinds, unsupported

    # --- what stands inside ---

    def _attribute(self, i: int) -> int:
        """An attribute of anything but a kernel goes; a function constant becomes a variable."""
        end = self._close_attribute(i)
        inside = _text(self.tokens[i + 1 : end], "")
        match = re.match(r"function_constant\((.*)\)$", inside)
        if match is None:
            self._cut(self.tokens[i].begin, self.tokens[end].end)
            return end + 1
        begin = i - 1
        while begin > 0 and self.tokens[begin - 1].text not in (";", "}", "{"):
            begin -= 1
        name = self.tokens[i - 1].text
        dropped = ("constant", "constexpr", "const", "static")
        kind = " ".join(t.text for t in self.tokens[begin : i - 1] if t.text not in dropped)
        declaration = f"static {kind} {name} = {kind}()"
        self._cut(self.tokens[begin].begin, self.tokens[end].end, declaration)
        self.constants.append((match[1], name))
        return end + 1

    def _threadgroup_variable(self, i: int) -> int | None:
        """``threadgroup T a[n], b;``: every thread of a group gets the same memory."""
        tokens = self.tokens
        if "{" not in self.scopes or tokens[i - 1].text not in (";", "{", "}"):
            return None
        end = i
        while tokens[end].text not in (";", "{"):
            end += 1
        declarators = _by_commas(tokens[i + 1 : end])
        position = _declared_name(declarators[0])
        if tokens[end].text != ";" or position is None:
            return None  # a pointer or a reference
        base = _text(declarators[0][:position])
        declarators[0] = declarators[0][position:]
        replaced = ""
        for declarator in declarators:
            self.variables += 1
            kind, site = f"threadgroup_{self.variables}_t", f"threadgroup_{self.variables}_site"
            name, extent = declarator[0].text, _text(declarator[1:])
            replaced += (
                f"typedef {base} {kind}{extent}; static const char {site} = 0; "
                f"threadgroup {kind}& {name} = emu::threadgroup_variable<{kind}>(&{site}); "
            )
        self._cut(tokens[i].begin, tokens[end].end, replaced)
        return end + 1

    # --- behind the source ---

    def _registered(self) -> Iterator[str]:
        for i, instance in enumerate(self.instances):
            kernel = self._definition(instance)
            if kernel.unsupported:
                yield f"// {instance.host_name}: nothing gives {kernel.unsupported[0]}"
                continue
            function = f"&::{instance.function}{instance.arguments}"
            if self.lint:
                line = f"auto* lint_{i} = {function};"
            else:
                largest = "0" if kernel.templated else kernel.largest_group or "0"
                kinds = f"emu::Parameters<{', '.join(kernel.parameters)}>"
                line = (
                    f"typedef decltype({function}) kernel_{i}_t; "
                    f'static emu::Registered kernel_{i}("{instance.host_name}", '
                    f"&emu::Kernel<kernel_{i}_t, {function}, {kinds}>::call, {largest});"
                )
            namespace = instance.namespace
            yield f"namespace {namespace} {{ {line} }}" if namespace else line
        for i, (index, name) in enumerate(self.constants):
            if not self.lint:
                address = f"(void*)&::{name}, sizeof(::{name})"
                yield f"static emu::FunctionConstant constant_{i}({index}, {address});"
        yield ""

    def _definition(self, instance: Instance) -> Kernel:
        if instance.function not in self.kernels:
            last = instance.function.split("::")[-1]
            same = [name for name in self.kernels if name.split("::")[-1] == last]
            if not same:
                raise TranslationError(f"{instance.function} is instantiated and nowhere defined")
            instance.function = same[0]
        return self.kernels[instance.function]


def _split_attributes(tokens: list[Token]) -> tuple[list[str], list[Token]]:
    attributes, rest, i = [], [], 0
    while i < len(tokens):
        if tokens[i].kind == "open":
            end = next(j for j in range(i, len(tokens)) if tokens[j].kind == "close")
            attributes += [
                _text(p, "").removeprefix("metal::") for p in _by_commas(tokens[i + 1 : end])
            ]
            i = end
        else:
            rest.append(tokens[i])
        i += 1
    return attributes, rest


def _index(expression: str) -> int:
    if not re.fullmatch(r"[\d+ ()]+", expression):
        raise TranslationError(f"buffer({expression}): no number")
    return sum(int(term) for term in re.findall(r"\d+", expression))


def _declared_name(tokens: list[Token]) -> int | None:
    """The index of the name that is declared, None for a pointer, a reference or an initialiser."""
    depth, position = 0, None
    for i, t in enumerate(tokens):
        depth += (t.text in ("<", "(", "[")) - (t.text in (">", ")", "]"))
        if depth:
            continue
        if t.text in ("*", "&", "="):
            return None
        following = tokens[i + 1].text if i + 1 < len(tokens) else ""
        if position is None and t.kind == "name" and following in ("", "["):
            position = i
    return position


def translate(source: str, *, lint: bool = False) -> str:
    """C++ of a preprocessed source; with lint only what a syntax check needs."""
    return _Translator(source, lint).run()
