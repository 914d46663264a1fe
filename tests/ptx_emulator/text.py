"""PTX as text: parameters, registers, labels and instructions of one kernel."""

from __future__ import annotations

import re


class Kernel:
    """A parsed entry.

    Attributes:
        params: (name, bits) of each. threads: of a block. registers: of a thread at its begin, the most; 0 if that is not said.
        bits: of registers, by what their names begin with.
        code: (guard as (register, inverted) or None, opcode, operands) of each instruction. labels: indices into it.
        tables: labels of a branch by index.
    """

    def __init__(self, ptx: str):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        ptx = re.sub(r"^\s*\.(loc|file)[^\n]*$", "", ptx, flags=re.M)
        head = re.search(r"\.entry\s+\w+\s*\((.*?)\)([^{]*)\{", ptx, re.S)
        self.params = [_param(line.strip()) for line in head[1].split(",") if line.strip()]
        self.threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[2])[1])
        self.registers = int((re.search(r"\.maxnreg\s+(\d+)", head[2]) or [0, 0])[1])
        self.bits: dict[str, int] = {}
        self.code: list[tuple] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        for line in _statements(_body(ptx, head.end())):
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line.startswith(".branchtargets"):
                self.tables[list(self.labels)[-1]] = [name.strip() for name in line.split(None, 1)[1].split(",")]
            elif line.startswith(".reg"):
                _, kind, names = line.split(None, 2)
                bits = 1 if kind == ".pred" else int(re.search(r"\d+", kind)[0])
                self.bits.update((re.sub(r"<\d+>", "", name.strip()), bits) for name in names.split(","))
            elif line and not line.startswith((".pragma", ".section")):
                self.code.append(_instruction(line))

    def register_bits(self, name: str) -> int | None:
        """None for what is no register."""
        return self.bits.get(name) or self.bits.get(re.sub(r"\d+$", "", name))


def _param(line: str) -> tuple[str, int]:
    name, _, count = re.search(r"(\w+)(\[(\d+)\])?$", line).groups()
    return name, 8 * int(count) if count else int(re.search(r"\.[ubsf](\d+)", line)[1])


def _body(ptx: str, begin: int) -> str:
    depth, end = 1, begin
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    return ptx[begin : end - 1]


def _statements(text: str) -> list[str]:
    """Statements, and labels with a colon. Registers and labels of an inner scope get names of their own."""
    found, scopes, count, statement = [], [], 0, ""  # a scope: (suffix, names)
    for token in (match[0] for match in re.finditer(r"[;{}:]|[^;{}:]+", text)):
        if token == "{" and not statement.strip():
            count += 1
            scopes.append((f"_scope{count}", set()))
            statement = ""
        elif token == "}" and not statement.strip():
            scopes.pop()
            statement = ""
        elif token == ":" and re.fullmatch(r"\s*[\w$]+\s*", statement):
            label = statement.strip()
            if scopes:
                scopes[-1][1].add(label)
                label += scopes[-1][0]
            found.append(label + ":")
            statement = ""
        elif token == ";":
            line = " ".join(statement.split())
            if scopes:
                suffix, names = scopes[-1]
                if line.startswith(".reg"):
                    names.update(re.findall(r"[\w%$]+", line.split(None, 2)[2]))
                for name in names:
                    line = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?![\w$])", name + suffix, line)
            found.append(line)
            statement = ""
        else:
            statement += token
    return found


def _instruction(line: str) -> tuple:
    guard = None
    if line.startswith("@"):
        word, line = line.split(None, 1)
        guard = (word.lstrip("@!"), "!" in word)
    opcode, _, rest = line.partition(" ")
    return guard, opcode, split(rest)


def split(text: str) -> list[str]:
    """Operands, separated by commas outside of brackets."""
    operands, depth, current = [], 0, ""
    for char in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and not depth:
            operands.append(current.strip())
            current = ""
        else:
            current += char
    return operands + [current.strip()] * bool(current.strip())
