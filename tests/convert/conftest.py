"""What the tests of conversion share."""

import pytest

from tests.harness import cli


@pytest.fixture(scope="module")
def convert(pool):
    """``convert("import", ...)``: run the command in a process of the pool; return its answer."""

    def call(*arguments):
        [answer] = pool.run(1, cli.call, ["convert", *map(str, arguments)])
        return answer

    return call
