"""Texts to fine-tune on: readers of the public corpora, of your own CSV, and a small world that is generated.

Two kinds of record. A :class:`Pair` is a meaning (slots with values) and one sentence that says it; a
:class:`Labelled` is a text with a class. One record is what differential privacy protects here: one pair, one
labelled text. A meaning of E2E has about eight sentences, thus eight records; :func:`largest_group` says how many
records the guarantee would have to cover to protect a meaning.

The readers ask :func:`oral4.data.fetch.fetch` for their files and raise :class:`~oral4.errors.DataError` where there
are none. The generated world needs no file. It has several domains, so that a model can read about hotels in public
and be fine-tuned on restaurants in private.

>>> for pair in micro_pairs(1, texts_per_meaning=2):
...     print(pair.text)
There is an eatery in the old town called The Blue Mill. Its prices are low.
The Blue Mill is an inexpensive eatery. It is in the old town.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from oral4.data.fetch import fetch
from oral4.data.limits import DEFAULT, Limits, check_table_size
from oral4.errors import DataError

__all__ = [
    "AG_NEWS_LABELS", "E2E_LINE_NAMES", "MICRO_DOMAINS", "POLARITY_LABELS", "RNNLG_DOMAINS", "Labelled", "Pair",
    "ag_news", "dart_dev", "e2e", "hold_out", "largest_group", "micro_pairs", "micro_phrases", "micro_reviews",
    "parse_act", "parse_mr", "read_labelled", "read_pairs", "references", "rnnlg", "rt_polarity", "sst2",
]  # fmt: skip

Slots = tuple[tuple[str, ...], ...]

AG_NEWS_LABELS = ("world", "sports", "business", "technology")
"""Words for the four classes of AG News, in the order of its file (classes 1 to 4, here 0 to 3)."""

POLARITY_LABELS = ("terrible", "great")
"""Words for the two classes of SST-2, rt-polarity and :func:`micro_reviews`: label words of the paper's prompt."""

E2E_LINE_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""How the prepared E2E lines that the official code reads call the slots of the csv file; others keep their name."""

RNNLG_DOMAINS = ("laptop", "tv", "hotel", "restaurant")


@dataclass(frozen=True)
class Pair:
    """A meaning and one sentence that says it."""

    slots: Slots
    """The meaning: slot and value, or subject, relation and object; a free text is one part of one string."""
    text: str
    """The sentence."""
    origin: str = ""
    """Where the record comes from, for example ``"e2e"`` or ``"dart/webnlg"``."""


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: int
    """Class, counted from 0."""


def references(pairs: Iterable[Pair]) -> dict[Slots, list[str]]:
    """Return every meaning with all its sentences, in the order of first appearance: several references each.

    Parameters
    ----------
    pairs : iterable of Pair

    Examples
    --------
    >>> references([Pair((("name", "Zizzi"),), "It is Zizzi."), Pair((("name", "Zizzi"),), "Zizzi.")])
    {(('name', 'Zizzi'),): ['It is Zizzi.', 'Zizzi.']}
    """
    grouped: dict[Slots, list[str]] = {}
    for pair in pairs:
        grouped.setdefault(pair.slots, []).append(pair.text)
    return grouped


def largest_group(pairs: Iterable[Pair]) -> int:
    """Return the number of sentences of the meaning that has most; 0 for no pairs.

    A guarantee for one record is a guarantee of ``k`` times the epsilon for a group of ``k`` records.
    """
    return max(map(len, references(pairs).values()), default=0)


def hold_out(pairs: Sequence[Pair], num_meanings: int, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs without some meanings, and the pairs of these meanings: no meaning is on both sides.

    Parameters
    ----------
    pairs : sequence of Pair
    num_meanings : int, 0 to the number of different meanings
        How many meanings to hold out.
    seed : int
        Which ones.

    Raises
    ------
    ValueError
        If there are fewer meanings.
    """
    meanings = list(references(pairs))
    if not 0 <= num_meanings <= len(meanings):
        raise ValueError(f"num_meanings={num_meanings}: 0 to {len(meanings)}, the number of different meanings")
    held = set(random.Random(seed).sample(meanings, num_meanings))
    return [p for p in pairs if p.slots not in held], [p for p in pairs if p.slots in held]


# ------------------------------------------------------------------------------------------------ E2E and friends


def parse_mr(text: str) -> Slots:
    """Return the slots of a meaning representation of E2E.

    Raises
    ------
    DataError
        If the text is not of the form ``name[The Eagle], area[riverside]``.

    Examples
    --------
    >>> parse_mr("name[The Eagle], customer rating[5 out of 5]")
    (('name', 'The Eagle'), ('customer rating', '5 out of 5'))
    """
    slots = []
    for part in text.strip().split(", "):
        match = re.fullmatch(r"([A-Za-z ]+)\[([^\[\]]*)\]", part)
        if match is None:
            raise DataError(f"meaning representation {text!r}: {part!r} is not of the form slot[value]")
        slots.append((match[1], match[2]))
    return tuple(slots)


def e2e(split: str) -> list[Pair]:
    """Return the pairs of E2E: descriptions of restaurants, about eight by different people for each meaning.

    Parameters
    ----------
    split : {"dev", "test"}
        The development set (4,672 pairs of 547 meanings) or the test set (4,693 pairs of 630 meanings).

    Raises
    ------
    DataError
        If the file is not at hand or not of the known form.
    ValueError
        If the split is unknown.
    """
    names = {"dev": "e2e/devset.csv", "test": "e2e/testset_w_refs.csv"}
    with fetch(_choose("split", split, names)).open(encoding="utf-8", newline="") as file:
        return [Pair(parse_mr(row["mr"]), row["ref"].strip(), "e2e") for row in _rows(file, ("mr", "ref"))]


def parse_act(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the act and the slots of a dialogue act of RNNLG.

    An act may be a question, ``?request(food)``: the slot that is asked for has the value ``"?"``. Quotes around
    values are dropped; a value may hold spaces, commas and colons.

    Raises
    ------
    DataError
        If the text is not of the form ``act(slot=value;slot=value)``.

    Examples
    --------
    >>> parse_act("inform(name='red door cafe';goodformeal=breakfast)")
    ('inform', (('name', 'red door cafe'), ('goodformeal', 'breakfast')))
    >>> parse_act("?request(near)"), parse_act("goodbye()")
    (('?request', (('near', '?'),)), ('goodbye', ()))
    """
    match = re.fullmatch(r"(\??[a-z_]+)\((.*)\)", text.strip())
    if match is None:
        raise DataError(f"dialogue act {text!r} is not of the form act(slot=value;slot=value)")
    slots = []
    for part in match[2].split(";") if match[2] else []:
        slot, _, value = part.partition("=")
        slots.append((slot.strip(), value.strip().strip("'\"") or "?"))
    return match[1], tuple(slots)


def rnnlg(domain: str, split: str = "train") -> list[Pair]:
    """Return the pairs of one domain of RNNLG: what a dialogue system means, and how people put it.

    The act comes first among the slots: ``(("act", "inform"), ("name", "red door cafe"))``.

    Parameters
    ----------
    domain : {"laptop", "tv", "hotel", "restaurant"}
    split : {"train", "valid", "test"}

    Raises
    ------
    DataError
        If the file is not at hand or not of the known form.
    ValueError
        If the domain or the split is unknown.
    """
    _choose("domain", domain, dict.fromkeys(RNNLG_DOMAINS, ""))
    path = fetch(f"rnnlg/{domain}/{_choose('split', split, {name: name for name in ('train', 'valid', 'test')})}.json")
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = []
    for row in _json("\n".join(line for line in lines if not line.startswith("#")), path):  # a banner of five lines
        if not isinstance(row, list) or len(row) < 2:
            raise DataError(f"{path}: {row!r} is not a list of an act and its sentences")
        act, slots = parse_act(row[0])
        pairs.append(Pair((("act", act), *slots), row[1].strip(), f"rnnlg/{domain}"))
    return pairs


def dart_dev(exclude: Sequence[str] = ("e2e",)) -> list[Pair]:
    """Return the pairs of the development set of DART: triples and sentences from six sources.

    One of the sources is E2E: 4,290 of the 6,980 sentences. Who keeps E2E private and pre-trains on DART has
    trained on private text before the first private step. Therefore E2E is left out unless you ask for it.

    Parameters
    ----------
    exclude : sequence of str
        Sources to leave out, of ``"e2e"``, ``"webnlg"``, ``"WikiSQL_decl_sents"``, ``"WikiSQL_lily"``,
        ``"WikiTableQuestions_lily"``, ``"WikiTableQuestions_mturk"``. ``()`` keeps all.

    Returns
    -------
    list of Pair
        Triples of subject, relation in lower case, object; ``origin`` is ``"dart/"`` and the source.

    Raises
    ------
    DataError
        If the file is not at hand or not of the known form.
    ValueError
        If a source to leave out does not occur: a spelling mistake here would let private text through.
    """
    path = fetch("dart/dart-v1.1.1-full-dev.json")
    pairs = []
    for entry in _json(path.read_text(encoding="utf-8"), path):
        try:
            slots = tuple((subject, relation.lower(), value) for subject, relation, value in entry["tripleset"])
            found = [(sentence["source"], sentence["text"].strip()) for sentence in entry["annotations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: an entry has no triples or annotations of the known form: {error}") from error
        pairs += [Pair(slots, text, f"dart/{source}") for source, text in found]
    sources = sorted({pair.origin.removeprefix("dart/") for pair in pairs})
    if unknown := sorted(set([exclude] if isinstance(exclude, str) else exclude) - set(sources)):
        raise ValueError(f"exclude={list(exclude)}: {', '.join(unknown)} is not among the sources {', '.join(sources)}")
    dropped = {f"dart/{source}" for source in exclude}
    return [pair for pair in pairs if pair.origin not in dropped]


# ------------------------------------------------------------------------------------------------------ classes


def ag_news() -> list[Labelled]:
    """Return the 7,600 test articles of AG News, title and text; the classes are `AG_NEWS_LABELS`.

    The file's own marks are undone: ``#36;`` is a dollar sign, ``#39;`` an apostrophe, a backslash a line break.

    Raises
    ------
    DataError
        If the file is not at hand or not of the known form.
    """
    path = fetch("agnews/test.csv")
    articles = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                raise DataError(f"{path}: {row!r} is not a class of 1 to 4, a title and a text")
            text = re.sub(r"#(\d+);", lambda mark: chr(int(mark[1])), f"{row[1]} . {row[2]}").replace("\\", " ")
            articles.append(Labelled(" ".join(text.split()), int(row[0]) - 1))
    return articles


def sst2(split: str) -> list[Labelled]:
    """Return the phrases of film reviews of SST-2; 0 is negative, 1 positive.

    Parameters
    ----------
    split : {"train", "dev", "test"}
        67,349 phrases, 872 or 1,821 sentences. The training set holds phrases of its sentences as records of
        their own: record-level privacy does not protect a sentence that is spread over many phrases.

    Raises
    ------
    DataError
        If the file is not at hand or not of the known form.
    ValueError
        If the split is unknown.
    """
    path = fetch(f"sst2/{_choose('split', split, {name: name for name in ('train', 'dev', 'test')})}.tsv")
    phrases = []
    for line in path.read_text(encoding="utf-8").split("\n")[1:]:
        if not line:
            continue
        label, tab, text = line.partition("\t")
        if not tab or label not in ("0", "1"):
            raise DataError(f"{path}: {line!r} is not a class of 0 or 1, a tab and a text")
        phrases.append(Labelled(text.strip(), int(label)))
    return phrases


def rt_polarity() -> list[Labelled]:
    """Return the 10,662 sentences of film reviews of rt-polarity; 0 is negative, 1 positive, the negative first.

    Raises
    ------
    DataError
        If the files are not at hand.
    """
    sentences = []
    for label, name in enumerate(("neg", "pos")):
        text = fetch(f"rt-polarity/rt-polarity.{name}").read_text(encoding="utf-8")
        sentences += [Labelled(line.strip(), label) for line in text.split("\n") if line.strip()]
    return sentences


# ------------------------------------------------------------------------------------------------ your own files


def read_pairs(path: str | PathLike[str], *, limits: Limits = DEFAULT) -> list[Pair]:
    """Return the pairs of your own CSV file with the columns ``source`` and ``target``, or E2E's ``mr`` and ``ref``.

    Parameters
    ----------
    path : path
        UTF-8, with a header line; other columns are ignored.
    limits : Limits
        Caps on the size of the file.

    Raises
    ------
    DataError
        If there is no such file, it is over a limit, a column is missing or a source is empty.
    """
    with _table(path, limits).open(encoding="utf-8-sig", newline="") as file:
        rows = _rows(file, ("source", "target"), ("mr", "ref"))
    pairs = []
    for number, row in enumerate(rows, 1):
        if "source" in row:
            pairs.append(Pair(((_filled(row, "source", path, number),),), row["target"].strip(), str(path)))
        else:
            pairs.append(Pair(parse_mr(row["mr"]), row["ref"].strip(), str(path)))
    return pairs


def read_labelled(path: str | PathLike[str], *, limits: Limits = DEFAULT) -> tuple[list[Labelled], tuple[str, ...]]:
    """Return the texts of your own CSV file with the columns ``text`` and ``label``, and the names of the classes.

    Parameters
    ----------
    path : path
        UTF-8, with a header line; other columns are ignored. Labels are any words; sorted, they are the classes.
    limits : Limits
        Caps on the size of the file.

    Raises
    ------
    DataError
        If there is no such file, it is over a limit, a column is missing, a text or label is empty, or there are
        fewer than two classes.
    """
    with _table(path, limits).open(encoding="utf-8-sig", newline="") as file:
        found = [
            (_filled(row, "text", path, number), _filled(row, "label", path, number))
            for number, row in enumerate(_rows(file, ("text", "label")), 1)
        ]
    names = tuple(
        sorted(
            {label for _, label in found},
            key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name),
        )
    )
    if len(names) < 2:
        raise DataError(f"{path}: {len(names)} classes ({', '.join(names)}); a classifier needs two or more")
    return [Labelled(text, names.index(label)) for text, label in found], names


def _table(path: str | PathLike[str], limits: Limits) -> Path:
    check_table_size(path, limits=limits)
    return Path(path)


def _filled(row: dict[str, str], column: str, path: Any, number: int) -> str:
    if not row[column].strip():
        raise DataError(f"{path}, record {number}: the column {column!r} is empty; fill it or drop the record")
    return row[column].strip()


def _rows(file: Any, *choices: Sequence[str]) -> list[dict[str, str]]:
    """Return these columns of a CSV file, each filled with a string; of several choices the first that it has."""
    try:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or ())
        columns = next((choice for choice in choices if set(choice) <= set(header)), None)
        if columns is None:
            missing = [name for name in choices[0] if name not in header]
            raise DataError(f"{file.name}: no column {' or '.join(missing)} in the header {header}")
        rows = [{name: row[name] for name in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file.name} is not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"{file.name}: there is no record below the header; give one record a line")
    for number, row in enumerate(rows, 1):
        if short := [name for name in columns if row[name] is None]:
            raise DataError(f"{file.name}, record {number}: the column {short[0]!r} is missing; are quotes unbalanced?")
    return rows


def _json(text: str, path: Path) -> list[Any]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not a JSON file of the known form: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__} instead of a list of records")
    return rows


def _choose(what: str, value: str, allowed: dict[str, str]) -> str:
    if value not in allowed:
        raise ValueError(f"{what}={value!r}; choose one of {', '.join(allowed)}")
    return allowed[value]


# --------------------------------------------------------------------------------------------- the small world
#
# A meaning is drawn slot by slot, and then told: one slot may become an adjective before the noun, one a phrase
# after it, the others sentences of their own, in any order. So a model has to learn copying (names), paraphrase
# (low: "cheap") and order, at a size that a model of a million parameters can learn in a minute.

_FIRST = ("Golden", "Blue", "Old", "Silver", "Green", "Little", "Red", "Royal", "Quiet", "Happy", "White", "Lazy")
_SECOND = ("Anchor", "Lantern", "Mill", "Fox", "Garden", "Harbour", "Swan", "Oak", "Bridge", "Crown", "Lion", "Star")
_AREAS = ("old town", "harbour", "city centre", "university quarter", "riverside")


@dataclass(frozen=True)
class _Slot:
    """A slot of the small world: its values, and for each the ways to say it before, after or beside the noun."""

    name: str
    ways: dict[str, dict[str, tuple[str, ...]]]  # value -> {"before" | "after" | "sentence": phrases}


def _slot(name: str, values: Iterable[str], ways: Callable[[str], dict[str, tuple[str, ...]]]) -> _Slot:
    return _Slot(name, {value: ways(value) for value in values})


def _price(value: str) -> dict[str, tuple[str, ...]]:
    words = {
        "low": ("cheap", "inexpensive", "low-priced"),
        "moderate": ("moderately priced", "mid-priced"),
        "high": ("expensive", "high-priced"),
    }[value]
    return {
        "before": words,
        "sentence": (f"Its prices are {value}.", f"The price range is {value}.", f"You pay {value} prices there."),
    }


def _yes_no(yes: tuple[str, ...], no: tuple[str, ...]) -> Callable[[str], dict[str, tuple[str, ...]]]:
    return lambda value: {"sentence": yes if value == "yes" else no}


_AREA = _slot(
    "area",
    _AREAS,
    lambda v: {"after": (f"in the {v}",), "sentence": (f"It is in the {v}.", f"You find it in the {v}.")},
)
_NEAR = _slot(
    "near",
    ("the market hall", "the train station", "the castle", "the opera", "the lighthouse", "the zoo"),
    lambda v: {
        "after": (f"near {v}", f"close to {v}"),
        "sentence": (f"It lies near {v}.", f"It is a short walk from {v}."),
    },
)
_PRICE = _slot("price", ("low", "moderate", "high"), _price)
_RATING = _slot(
    "rating",
    ("1 out of 5", "3 out of 5", "5 out of 5"),
    lambda v: {"sentence": (f"Guests rate it {v}.", f"It has a rating of {v}.", f"Its customers give it {v}.")},
)

_WORLD: dict[str, tuple[tuple[str, ...], tuple[_Slot, ...]]] = {
    "restaurant": (
        ("restaurant", "place", "eatery"),
        (
            _slot(
                "food",
                ("Italian", "Indian", "French", "Japanese", "Greek", "Mexican"),
                lambda v: {
                    "before": (v,),
                    "sentence": (f"It serves {v} food.", f"The kitchen is {v}.", f"They cook {v} dishes."),
                },
            ),
            _PRICE,
            _AREA,
            _RATING,
            _slot(
                "family friendly",
                ("yes", "no"),
                _yes_no(
                    ("Children are welcome.", "It is family friendly.", "You can bring your kids."),
                    ("It is not for children.", "It is not family friendly.", "Leave your kids at home."),
                ),
            ),
            _NEAR,
        ),
    ),
    "hotel": (
        ("hotel", "guest house", "place to stay"),
        (
            _slot(
                "stars",
                ("two", "three", "four"),
                lambda v: {"before": (f"{v}-star",), "sentence": (f"It has {v} stars.",)},
            ),
            _PRICE,
            _AREA,
            _RATING,
            _slot(
                "pets",
                ("yes", "no"),
                _yes_no(("Dogs are welcome.", "It allows pets."), ("Pets are not allowed.", "It does not take dogs.")),
            ),
            _slot(
                "internet",
                ("yes", "no"),
                _yes_no(
                    ("It has wireless internet.", "There is internet in the rooms."),
                    ("It has no internet.", "There is no internet."),
                ),
            ),
            _NEAR,
        ),
    ),
    "museum": (
        ("museum", "gallery", "collection"),
        (
            _slot(
                "theme",
                ("modern art", "natural history", "old ships", "photography", "local history"),
                lambda v: {"after": (f"of {v}",), "sentence": (f"It shows {v}.", f"It is about {v}.")},
            ),
            _PRICE,
            _AREA,
            _RATING,
            _slot(
                "guided tours",
                ("yes", "no"),
                _yes_no(
                    ("There are guided tours.", "A guide shows you round."),
                    ("There are no guided tours.", "You walk round alone."),
                ),
            ),
            _NEAR,
        ),
    ),
}

MICRO_DOMAINS = tuple(_WORLD)
"""Domains of the generated world."""


def micro_pairs(
    num_meanings: int, *, domain: str = "restaurant", seed: int = 0, texts_per_meaning: int = 4
) -> list[Pair]:
    """Return generated pairs: different meanings, each told several times in different words.

    The same arguments give the same pairs, on any machine. The first meanings do not depend on how many are asked for.

    Parameters
    ----------
    num_meanings : int, >= 0
        How many different meanings; a domain has tens of thousands.
    domain : {"restaurant", "hotel", "museum"}
        The domains share the shape of names, areas, prices and ratings, and differ in the rest.
    seed : int
        Which meanings.
    texts_per_meaning : int, >= 1
        Sentences for each meaning, as E2E has about eight.

    Raises
    ------
    ValueError
        If a number is out of range or the domain is unknown.

    Examples
    --------
    >>> len(micro_pairs(10, domain="hotel"))
    40
    """
    if num_meanings < 0 or texts_per_meaning < 1:
        raise ValueError(f"{num_meanings=}, {texts_per_meaning=}: at least 0 meanings and 1 text for each are needed")
    if num_meanings > 20_000:
        raise ValueError(f"{num_meanings=}: at most 20000 meanings; use several domains or seeds")
    nouns, kinds = _WORLD[_choose("domain", domain, {name: name for name in MICRO_DOMAINS})]
    draw = random.Random(f"pairs/{domain}/{seed}")
    pairs: list[Pair] = []
    seen: set[Slots] = set()
    while len(seen) < num_meanings:
        chosen = [kind for kind in kinds if draw.random() < 0.6] or [draw.choice(kinds)]
        name = f"The {draw.choice(_FIRST)} {draw.choice(_SECOND)}"
        values = [(kind, draw.choice(list(kind.ways))) for kind in chosen]
        slots = (("name", name), *((kind.name, value) for kind, value in values))
        if slots in seen:
            continue
        seen.add(slots)
        pairs += [Pair(slots, _tell(name, nouns, values, draw), f"micro/{domain}") for _ in range(texts_per_meaning)]
    return pairs


def micro_phrases(domain: str = "restaurant") -> dict[str, dict[str, tuple[str, ...]]]:
    """Return every way in which :func:`micro_pairs` says a value: slot, value, phrases.

    So a text about the generated world can be checked exactly; the name is said as it is.

    Raises
    ------
    ValueError
        If the domain is unknown.

    Examples
    --------
    >>> micro_phrases()["food"]["Greek"]
    ('Greek', 'It serves Greek food.', 'The kitchen is Greek.', 'They cook Greek dishes.')
    """
    _, kinds = _WORLD[_choose("domain", domain, {name: name for name in MICRO_DOMAINS})]
    return {
        kind.name: {value: tuple(p for phrases in ways.values() for p in phrases) for value, ways in kind.ways.items()}
        for kind in kinds
    }


def _tell(name: str, nouns: Sequence[str], values: Sequence[tuple[_Slot, str]], draw: random.Random) -> str:
    left = list(values)
    draw.shuffle(left)
    picked = {"before": "", "after": ""}
    for place in picked:
        fitting = [(kind, value) for kind, value in left if place in kind.ways[value]]
        if fitting and draw.random() < 0.75:
            kind, value = fitting[0]
            left.remove((kind, value))
            picked[place] = draw.choice(kind.ways[value][place])
    noun = " ".join(part for part in (picked["before"], draw.choice(nouns)) if part)
    article = "an" if noun[0].lower() in "aeiou" else "a"
    after = f" {picked['after']}" if picked["after"] else ""
    opening = draw.choice((f"{name} is {article} {noun}{after}.", f"There is {article} {noun}{after} called {name}."))
    return " ".join([opening, *(draw.choice(kind.ways[value]["sentence"]) for kind, value in left)])


_ASPECTS = {
    "restaurant": ("the food", "the service", "the menu", "the dessert", "the terrace", "the music"),
    "hotel": ("the room", "the bed", "the breakfast", "the view", "the lobby", "the shower"),
    "museum": ("the exhibition", "the guide", "the building", "the shop", "the audio tour", "the light"),
}
_GOOD = ("good", "lovely", "wonderful", "excellent", "pleasant", "splendid", "charming", "perfect")
_BAD = ("bad", "awful", "dreadful", "poor", "disappointing", "dull", "unpleasant", "shabby")


def micro_reviews(
    num: int, *, domain: str = "restaurant", seed: int = 0, verdict: Sequence[str] | None = None
) -> list[Labelled]:
    """Return generated reviews with their polarity: three opinions, and the majority is the label.

    Most opinions of a review agree, and some are negated ("not bad"): in most reviews single words give the label away,
    in others they mislead. With ``verdict`` the review ends with the sentence "it was great ." or "it was terrible ." A
    masked language model that has read such public reviews of one domain can be asked "it was <mask> ." about private
    ones of another.

    Parameters
    ----------
    num : int, >= 0
    domain : {"restaurant", "hotel", "museum"}
    seed : int
    verdict : sequence of two str, optional
        The words for 0 (negative) and 1 (positive), for example `POLARITY_LABELS`; no verdict if left out.

    Raises
    ------
    ValueError
        If ``num`` is negative, the domain is unknown or there are not two verdicts.

    Examples
    --------
    >>> {review.label for review in micro_reviews(20)}
    {0, 1}
    """
    if num < 0 or (verdict is not None and len(verdict) != 2):
        raise ValueError(f"{num=}, {verdict=}: at least 0 reviews, and two verdicts or none")
    aspects = _ASPECTS[_choose("domain", domain, {name: name for name in MICRO_DOMAINS})]
    draw = random.Random(f"reviews/{domain}/{seed}")
    reviews = []
    for _ in range(num):
        mood, parts = draw.random() < 0.5, []
        for aspect in draw.sample(aspects, 3):
            is_kind, is_negated = (draw.random() < 0.8) == mood, draw.random() < 0.15
            word = draw.choice(_GOOD if is_kind != is_negated else _BAD)
            verb = draw.choice(("was", "seemed")) + (
                " not" if is_negated else draw.choice(("", "", " really", " rather"))
            )
            parts.append((is_kind, f"{aspect} {verb} {word}"))
        text = parts[0][1]
        for (before, _), (after, clause) in pairwise(parts):
            text += f" {'and' if before == after else 'but'} {clause}"
        label = int(sum(is_kind for is_kind, _ in parts) >= 2)
        reviews.append(Labelled(f"{text} ." + (f" it was {verdict[label]} ." if verdict is not None else ""), label))
    return reviews
