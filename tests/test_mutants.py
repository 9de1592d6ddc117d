"""The table of mutants fits the package."""

import mutants


def test_every_mutant_is_of_one_place_compiles_and_has_tests():
    texts = mutants.sources()
    for mutant in mutants.table():
        file = mutants.file_of(mutant, texts)
        where = f"mutant {mutant.number} of tests/mutants.txt: {mutant.snippet}"
        assert mutant.snippet != mutant.replacement, where
        compile(texts[file].replace(mutant.snippet, mutant.replacement), where, "exec")
        assert mutants.tests_of(file), f"no tests of {file}"


def test_a_mutant_that_is_no_longer_caught_is_named():
    before = [{"number": n, "snippet": str(n), "replacement": "", "test": "t"} for n in (1, 2, 3)]
    caught = [{**each, "outcome": "caught"} for each in before]
    now = [caught[0], {**caught[1], "outcome": "survived"}, {**caught[2], "snippet": "renamed"}]
    assert mutants.lost(caught, now) == ["2: 2 (by t)"]
    assert mutants.lost([{**before[1], "outcome": "survived"}], now) == []
