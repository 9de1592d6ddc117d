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
