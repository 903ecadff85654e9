"""A small made-up corpus, prepared once."""

import random
from pathlib import Path

import pytest

from lmkern.data import DataConfig, Dataset, load, prepare

WORDS = "river stone morning letter garden winter silver window paper candle market bridge captain music"


def made_up_text(seed: int, paragraphs: int) -> str:
    """Paragraphs of one to four sentences, no two alike in practice."""
    source = random.Random(seed)

    def sentence() -> str:
        return (
            " ".join(source.choices(WORDS.split(), k=source.randint(4, 9))).capitalize()
            + f" {source.randint(0, 10**9)}."
        )

    return (
        "\n\n".join(" ".join(sentence() for _ in range(source.randint(1, 4))) for _ in range(paragraphs))
        + "\n"
    )


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(80):
        (folder / f"{number:03}.txt").write_text(made_up_text(number, 3 + number % 7))
    return folder


@pytest.fixture(scope="session")
def config(corpus_folder: Path) -> DataConfig:
    return DataConfig(paths=(str(corpus_folder),), vocab_size=400, max_document_bytes=1024)


@pytest.fixture(scope="session")
def data_folder(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(config, folder)
    return folder


@pytest.fixture(scope="session")
def dataset(data_folder: Path) -> Dataset:
    return load(data_folder)
