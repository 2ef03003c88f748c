"""
A small question answering collection about invented people: their birthplaces, their instruments, and so on.

A question and its answering passage use different words. The hard negatives state another fact about the same person,
state the same fact about another person, or reuse the words of the question (decoys). No person of the training rows
appears in the test rows.
"""

import random
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "n", "r", "s", "k", "m")


Facts = dict[str, dict[str, list[str]]]  # sentences and values by kind (questions, answers, decoys, values) by fact


class Person(NamedTuple):
    """An invented person, with one answering passage and two decoys for each fact."""

    name: str
    answers: dict[str, str]
    decoys: dict[str, list[str]]


def make_collection(
    num_train_people: int = 640, num_test_people: int = 40, seed: int = 42
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Makes training rows and test rows, in the schema of [`data.parse_row`].

    Args:
        num_train_people, num_test_people: numbers of invented people. Each person gives one row per fact.
        seed: seed of the names, the sentences and their order.

    Returns:
        training rows with 9 negatives and test rows with 17 negatives. Each row has one positive. The names of the two
        differ.
    """
    facts: Facts = yaml.safe_load(files(__package__).joinpath("facts.yaml").read_text(encoding="utf-8"))
    generator = random.Random(seed)
    names = _make_names(num_train_people + num_test_people, generator)
    people = [_make_person(name, facts, generator) for name in names]
    train, test = people[:num_train_people], people[num_train_people:]
    return _make_rows(train, facts, 2, 5, generator), _make_rows(test, facts, 4, 9, generator)


def _make_names(count: int, generator: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [
            "".join(generator.choice(letters) for letters in (ONSETS, VOWELS, ONSETS, VOWELS, CODAS)) for _ in range(2)
        ]
        names[" ".join(parts).title()] = None
    return list(names)


def _make_person(name: str, facts: Facts, generator: random.Random) -> Person:
    answers = {}
    for key, fact in facts.items():
        template, value = generator.choice(fact["answers"]), generator.choice(fact["values"])
        sentence = template.format(name=name, value=value)
        answers[key] = sentence[0].upper() + sentence[1:]
    return Person(
        name, answers, {key: [decoy.format(name=name) for decoy in fact["decoys"]] for key, fact in facts.items()}
    )


def _make_rows(
    people: list[Person], facts: Facts, num_other_people: int, num_other_facts: int, generator: random.Random
) -> list[dict[str, Any]]:
    rows = []
    for person in people:
        for key, fact in facts.items():
            others = generator.sample([other for other in people if other is not person], num_other_people)
            other_facts = generator.sample([other for other in facts if other != key], num_other_facts)
            negatives = [
                *person.decoys[key],
                *(other.answers[key] for other in others),
                *(person.answers[other] for other in other_facts),
                *(other.decoys[key][0] for other in others[: num_other_people // 2]),
            ]
            generator.shuffle(negatives)
            question = generator.choice(fact["questions"]).format(name=person.name)
            rows.append({"query": question, "pos_doc": [person.answers[key]], "neg_doc": negatives})
    generator.shuffle(rows)
    return rows
