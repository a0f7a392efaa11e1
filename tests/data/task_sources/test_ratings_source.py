"""MovieLens: the atomic files, five folds that partition, and each user's last rating held out."""

from __future__ import annotations

import pytest
from source_samples import fetcher_of

from moekit.config.errors import ConfigError, DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.ratings import atomic_rows, ml_100k

FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
USERS = (
    "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "7\t24\tM\twriter\t85711\n8\t53\tF\tother\t94043\n"
)
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tGoldenEye\t1995\tAction\n3\tFargo\t1996\tCrime Drama\n"
)
RATINGS = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "7\t1\t3\t300\n8\t2\t5\t100\n7\t2\t4\t100\n8\t1\t1\t200\n7\t3\t2\t300\n8\t3\t2\t150\n"
)


def fetcher(tmp_path, **changes: str):
    files = {"user": USERS, "item": ITEMS, "inter": RATINGS, **changes}
    return fetcher_of(tmp_path, {"recbole": {f"{FOLDER}.{name}": text for name, text in files.items()}})


def test_a_rating_knows_its_user_and_its_film(tmp_path) -> None:
    data = ml_100k(fetcher(tmp_path), leave_one_out=True)
    first = {name: values[0] for name, values in data.train.columns.items()}
    assert first == {
        "user": "8", "item": "2", "rating": 5.0, "time": 100, "title": "GoldenEye", "year": 1995,
        "genres": ["Action"], "age": 53, "gender": "F", "occupation": "other",
    }  # fmt: skip
    assert data.validation.rows([1])["genres"] == [["Animation", "Children's", "Comedy"]]


def test_the_last_rating_of_each_user_is_tested_on_and_ties_follow_the_file(tmp_path) -> None:
    data = ml_100k(fetcher(tmp_path), leave_one_out=True)
    pairs = [
        list(zip(part["user"], part["item"], strict=True))
        for part in (data.train, data.validation, data.test)
    ]
    # user 7 has two ratings of second 300; the later one in the file is the last
    assert pairs == [[("8", "2"), ("7", "2")], [("8", "3"), ("7", "1")], [("8", "1"), ("7", "3")]]
    assert not data.given_test


def test_five_folds_hold_each_rating_once(tmp_path) -> None:
    text = RATINGS + "".join(f"{7 + i % 2}\t{1 + i % 3}\t{1 + i % 5}\t{400 + i}\n" for i in range(54))
    folds = [ml_100k(fetcher(tmp_path, inter=text), fold=fold) for fold in range(5)]
    times = [set(zip(data.test["user"], data.test["time"], data.test["item"], strict=True)) for data in folds]
    assert [len(part) for part in times] == [12] * 5
    assert len(set.union(*times)) == 60
    for data in folds:
        assert len(data.train) == 48
        assert len(data.validation) == 0
        assert set(data.validation.columns) == set(data.train.columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 5}, r"data.options.fold must be in 0..4; got 5"),
        ({"fold": 1, "leave_one_out": True}, "no meaning with leave_one_out"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ml_100k(fetcher(tmp_path), **options)


def test_an_unknown_option_names_the_nearest(tmp_path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fold'"):
        load_source("ml-100k", {"folds": 1}, fetcher(tmp_path))


def test_broken_files_name_the_line(tmp_path) -> None:
    with pytest.raises(DataError, match="few:2: 1 fields where the heading names 2"):
        list(atomic_rows("a:token\tb:token\nx\n", "few"))
    with pytest.raises(DataError, match="'9' has a rating and is in no other file"):
        ml_100k(fetcher(tmp_path, inter=RATINGS + "9\t1\t3\t1\n"))
