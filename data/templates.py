"""Captions of digits-world: nine templates to learn from, and three that only the test split uses."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {word}: "eight"; {numeral}: "8"; {a_word}, {a_numeral}: the same after "a" or "an". A test template puts phrases of
# the train templates together in a new way, so that it asks for the concept rather than for unseen words.
TRAIN_TEMPLATES = (
    "{word}",
    "{numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the number {word}",
    "a picture of {a_word}",
    "this is the number {numeral}",
)
TEST_TEMPLATES = (
    "a picture of the digit {word}",
    "this is {a_numeral}",
    "the handwritten number {word}",
)


def render(template: str, digit: int) -> str:
    """Return the caption of a digit, 0 to 9."""
    word, numeral = WORDS[digit], str(digit)
    article = "an" if digit == 8 else "a"
    return template.format(word=word, numeral=numeral, a_word=f"{article} {word}", a_numeral=f"{article} {numeral}")
