"""Captions and documents of digits-world: templates to learn from, and others that only the test split uses."""

from dataclasses import dataclass
from typing import Literal

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = ("still", "left", "right", "up", "down")

# {word}: "eight"; {numeral}: "8"; {a_word}, {a_numeral}: the same after "a" or "an"; {moving}: "moving left", or
# "standing still". A test template puts phrases of the train templates together in a new way, so that it asks for the
# concept rather than for unseen words.
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

# Wordings that say nothing of the medium.
_PLAIN = (
    "{word}",
    "{numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "the number {word}",
    "this is the number {numeral}",
)

# Of what: templates to learn from, and those of the test split. "concept" says nothing of the medium.
CAPTIONS = {
    "image": (TRAIN_TEMPLATES, TEST_TEMPLATES),
    "speech": (
        (
            *_PLAIN,
            "a spoken {word}",
            "a spoken {numeral}",
            "a voice saying {word}",
        ),
        ("a voice saying the digit {word}", "this is {a_numeral}", "the spoken number {word}"),
    ),
    "video": (
        (
            "{word} {moving}",
            "{numeral} {moving}",
            "{a_word} {moving}",
            "the digit {word} {moving}",
            "the digit {numeral} {moving}",
            "the number {word} {moving}",
            "a handwritten {word} {moving}",
            "a video of {a_word} {moving}",
            "this is the number {numeral} {moving}",
        ),
        (
            "a video of the digit {word} {moving}",
            "this is {a_numeral} {moving}",
            "the handwritten number {word} {moving}",
        ),
    ),
    "concept": (
        _PLAIN,
        ("this is the digit {word}", "the number {numeral}", "this is {a_numeral}"),
    ),
    "moving concept": (
        (
            "{word} {moving}",
            "{numeral} {moving}",
            "the digit {word} {moving}",
            "the digit {numeral} {moving}",
            "the number {word} {moving}",
            "this is the number {numeral} {moving}",
        ),
        ("this is the digit {word} {moving}", "the number {numeral} {moving}", "this is {a_numeral} {moving}"),
    ),
}
# What is asked of a scene: where one of its digits is, or one at a place that is given beside. Likewise.
SCENES = {
    "find": (
        (
            "where is the {word}",
            "where is the {numeral}",
            "find the {word}",
            "find the {numeral}",
            "find the digit {word}",
            "the place of the digit {numeral}",
        ),
        ("where is the digit {word}", "find the digit {numeral}", "the place of the {word}"),
    ),
    "draw": (
        (
            "draw {a_word} here",
            "draw {a_numeral} here",
            "put {a_word} here",
            "put {a_numeral} here",
            "draw the digit {word} here",
            "the digit {numeral} goes here",
        ),
        ("put the digit {word} here", "draw the digit {numeral} here", "{a_word} goes here"),
    ),
}
# What is said of a digit and a motion.
SPOKEN = "{word} {moving}"


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


def render(template: str, digit: int, motion: str | None = None) -> str:
    """Return the caption of a digit, 0 to 9, and of its motion if the template says one.

    Raises:
        KeyError: the template says a motion, and none is given.
    """
    word, numeral = WORDS[digit], str(digit)
    article = "an" if digit == 8 else "a"
    names = {"word": word, "numeral": numeral, "a_word": f"{article} {word}", "a_numeral": f"{article} {numeral}"}
    if motion is not None:
        names["moving"] = "standing still" if motion == "still" else f"moving {motion}"
    return template.format_map(names)
