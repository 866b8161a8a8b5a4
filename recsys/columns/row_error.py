"""A fault of one cell of a table."""

from core_gates.errors import GatesError


class RowError(GatesError):
    """A column has a value that cannot be read in some row.

    Readers of files catch it and add the file and the line.

    Args:
        column: Name of the column.
        row: First such row, from 0.
        problem: What was found and what was expected.
        where: Name of the table, such as a file; left out of the message if empty.
        counted: How rows are called: ``row`` from 0, or ``line`` of a file.
    """

    def __init__(
        self, column: str, row: int, problem: str, where: str = "", counted: str = "row"
    ) -> None:
        place = f"{where}, " if where else ""
        super().__init__(f"{place}{counted} {row}, column {column!r}: {problem}")
        self.column, self.row, self.problem = column, row, problem
        self._given = column, row, problem, where, counted

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, int, str, str, str]]:
        """Tell pickle the arguments, so that worker processes can report the error."""
        return RowError, self._given

    def shifted(self, rows: int) -> "RowError":
        """Return the error of a table that has ``rows`` rows before these."""
        return RowError(self.column, self.row + rows, self.problem)
