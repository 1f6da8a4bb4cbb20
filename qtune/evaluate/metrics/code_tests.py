"""Code scored by running it: an answer is Python, and it passes the tests of its row."""

import ast
import re

from qtune.evaluate.metrics import Asked, Label, Marks, Metric

FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


def code_tests(answer: str, asked: Asked) -> Marks:
    """1 where the answer passes all tests in `asked.check`, else 0: pass@1 (Chen et al. 2021, arXiv:2107.03374).

    Some of the tests are not some of the work, so there is nothing in between. Parts: `parses`, `passes`.
    """
    from qtune.evaluate import sandbox

    verdict = sandbox.run(code_of(answer), asked.check)
    return Marks(float(verdict.passes), {"parses": float(verdict.parses), "passes": float(verdict.passes)})


def code_of(answer: str) -> str:
    """The first fenced block, to its end or that of an answer that was cut short; all of an answer without one."""
    block = FENCE.search(answer)
    return block[1] if block else answer


def fault_of(asked: Asked) -> str | None:
    """Why no answer to this row could be scored: it has no tests, or they are not Python.

    Raises MachineError where nothing may be run.
    """
    from qtune.evaluate import sandbox

    sandbox.refuse_elsewhere()
    if not asked.check.strip():
        return 'has no tests; data.columns.check names the column that holds them, as in { check = "tests" }'
    try:
        ast.parse(asked.check)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
        where = f", line {fault.lineno}" if isinstance(fault, SyntaxError) and fault.lineno else ""
        return f"has tests that are not Python ({getattr(fault, 'msg', fault)}{where})"
    return None


METRIC = Metric(
    name="code_tests",
    use="for Python that is run against the tests in columns.check",
    label=Label("working programs", "all tests of their row pass"),
    marks=code_tests,
    fault_of=fault_of,
    order=5,
)
