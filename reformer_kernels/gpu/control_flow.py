"""The loops of a kernel, found in its machine code.

A loop is what compilers call a natural loop: a jump goes back to a block (the head) that every way to the
jump passes, and the loop is all that can reach the jump without passing the head. So cold code that was moved
behind the kernel's end is no loop, and code inside a loop counts as such wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reformer_kernels.gpu.disassembly import Instruction

_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL", "s_endpgm", "s_setpc_b64")
"""Instructions after which, if they are not predicated, no other one follows."""


@dataclass(frozen=True)
class Loop:
    """One loop: the indices of its instructions, those of loops inside it left out, and those loops."""

    own: tuple[int, ...]
    inner: tuple[Loop, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """The indices of all instructions, those of inner loops too."""
        return tuple(sorted((*self.own, *(i for loop in self.inner for i in loop.all))))


def loops_of(code: Sequence[Instruction]) -> tuple[tuple[int, ...], tuple[Loop, ...]]:
    """The indices of the instructions that run outside every loop, and the outermost loops.

    Code that nothing reaches (padding after the end, functions that are called) is in neither.
    """
    starts, successors = _blocks(code)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    predecessors: dict[int, list[int]] = {}
    for block, following in enumerate(successors):
        for other in following:
            predecessors.setdefault(other, []).append(block)
    for block in dominators:
        for head in successors[block]:
            if head in dominators[block] and head in dominators:
                bodies.setdefault(head, {head}).update(_reaching(block, head, predecessors, dominators))

    def instructions(blocks: set[int]) -> tuple[int, ...]:
        return tuple(i for block in sorted(blocks) for i in range(starts[block], starts[block + 1]))

    def nest(inside: set[int], candidates: list[set[int]]) -> tuple[set[int], tuple[Loop, ...]]:
        """The blocks of `inside` that are in no loop of `candidates`, and the outermost of those loops."""
        loops, rest = [], set(inside)
        left = sorted(candidates, key=len, reverse=True)
        while left:
            body, left = left[0], left[1:]
            own, inner = nest(body, [other for other in left if other < body])
            left = [other for other in left if not other <= body]
            loops.append(Loop(instructions(own), inner))
            rest -= body
        return rest, tuple(loops)

    outside, loops = nest(set(dominators), list(bodies.values()))
    return instructions(outside), loops


def _blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Where each basic block starts (and the end of the code), and the blocks that may follow each."""
    leaders = {0, *(i.target for i in code if i.target is not None)}
    leaders |= {n + 1 for n, i in enumerate(code) if i.target is not None or _ends(i)}
    starts = sorted(leader for leader in leaders if leader < len(code))
    block_at = {start: block for block, start in enumerate(starts)}
    starts.append(len(code))
    successors = []
    for block in range(len(starts) - 1):
        last = code[starts[block + 1] - 1]
        following = []
        # A jump for threads that have diverged (BRA.DIV) leads to a slow way that comes back.
        if last.target is not None and ".DIV" not in last.name:
            following.append(block_at[last.target])
        jumps = last.target is not None and not last.predicated and ".DIV" not in last.name
        if not jumps and not _ends(last) and block + 1 < len(starts) - 1:
            following.append(block + 1)
        successors.append(following)
    return starts, successors


def _ends(instruction: Instruction) -> bool:
    return instruction.kind in _ENDS and not instruction.predicated


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """For each block that is reached from the first: the blocks that every way to it passes."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        other = next((b for b in following if b not in seen), None)
        if other is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(other)
            stack.append((other, iter(successors[other])))
    order.reverse()
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for other in successors[block]:
            before[other].append(block)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = {block} | set.intersection(*(dominators[other] for other in before[block]))
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _reaching(
    block: int, head: int, predecessors: dict[int, list[int]], reached: dict[int, set[int]]
) -> set[int]:
    """The blocks from which `block` is reached without passing `head`, and `block` itself."""
    body, stack = {block}, [block]
    while stack:
        current = stack.pop()
        if current == head:
            continue
        for other in predecessors.get(current, []):
            if other in reached and other not in body:
                body.add(other)
                stack.append(other)
    return body
