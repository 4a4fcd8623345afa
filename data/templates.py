"""Captions and documents of digits-world: templates to learn from, and others that only the test split uses."""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class DocumentTemplate:
    """Wording of a document in which texts and pictures take turns.

    Attributes:
        kind: "counting": each text names the digit of the picture after it, one more than before, and 0 after 9.
            "naming": all pictures show one digit; the first text does not name it, the others do.
        first, following: the first text, and the others.
    """

    kind: Literal["counting", "naming"]
    first: str
    following: str


TRAIN_DOCUMENTS = (
    DocumentTemplate("counting", "the digit {word}", "next is {word}"),
    DocumentTemplate("counting", "counting from {word}", "next is {word}"),
    DocumentTemplate("counting", "counting from {numeral}", "next is {numeral}"),
    DocumentTemplate("counting", "{word} comes first", "then comes {word}"),
    DocumentTemplate("counting", "{numeral} comes first", "then comes {numeral}"),
    DocumentTemplate("naming", "some digit", "it is {word}"),
    DocumentTemplate("naming", "any digit", "it is {numeral}"),
    DocumentTemplate("naming", "some number", "that was {word}"),
)
TEST_DOCUMENTS = (
    DocumentTemplate("counting", "counting from the digit {word}", "then next is {word}"),
    DocumentTemplate("naming", "any number", "that is {word}"),
)


def render(template: str, digit: int) -> str:
    """Return the caption of a digit, 0 to 9."""
    word, numeral = WORDS[digit], str(digit)
    article = "an" if digit == 8 else "a"
    return template.format(word=word, numeral=numeral, a_word=f"{article} {word}", a_numeral=f"{article} {numeral}")
