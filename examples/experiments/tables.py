"""The tables of an experiment as Markdown."""

from collections.abc import Callable

from examples.experiments.cases import Candidate, Experiment
from examples.experiments.cells import Cell, Series, shown

__all__ = ["case_table", "dense_cell", "l1_table", "markdown", "nonzeros_table", "same_block_table", "sparsity_table"]


def dense_cell(cells: list[Cell]) -> Cell | None:
    """The dense model's."""
    return next((cell for cell in cells if cell.candidate.method == "dense"), None)


def sparsity_table(cells: list[Cell]) -> str:
    """Test accuracy at equal block sparsity: a line for each method, block size and rank."""
    own = [cell for cell in cells if cell.case.table == "sparsity"]
    columns = sorted({cell.case.column for cell in own})
    lines: dict[Series, dict[float, Cell]] = {}
    for cell in own:
        lines.setdefault(cell.series, {})[cell.case.column] = cell
    ordered = sorted(lines, key=lambda series: (series[1] or (0, 0), series[2] is not None))
    rows = [[*_names(series), *(_accuracy(lines[series].get(column)) for column in columns)] for series in ordered]
    return markdown([["method", "block", "rank", *(f"{column:.0%}" for column in columns)], *rows], text_columns=2)


def nonzeros_table(cells: list[Cell], table: str = "nonzeros") -> str:
    """Test accuracy at equal nonzeros of the compared layers, with the block and sparsity that validation chose.

    Below it, what every candidate had reached on the validation images when one was chosen.
    """
    own = [cell for cell in cells if cell.case.table == table]
    return f"{_by_nonzeros(own, _with_choice)}\n\nValidation accuracy in the search:\n\n{_by_nonzeros(own, _searched)}"


def same_block_table(cells: list[Cell]) -> str:
    """`nonzeros_table` of the cases that hold the block size fixed."""
    return nonzeros_table(cells, "same_block")


def _by_nonzeros(cells: list[Cell], show: Callable[[Cell], str]) -> str:
    columns = sorted({cell.case.column for cell in cells}, reverse=True)
    lines: dict[str, dict[float, str]] = {}
    for cell in cells:
        lines.setdefault(cell.series[0], {})[cell.case.column] = show(cell)
    rows = [[method, *(line.get(column, "") for column in columns)] for method, line in lines.items()]
    return markdown([["method", *(f"{column:,.0f}" for column in columns)], *rows], text_columns=1)


def l1_table(cells: list[Cell]) -> str:
    """The sparsity that each strength of the l1 penalty gives, and the accuracy there."""
    rows = [
        [
            *_names(cell.series),
            f"{cell.case.column:g}",
            shown(_in_percent(cell)),
            _accuracy(cell),
        ]
        for cell in cells
        if cell.case.table == "l1"
    ]
    return markdown([["method", "block", "rank", "l1", "block sparsity, %", "test accuracy"], *rows], text_columns=2)


def case_table(cells: list[Cell]) -> str:
    """Everything that was measured, a line for each case; training FLOPs are over those of `nn.Linear`."""
    dense = dense_cell(cells)
    header = ["method", "block", "rank", "asked", "sparsity", "test accuracy", "minus dense", "validation", "rate"]
    header += [
        "trained",
        "deployed",
        "nonzeros",
        "of compared layers",
        "their training FLOPs",
        "empty rows, columns",
        "CPU s",
        "peak MiB",
    ]
    rows = [
        [
            *_names(cell.series),
            _asked(cell),
            f"{cell.mean('sparsity'):.4f}",
            _accuracy(cell),
            "" if dense is None or cell is dense else shown(cell.minus(dense), "+"),
            f"{100 * cell.mean('validation_accuracy'):.2f}",
            f"{cell.rows[0]['learning_rate']:g}",
            f"{cell.mean('trained_params'):,.0f}",
            f"{cell.mean('deployed_params'):,.0f}",
            f"{cell.mean('nonzeros'):,.0f}",
            f"{cell.mean('converted_nonzeros'):,.0f}",
            f"{cell.mean('converted_training_flops') / cell.mean('converted_dense_training_flops'):.3f}",
            _empty(cell),
            f"{cell.mean('cpu_seconds'):.1f}",
            f"{cell.mean('peak_memory_bytes') / 2**20:,.0f}",
        ]
        for cell in cells
    ]
    return markdown([header, *rows], text_columns=2)


def conditions(experiment: Experiment, cells: list[Cell]) -> str:
    """One paragraph on what all runs share."""
    recipe, images = experiment.recipe, cells[0].rows[0]["images"]
    grid = ", ".join(f"{rate:g}" for rate in experiment.learning_rates)
    return (
        f"{recipe.model} on {recipe.data}: {images[0]:,} training, {images[1]:,} validation, {images[2]:,} test "
        f"images; {experiment.steps:,} steps of {recipe.batch_size}, AdamW, weight decay {recipe.weight_decay:g}, "
        "warm-up over 5 % of the steps, cosine. The learning rate of every line is searched on the validation images: "
        f"{grid}, and further while the best is at an edge, {experiment.search_steps:,} steps each. Mean ± standard "
        f"deviation over the seeds {', '.join(map(str, experiment.seeds))}. {cells[0].rows[0]['versions']}."
    )


def markdown(rows: list[list[str]], *, text_columns: int) -> str:
    """A table with its header first; the columns after the first ones are right-aligned."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _names(series: Series) -> list[str]:
    method, block, rank = series
    return [method, "" if block is None else "{} x {}".format(*block), "" if rank is None else str(rank)]


def _accuracy(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return shown(cell.accuracy) + ("" if cell.complete else f" ({len(cell.rows)} seeds)")


def _with_choice(cell: Cell) -> str:
    return f"{_accuracy(cell)} ({_shape(cell.candidate)}, {cell.mean('sparsity'):.1%})"


def _searched(cell: Cell) -> str:
    return "; ".join(f"{_shape(candidate)}: {100 * score:.2f}" for score, candidate in cell.searched)


def _shape(candidate: Candidate) -> str:
    block = "{} x {}".format(*(candidate.block_size or (0, 0)))
    return block if candidate.rank is None else f"{block} r {candidate.rank}"


def _asked(cell: Cell) -> str:
    column = cell.case.column
    return {"sparsity": f"{column:.0%}", "l1": f"l1 {column:g}"}.get(cell.case.table, f"{column:,.0f} nonzeros")


def _empty(cell: Cell) -> str:
    """Of the Kronecker layers' features, what could be cut out."""
    if cell.candidate.method != "kron":
        return ""
    return f"{cell.mean('empty_rows'):.0%}, {cell.mean('empty_columns'):.0%}"


def _in_percent(cell: Cell) -> tuple[float, float]:
    values = [100 * value for value in cell.values("sparsity")]
    middle = sum(values) / len(values)
    return middle, (sum((value - middle) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5
