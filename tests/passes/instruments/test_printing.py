from collections.abc import Callable, Container

import pytest

from shohin.ir.printer import format_program
from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.instruments.printing import ALL, Printing
from shohin.passes.manager import PassManager


@pytest.mark.parametrize(
    ("before", "after", "titles"),
    [
        ((), (), []),
        (("other",), ("shift",), ["# after shift{amount=1.0}", "# after shift"]),
        (ALL, (), ["# before shift{amount=1.0}", "# before shift"]),
    ],
)
def test_named_passes_are_printed(
    program: Program,
    shift: Callable[..., Pass],
    before: Container[str],
    after: Container[str],
    titles: list[str],
) -> None:
    texts: list[str] = []
    passes = [shift(amount=1.0), shift()]
    PassManager(passes, [Printing(before, after, texts.append)]).run(program, Context())
    assert [text.splitlines()[0] for text in texts] == titles


def test_the_text_is_the_programs(program: Program, shift: Callable[..., Pass]) -> None:
    texts: list[str] = []
    manager = PassManager([shift()], [Printing(before=ALL, after=ALL, write=texts.append)])
    result = manager.run(program, Context())
    assert texts == [
        f"# before shift\n{format_program(program)}",
        f"# after shift\n{format_program(result)}",
    ]
