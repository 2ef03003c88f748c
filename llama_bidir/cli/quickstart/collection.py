"""A small question answering collection, made on the spot: who was born where, who played what, and the like.

The people are invented. Questions and answering passages say the same thing in different words; hard negatives are
about the same person and another fact, about another person and the same fact, or reuse the words of the question
(decoys). No person of the training rows appears in the test rows.
"""

import random
from typing import Any, NamedTuple


class Fact(NamedTuple):
    """Ways to ask for one fact of a person, ways to state it, and passages that only sound alike."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    decoys: tuple[str, ...]
    values: tuple[str, ...]


FACTS = {
    "birthplace": Fact(
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which town was {name} born?",
            "Which town does {name} come from?",
        ),
        (
            "{name} came into the world in {value}, in a cottage beside the old mill.",
            "A plaque in {value} marks the house where the mother of {name} gave birth.",
            "The parents of {name} were living in {value} when their third child arrived.",
            "{value} likes to remind visitors that {name} took a first breath there.",
        ),
        (
            "{name} was not yet born when the town archive burned, so nobody can say where the papers went.",
            "In which town the band would play next was a thing {name} never knew before noon.",
        ),
        ("Quenby", "Marrow Bay", "Ostwick", "Tallin Ford", "Pellworth", "Isgate", "Dunmere", "Vasholm"),
    ),
    "profession": Fact(
        (
            "What did {name} do for a living?",
            "What was the profession of {name}?",
            "How did {name} earn money?",
            "Which job did {name} have?",
        ),
        (
            "{name} spent thirty years as a {value}, mostly on the night shift.",
            "Neighbours in the quarter knew {name} as the local {value}.",
            "After school {name} trained as a {value} and never looked for anything else.",
            "Until retirement {name} was busy as a {value}, six days a week.",
        ),
        (
            "For {name} a living room without books was no place to do anything.",
            "Money was a subject that {name} would not discuss, and earning it bored the whole family.",
        ),
        ("glazier", "ferry pilot", "typesetter", "beekeeper", "surveyor", "clockmaker", "night nurse", "bricklayer"),
    ),
    "instrument": Fact(
        (
            "Which instrument did {name} play?",
            "What did {name} play in the orchestra?",
            "What musical instrument was {name} known for?",
            "What did {name} make music with?",
        ),
        (
            "On Sundays {name} took the {value} down to the square and performed until dusk.",
            "{name} had inherited the {value}, which was older than the concert hall.",
            "Lessons on the {value} began when {name} was five years old.",
            "Critics praised {name} for a warm tone on the {value}.",
        ),
        (
            "{name} was known for leaving the orchestra pit before the play had ended.",
            "The music did not interest {name}, who preferred to make paper boats.",
        ),
        ("cello", "oboe", "bassoon", "viola", "accordion", "French horn", "harp", "clarinet"),
    ),
    "animal": Fact(
        (
            "What pet did {name} keep?",
            "Which animal lived with {name}?",
            "What kind of animal did {name} have at home?",
            "What was the pet of {name}?",
        ),
        (
            "A {value} slept at the foot of the bed of {name} every night.",
            "Visitors to {name} were first greeted by a noisy {value}.",
            "{name} fed the {value} before breakfast and again at dusk.",
            "In every portrait {name} is shown holding a {value}.",
        ),
        (
            "What kind of home {name} had is unclear, but no animal was ever painted on its walls.",
            "It was a pet theory of {name} that one should keep windows open in winter.",
        ),
        ("tortoise", "parrot", "goat", "ferret", "greyhound", "raven", "hedgehog", "spaniel"),
    ),
    "studies": Fact(
        (
            "What did {name} study?",
            "Which subject did {name} take at university?",
            "What was the degree of {name} in?",
            "What did {name} learn at university?",
        ),
        (
            "{name} graduated in {value} with the best marks of the year.",
            "Four years of lectures on {value} left {name} tired and happy.",
            "The diploma of {name}, in {value}, hangs in the hall.",
            "As a student {name} read {value} under a famous teacher.",
        ),
        (
            "The study of {name} had a desk and one lamp; to some degree it was a store room.",
            "The university sent a letter on the subject of unpaid fines, which {name} did not take badly.",
        ),
        ("botany", "geology", "law", "Latin", "chemistry", "astronomy", "medicine", "philosophy"),
    ),
    "spouse": Fact(
        (
            "Who was {name} married to?",
            "Who was the spouse of {name}?",
            "Whom did {name} marry?",
            "Who was the husband or wife of {name}?",
        ),
        (
            "The wedding of {name} and {value} filled the chapel.",
            "{name} and {value} exchanged rings in the spring and stayed together for life.",
            "With {value} at the altar, {name} could hardly speak the vows.",
            "{name} met {value} on a train, and they became engaged within a week.",
        ),
        (
            "{name} sold flowers to married couples and to whoever passed by.",
            "The wife of the baker told {name} who was going to marry next.",
        ),
        (
            "Ada Brandt",
            "Leo Castell",
            "Nora Finch",
            "Otto Hale",
            "Ruth Ingram",
            "Carl Jansen",
            "Vera Lund",
            "Paul Moss",
        ),
    ),
    "death": Fact(
        (
            "How did {name} die?",
            "What was the cause of death of {name}?",
            "What killed {name}?",
            "What did {name} die of?",
        ),
        (
            "The life of {name} was ended by {value} at the age of seventy.",
            "{name} perished through {value} during a long winter.",
            "After {value}, the doctors could no longer save {name}.",
            "{value} took {name} in the night, and the funeral was held on Friday.",
        ),
        (
            "{name} cast a die to choose the cause that the money would go to.",
            "It killed the mood that {name} spoke of death at every dinner.",
        ),
        ("a fever", "a shipwreck", "a fall from a ladder", "pneumonia", "an avalanche", "a stroke", "typhus", "a fire"),
    ),
    "award": Fact(
        (
            "Which prize did {name} win?",
            "What award was given to {name}?",
            "Which honour did {name} receive?",
            "What was {name} awarded?",
        ),
        (
            "The jury handed {name} the {value} before a full house.",
            "{name} kept the {value} in a drawer and rarely spoke of it.",
            "In the same year the {value} went to {name}.",
            "With the {value} came a cheque, which {name} gave to the school.",
        ),
        (
            "To win was not what {name} wanted; a prize pumpkin was enough.",
            "{name} did receive many guests and was honoured to be given their coats.",
        ),
        (
            "Silver Quill",
            "Harbour Medal",
            "Golden Compass",
            "Lindqvist Cup",
            "Order of the Lark",
            "Founders Plate",
            "Amber Star",
            "Royal Ribbon",
        ),
    ),
    "food": Fact(
        (
            "What did {name} like to eat?",
            "What was the favourite dish of {name}?",
            "Which food did {name} prefer?",
            "What meal did {name} love most?",
        ),
        (
            "Every evening the cook brought {name} a plate of {value}.",
            "{name} could finish a whole pot of {value} alone.",
            "Nothing cheered {name} up like {value} straight from the oven.",
            "For a birthday {name} asked only for {value}.",
        ),
        (
            "{name} did not like to wash a dish, whatever the meal had been.",
            "Moths eat wool, and the favourite coat of {name} had holes in it.",
        ),
        (
            "lentil soup",
            "plum cake",
            "fried herring",
            "dumplings",
            "onion pie",
            "barley stew",
            "roast duck",
            "rice pudding",
        ),
    ),
    "journey": Fact(
        (
            "Where did {name} travel to?",
            "Which country did {name} visit?",
            "What was the destination of the journey of {name}?",
            "Where did {name} go on holiday?",
        ),
        (
            "{name} boarded a steamer to {value} and stayed for a year.",
            "Letters that {name} posted from {value} describe the heat and the markets.",
            "The guide led {name} across the mountains of {value} on foot.",
            "{name} returned from {value} with two trunks of sketches.",
        ),
        (
            "Where the country road ends, {name} kept a holiday hut that nobody would visit.",
            "{name} found that to travel by tram was a journey long enough.",
        ),
        ("Morocco", "Iceland", "Peru", "Japan", "Kenya", "Norway", "Turkey", "Chile"),
    ),
}

ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "n", "r", "s", "k", "m")


class Passages(NamedTuple):
    """What is written about one person: for each fact one answering passage and two decoys."""

    name: str
    answers: dict[str, str]
    decoys: dict[str, tuple[str, ...]]


def make_collection(
    num_train_people: int = 640, num_test_people: int = 40, seed: int = 42
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Makes the training rows and the test rows, in the schema of [`data.parse_row`].

    Args:
        num_train_people, num_test_people: invented people; each gives one row a fact.
        seed: the same seed makes the same rows.

    Returns:
        training rows with 9 negatives and test rows with 17, each with one positive. No name is in both.
    """
    generator = random.Random(seed)
    names = _make_names(num_train_people + num_test_people, generator)
    people = [_write_passages(name, generator) for name in names]
    train, test = people[:num_train_people], people[num_train_people:]
    return _make_rows(train, 2, 5, generator), _make_rows(test, 4, 9, generator)


def _make_names(count: int, generator: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [
            "".join(generator.choice(letters) for letters in (ONSETS, VOWELS, ONSETS, VOWELS, CODAS)) for _ in range(2)
        ]
        names[" ".join(parts).title()] = None
    return list(names)


def _write_passages(name: str, generator: random.Random) -> Passages:
    return Passages(
        name,
        {
            key: _write_sentence(generator.choice(fact.answers), name, generator.choice(fact.values))
            for key, fact in FACTS.items()
        },
        {key: tuple(decoy.format(name=name) for decoy in fact.decoys) for key, fact in FACTS.items()},
    )


def _write_sentence(template: str, name: str, value: str) -> str:
    sentence = template.format(name=name, value=value)
    return sentence[0].upper() + sentence[1:]


def _make_rows(
    people: list[Passages], num_other_people: int, num_other_facts: int, generator: random.Random
) -> list[dict[str, Any]]:
    rows = []
    for person in people:
        for key, fact in FACTS.items():
            others = generator.sample([other for other in people if other is not person], num_other_people)
            other_facts = generator.sample([other for other in FACTS if other != key], num_other_facts)
            negatives = [
                *person.decoys[key],
                *(other.answers[key] for other in others),
                *(person.answers[other] for other in other_facts),
                *(other.decoys[key][0] for other in others[: num_other_people // 2]),
            ]
            generator.shuffle(negatives)
            question = generator.choice(fact.questions).format(name=person.name)
            rows.append({"query": question, "pos_doc": [person.answers[key]], "neg_doc": negatives})
    generator.shuffle(rows)
    return rows
