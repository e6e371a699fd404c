"""How many instructions one round of a loop in machine code takes, inner loops included."""

from __future__ import annotations

import re
from collections.abc import Callable

#: An instruction's address and text, as cuobjdump prints them.
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
#: Branches that are always taken, or end a path.
ALWAYS = re.compile(r"^(BRA 0x|EXIT|RET)")


class Code:
    """Disassembled instructions and the loops among them, as ranges of instructions."""

    def __init__(self, sass: str):
        lines = [(int(address, 16), text) for address, text in LINE.findall(sass)]
        place = {address: i for i, (address, _) in enumerate(lines)}
        self.text = [text for _, text in lines]
        self.targets = [
            place.get(int(found[1], 16)) if (found := BRANCH.search(text)) else None
            for text in self.text
        ]
        self.loops = [
            range(target, i + 1)
            for i, target in enumerate(self.targets)
            if target is not None and target < i
        ]

    def loop_with(self, *names: str, within: range | None = None) -> range:
        """The shortest loop that has all of these instructions, inside of another or anywhere.

        Raises:
            ValueError: there is none.
        """
        for loop in sorted(self.loops, key=len):
            inside = within is None or (loop.start >= within.start and loop.stop <= within.stop)
            if inside and all(any(name in self.text[i] for i in loop) for name in names):
                return loop
        raise ValueError(f"expected a loop with {', '.join(names)}, found none")

    def round_length(
        self,
        loop: range,
        rounds: Callable[[range], int | None],
        avoided: Callable[[str], bool],
    ) -> int:
        """Instructions of the longest way through a loop.

        Ways that leave the loop are not looked at, such as the one by which a thread asks a barrier
        once more.

        Args:
            rounds: of an inner loop in one of what is around it; None: the way must not meet it.
            avoided: instructions that the way must not meet.
        """
        weight = dict.fromkeys(loop, 1)
        forbidden = {i for i in loop if avoided(self.text[i])}
        for inner in self.loops:
            if inner.start >= loop.start and inner.stop <= loop.stop and inner != loop:
                times = rounds(inner)
                for i in inner:
                    weight[i] *= times or 0
                if times is None:
                    forbidden.update(inner)
        longest: dict[int, int | None] = {loop.stop: None}
        for i in reversed(loop):
            target = self.targets[i]
            ways = [] if ALWAYS.match(self.text[i]) else [i + 1]
            if target is not None and i < target < loop.stop:
                ways.append(target)
            lengths = [n for way in ways if (n := longest[way]) is not None]
            if i == loop[-1]:
                lengths = [0]
            blocked = i in forbidden or not lengths
            longest[i] = None if blocked else max(lengths) + weight[i]
        length = longest[loop.start]
        if length is None:
            raise ValueError("expected a way through the loop, found none")
        return length
