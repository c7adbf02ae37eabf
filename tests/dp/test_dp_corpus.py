"""Corpora: every reader on files written here and on the real ones; the generated world is what it claims to be."""

import json
import random
import re
from collections import Counter

import pytest

from oral4.data.fetch import available, names
from oral4.data.limits import Limits
from oral4.dp import corpus
from oral4.dp.corpus import (
    AG_NEWS_LABELS,
    E2E_LINE_NAMES,
    MICRO_DOMAINS,
    POLARITY_LABELS,
    RNNLG_DOMAINS,
    Labelled,
    Pair,
    ag_news,
    dart_dev,
    e2e,
    hold_out,
    largest_group,
    micro_pairs,
    micro_phrases,
    micro_reviews,
    parse_act,
    parse_mr,
    read_labelled,
    read_pairs,
    references,
    rnnlg,
    rt_polarity,
    sst2,
)
from oral4.errors import DataError

BANNER = "#####\n# Copyright of somebody #\n#####\n"


def at_hand(*wanted):
    """Skip unless these files can be read without a download."""
    if not all(name in names() and available(name) for name in wanted):
        pytest.skip(f"{wanted[0]} is not at hand")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The readers look for their files in a folder of this test."""
    monkeypatch.setattr(corpus, "fetch", lambda name: tmp_path / name)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    return write


# ------------------------------------------------------------------------------------------------- parsers


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("name[The Eagle]", (("name", "The Eagle"),)),
        (
            "name[Café Rouge], customer rating[5 out of 5], priceRange[£20-25]",
            (("name", "Café Rouge"), ("customer rating", "5 out of 5"), ("priceRange", "£20-25")),
        ),
        ("near[]", (("near", ""),)),
    ],
)
def test_meaning_representations(text, slots):
    assert parse_mr(text) == slots


@pytest.mark.parametrize("text", ["", "name", "name[The Eagle", "name[a],area[b]", "name[a[b]]", "name[a]; area[b]"])
def test_what_is_no_meaning_representation(text):
    with pytest.raises(DataError, match=r"is not of the form slot\[value\]"):
        parse_mr(text)


@pytest.mark.parametrize(
    ("text", "act"),
    [
        ("goodbye()", ("goodbye", ())),
        ("?request(food)", ("?request", (("food", "?"),))),
        ("?reqmore()", ("?reqmore", ())),
        ("inform(name='red door cafe';food)", ("inform", (("name", "red door cafe"), ("food", "?")))),
        ("inform(ecorating=a+;design=black , silver)", ("inform", (("ecorating", "a+"), ("design", "black , silver")))),
        ("inform_count(count='71';near=dont_care)", ("inform_count", (("count", "71"), ("near", "dont_care")))),
        ('inform(phone="4158857788")', ("inform", (("phone", "4158857788"),))),
        ("?confirm(utility='a=b')", ("?confirm", (("utility", "a=b"),))),
    ],
)
def test_dialogue_acts(text, act):
    assert parse_act(text) == act


@pytest.mark.parametrize("text", ["", "inform", "inform(a=b", "two words(a=b)", "!inform(a=b)"])
def test_what_is_no_dialogue_act(text):
    with pytest.raises(DataError, match="is not of the form act"):
        parse_act(text)


# ------------------------------------------------------------------------------------------------- readers


def test_e2e_rows(folder):
    folder("e2e/devset.csv", 'mr,ref\n"name[A], area[b, c]","It is ""A"", there."\nname[B],B. \n'.replace("b, c", "bc"))
    assert e2e("dev") == [
        Pair((("name", "A"), ("area", "bc")), 'It is "A", there.', "e2e"),
        Pair((("name", "B"),), "B.", "e2e"),
    ]
    with pytest.raises(ValueError, match="split='train'; choose one of dev, test"):
        e2e("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MR\nname[A]\n", "no column mr or ref in the header"),
        ("", "no column mr or ref"),
        ("mr,ref\nname[A]\n", "record 1: the column 'ref' is missing"),
        ("mr,ref\nname,x\n", "slot"),
    ],
    ids=["other-header", "empty", "short-row", "no-slot"],
)
def test_damaged_e2e(folder, text, message):
    folder("e2e/testset_w_refs.csv", text)
    with pytest.raises(DataError, match=message):
        e2e("test")


def test_rnnlg_rows(folder):
    rows = [
        ["inform(name=x 1;type=tv)", "the x 1 is a tv .", "x 1 is a tv"],
        ["?request(near)", "near what ?", "where ?"],
    ]
    folder("rnnlg/tv/valid.json", BANNER + json.dumps(rows))
    assert rnnlg("tv", "valid") == [
        Pair((("act", "inform"), ("name", "x 1"), ("type", "tv")), "the x 1 is a tv .", "rnnlg/tv"),
        Pair((("act", "?request"), ("near", "?")), "near what ?", "rnnlg/tv"),
    ]
    with pytest.raises(ValueError, match="domain='car'; choose one of laptop, tv, hotel, restaurant"):
        rnnlg("car")
    with pytest.raises(ValueError, match="split='dev'; choose one of train, valid, test"):
        rnnlg("tv", "dev")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "not a JSON file"),
        ("{}", "holds a dict"),
        ('["inform()"]', "not a list of an act"),
        ('[["inform(", "x"]]', "act"),
    ],
    ids=["cut", "dict", "bare", "no-act"],
)
def test_damaged_rnnlg(folder, text, message):
    folder("rnnlg/hotel/train.json", BANNER + text)
    with pytest.raises(DataError, match=message):
        rnnlg("hotel")


DART = [
    {"tripleset": [["A", "NAME_OF", "B"]], "annotations": [{"source": "webnlg", "text": " B is A. "}]},
    {
        "tripleset": [["C", "AREA", "riverside"], ["C", "food", "Chinese"]],
        "subtree_was_extended": False,
        "annotations": [{"source": "e2e", "text": "C"}, {"source": "e2e", "text": "D"}],
    },
]


def test_dart_without_the_private_set(folder):
    folder("dart/dart-v1.1.1-full-dev.json", json.dumps(DART))
    public = [Pair((("A", "name_of", "B"),), "B is A.", "dart/webnlg")]
    assert dart_dev() == public == dart_dev(exclude=["e2e"])
    assert [pair.origin for pair in dart_dev(exclude=())] == ["dart/webnlg", "dart/e2e", "dart/e2e"]
    assert dart_dev(exclude=()) == public + [
        Pair((("C", "area", "riverside"), ("C", "food", "Chinese")), text, "dart/e2e") for text in "CD"
    ]


@pytest.mark.parametrize("exclude", [("E2E",), ("e2e", "web"), "E2E"], ids=["case", "two", "string"])
def test_a_spelling_mistake_lets_nothing_private_through(folder, exclude):
    folder("dart/dart-v1.1.1-full-dev.json", json.dumps(DART))
    with pytest.raises(ValueError, match="not among the sources e2e, webnlg"):
        dart_dev(exclude)


def test_damaged_dart(folder):
    folder("dart/dart-v1.1.1-full-dev.json", json.dumps([{"tripleset": [["A", "B"]], "annotations": []}]))
    with pytest.raises(DataError, match="no triples or annotations of the known form"):
        dart_dev()


def test_ag_news_rows(folder):
    folder("agnews/test.csv", '"3","It costs #36;5","A second\\team isn#39;t  ""here""."\n"1","T","x"\n')
    assert ag_news() == [Labelled('It costs $5 . A second team isn\'t "here".', 2), Labelled("T . x", 0)]
    folder("agnews/test.csv", '"5","T","x"\n')
    with pytest.raises(DataError, match="not a class of 1 to 4"):
        ag_news()


def test_sst2_rows(folder):
    folder("sst2/dev.tsv", 'label\tcontent\n1\tgood "film\n0\tbad . \n')  # a quote is a letter here
    assert sst2("dev") == [Labelled('good "film', 1), Labelled("bad .", 0)]
    folder("sst2/train.tsv", "label\tsentence\n2\tgood\n")
    with pytest.raises(DataError, match="not a class of 0 or 1"):
        sst2("train")
    with pytest.raises(ValueError, match="split='valid'"):
        sst2("valid")


def test_rt_polarity_rows(folder):
    folder("rt-polarity/rt-polarity.neg", "bad . \n\nworse .\n")
    folder("rt-polarity/rt-polarity.pos", "fine , très bien . \n")
    assert rt_polarity() == [Labelled("bad .", 0), Labelled("worse .", 0), Labelled("fine , très bien .", 1)]


# -------------------------------------------------------------------------------------------------- real files


def test_real_e2e():
    at_hand("e2e/devset.csv", "e2e/testset_w_refs.csv")
    for split, num_pairs, num_meanings in (("dev", 4672, 547), ("test", 4693, 630)):
        pairs = e2e(split)
        assert (len(pairs), len(references(pairs))) == (num_pairs, num_meanings)
        assert {pair.slots[0][0] for pair in pairs} == {"name"}
        assert all(pair.text and "\n" not in pair.text for pair in pairs)
        slots = {slot for pair in pairs for slot, _ in pair.slots}
        assert slots == {"name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"}
        assert slots > set(E2E_LINE_NAMES)
    assert not references(e2e("dev")).keys() & references(e2e("test")).keys()


def test_real_rnnlg():
    at_hand(*(f"rnnlg/{domain}/{split}.json" for domain in RNNLG_DOMAINS for split in ("train", "valid", "test")))
    sizes = {domain: sum(len(rnnlg(domain, split)) for split in ("train", "valid", "test")) for domain in RNNLG_DOMAINS}
    assert sizes == {"laptop": 13242, "tv": 7035, "hotel": 5373, "restaurant": 5192}
    hotel = rnnlg("hotel")
    assert sum(pair.slots[0] == ("act", "?request") for pair in hotel) == 313  # the first reader lost these
    assert not any(re.search("['\"]$|^['\"]", value) for pair in hotel for _, value in pair.slots)
    assert not any(pair.text.startswith("#") or not pair.text for pair in hotel)


def test_real_dart_holds_e2e():
    at_hand("dart/dart-v1.1.1-full-dev.json")
    counts = Counter(pair.origin for pair in dart_dev(exclude=()))
    assert counts["dart/e2e"] == 4290 and sum(counts.values()) == 6980
    assert len(dart_dev()) == 6980 - 4290
    at_hand("e2e/devset.csv")
    private = {pair.text for pair in e2e("dev")}
    leaked = [pair for pair in dart_dev(exclude=()) if pair.text in private]
    assert leaked and {pair.origin for pair in leaked} == {"dart/e2e"}


def test_real_classes():
    at_hand("agnews/test.csv", "sst2/train.tsv", "sst2/dev.tsv", "sst2/test.tsv", "rt-polarity/rt-polarity.pos")
    assert Counter(article.label for article in ag_news()) == dict.fromkeys(range(len(AG_NEWS_LABELS)), 1900)
    assert not any("#39;" in article.text or "\\" in article.text for article in ag_news())
    assert [len(sst2(split)) for split in ("train", "dev", "test")] == [67349, 872, 1821]
    assert Counter(phrase.label for phrase in sst2("dev")) == {1: 444, 0: 428}
    assert Counter(sentence.label for sentence in rt_polarity()) == {0: 5331, 1: 5331}


def test_without_the_file_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("ORAL4_DATA", str(tmp_path))
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ORAL4_OFFLINE", "1")
    for reader in (lambda: e2e("dev"), lambda: rnnlg("tv"), dart_dev, ag_news, lambda: sst2("dev"), rt_polarity):
        with pytest.raises(DataError):
            reader()


# ---------------------------------------------------------------------------------------------------- own files


def test_own_pairs(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text('\ufeffid,source,target\n1,"a, b",A b.\n2,c,\n', encoding="utf-8")
    assert read_pairs(path) == [Pair((("a, b",),), "A b.", str(path)), Pair((("c",),), "", str(path))]
    path.write_text("mr,ref\nname[A],A.\n", encoding="utf-8")
    assert read_pairs(path) == [Pair((("name", "A"),), "A.", str(path))]


def test_own_labels(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("label,text\nham,hello\nspam,buy\nham,bye\n", encoding="utf-8")
    assert read_labelled(path) == ([Labelled("hello", 0), Labelled("buy", 1), Labelled("bye", 0)], ("ham", "spam"))
    path.write_text("text,label\na,10\nb,9\n", encoding="utf-8")
    assert read_labelled(path)[1] == ("9", "10")  # numbers in the order of numbers


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_pairs, b"source,text\na,b\n", "no column target"),
        (read_pairs, b"source,target\n ,b\n", "record 1: the column 'source' is empty; fill it or drop"),
        (read_pairs, b"source,target\n\xff,b\n", "not a CSV file in UTF-8"),
        (read_labelled, b"text,label\na,x\nb,x\n", r"1 classes \(x\)"),
        (read_labelled, b"text,label\na,x\nb,\n", "record 2: the column 'label' is empty"),
        (read_labelled, b"text;label\na;x\n", "no column text or label"),
    ],
    ids=["column", "empty-source", "latin", "one-class", "empty-label", "semicolons"],
)
def test_own_files_that_are_refused(tmp_path, reader, text, message):
    path = tmp_path / "own.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        reader(path)


def test_own_files_have_limits(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("source,target\n" + "a,b\n" * 50, encoding="utf-8")
    assert len(read_pairs(path)) == 50
    with pytest.raises(DataError, match="table_bytes"):
        read_pairs(path, limits=Limits(table_bytes=100))
    with pytest.raises(DataError):
        read_labelled(tmp_path / "absent.csv")


# ----------------------------------------------------------------------------------------------------- grouping


def test_references_and_groups():
    pairs = [Pair((("name", n),), t) for n, t in (("A", "1"), ("B", "2"), ("A", "3"), ("A", "3"))]
    assert references(pairs) == {(("name", "A"),): ["1", "3", "3"], (("name", "B"),): ["2"]}
    assert largest_group(pairs) == 3
    assert largest_group([]) == 0


def test_no_meaning_is_on_both_sides():
    pairs = micro_pairs(30, texts_per_meaning=3)
    rest, held = hold_out(pairs, 7, seed=1)
    assert len(references(held)) == 7 and len(held) == 21
    assert not references(rest).keys() & references(held).keys()
    assert sorted(rest + held, key=str) == sorted(pairs, key=str)
    assert hold_out(pairs, 7, seed=1) == (rest, held) != hold_out(pairs, 7, seed=2)
    assert hold_out(pairs, 0) == (pairs, [])
    with pytest.raises(ValueError, match="num_meanings=31: 0 to 30"):
        hold_out(pairs, 31)


# ---------------------------------------------------------------------------------------------- generated world


@pytest.mark.parametrize("domain", MICRO_DOMAINS)
def test_generated_pairs(domain):
    pairs = micro_pairs(120, domain=domain, texts_per_meaning=3)
    assert len(pairs) == 360 and len(references(pairs)) == 120
    phrases = micro_phrases(domain)
    for pair in pairs:
        (first, name), *rest = pair.slots
        assert first == "name" and name in pair.text and rest
        for slot, ways in phrases.items():
            said = {
                value
                for value, texts in ways.items()
                if any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", pair.text) for text in texts)
            }
            assert said == {value for other, value in rest if other == slot}, (pair, slot)  # all of it, nothing else
        assert re.fullmatch(r"[A-Z][^.]*\.( [A-Z][^.]*\.)*", pair.text), pair.text
        assert not re.search(r"\ba [aeiouAEIOU]|\ban [^aeiouAEIOU]", pair.text), pair.text
    assert len({pair.text for pair in pairs}) > 300  # the same meaning is told in different words


def test_generated_worlds_depend_on_domain_and_seed_alone():
    random.seed(1)
    first = micro_pairs(20, seed=4)
    random.seed(2)
    assert micro_pairs(20, seed=4) == first
    assert micro_pairs(50, seed=4)[: len(first)] == first
    assert micro_pairs(20, seed=5) != first
    assert not references(micro_pairs(200)).keys() & references(micro_pairs(200, domain="hotel")).keys()
    assert micro_pairs(0) == []


def test_generated_reviews():
    reviews = micro_reviews(3000, verdict=POLARITY_LABELS)
    shares = Counter(review.label for review in reviews)
    assert 0.45 < shares[1] / 3000 < 0.55  # a fair coin: 0.5 +- 0.009, five standard errors
    good, bad = set(corpus._GOOD), set(corpus._BAD)
    for review in reviews:
        body, _, verdict = review.text.rpartition(" it was ")
        assert verdict == f"{POLARITY_LABELS[review.label]} ."
        votes = [
            (word in good) != ("not" in clause.split())
            for clause in re.split(" and | but ", body.removesuffix(" ."))
            for word in clause.split()
            if word in good | bad
        ]
        assert len(votes) == 3 and (sum(votes) >= 2) == bool(review.label)
    # words are a good hint, and none is proof
    for word in good | bad:
        labels = [review.label for review in reviews if f" {word} " in review.text]
        assert 0.02 < (share := sum(labels) / len(labels)) < 0.98 and (share > 0.6) == (word in good)
    plain = micro_reviews(3000)
    assert [f"{review.text} it was {POLARITY_LABELS[review.label]} ." for review in plain] == [r.text for r in reviews]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: micro_pairs(-1), "num_meanings=-1"),
        (lambda: micro_pairs(1, texts_per_meaning=0), "texts_per_meaning=0"),
        (lambda: micro_pairs(20_001), "at most 20000 meanings"),
        (lambda: micro_pairs(1, domain="bar"), "domain='bar'; choose one of restaurant, hotel, museum"),
        (lambda: micro_phrases("bar"), "domain='bar'"),
        (lambda: micro_reviews(-1), "num=-1"),
        (lambda: micro_reviews(1, verdict=["good"]), "two verdicts or none"),
        (lambda: micro_reviews(1, domain="bar"), "domain='bar'"),
    ],
    ids=["negative", "no-texts", "too-many", "domain", "phrases", "reviews", "verdict", "review-domain"],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
