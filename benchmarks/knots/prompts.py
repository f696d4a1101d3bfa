"""Class names and templates of the zero-shot heads: those that CLIP's authors published for these
data sets (github.com/openai/CLIP, data/prompts.md), as the KnOTS sets use them."""

from __future__ import annotations

import re
from collections.abc import Sequence

TEMPLATES = {
    "stanford_cars": [
        *(f"a photo of {which}{{}}." for which in ("a ", "the ", "my ")),
        "i love my {}!",
        *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
    ],
    "dtd": [
        f"a photo of {article} {{}} {kind}."
        for article in ("a", "the")
        for kind in ("texture", "pattern", "thing", "object")
    ],
    "eurosat": [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")],
    "gtsrb": [f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered")]
    + ['a close up photo of a "{}" traffic sign.'],
    "mnist": ['a photo of the number: "{}".'],
    "resisc45": [
        f"{source} {kind} of {article}{{}}."
        for article in ("", "a ", "the ")
        for kind in ("imagery", "photo", "view")
        for source in ("satellite", "aerial")
    ],
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "svhn": ['a photo of the number: "{}".'],
}

EUROSAT = {
    "annualcrop": "annual crop land",
    "forest": "forest",
    "herbaceousvegetation": "brushland or shrubland",
    "highway": "highway or road",
    "industrial": "industrial buildings or commercial buildings",
    "pasture": "pasture land",
    "permanentcrop": "permanent crop land",
    "residential": "residential buildings or homes or apartments",
    "river": "river",
    "sealake": "lake or sea",
}

LIMIT = "red and white circle {} kph speed limit"
TRIANGLE = "red and white triangle {} warning"
BLUE = "blue circle with white {} mandatory"
ENDED = "white circle with gray strike bar indicating no passing for {} has ended"
GTSRB = (
    *(LIMIT.format(speed) for speed in (20, 30, 50, 60, 70, 80)),
    "end / de-restriction of 80 kph speed limit",
    *(LIMIT.format(speed) for speed in (100, 120)),
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    TRIANGLE.format("road intersection"),
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    TRIANGLE.format("with exclamation mark"),
    *(
        TRIANGLE.format(f"with black {bend} curve approaching")
        for bend in ("left", "right", "double")
    ),
    TRIANGLE.format("rough / bumpy road"),
    TRIANGLE.format("car skidding / slipping"),
    TRIANGLE.format("with merging / narrow lanes"),
    TRIANGLE.format("with person digging / construction / road work"),
    TRIANGLE.format("with traffic light approaching"),
    TRIANGLE.format("with person walking"),
    TRIANGLE.format("with child and person walking"),
    TRIANGLE.format("with bicyle"),
    TRIANGLE.format("with snowflake / ice"),
    TRIANGLE.format("with deer"),
    "white circle with gray strike bar no speed limit",
    *(
        BLUE.format(way)
        for way in (
            "right turn arrow",
            "left turn arrow",
            "forward arrow",
            "forward or right turn arrow",
            "forward or left turn arrow",
            "keep right arrow",
            "keep left arrow",
        )
    ),
    "blue circle with white arrows indicating a traffic circle",
    ENDED.format("cars"),
    ENDED.format("trucks"),
)
"""By class number. The two misspelt ones are so in the source."""


def class_names(task: str, labels: Sequence[str]) -> list[str | None]:
    """What stands in the templates for each class, from the names of the data set's labels.

    Digits and traffic signs go by number. "AnnualCrop" or "annual crop" is EuroSAT's, "a_abbey"
    and "abbey" SUN397's. None for a name that EuroSAT does not have.
    """
    if task in ("mnist", "svhn"):
        return [str(k) for k in range(len(labels))]
    if task == "gtsrb":
        return list(GTSRB)
    if task == "eurosat":
        return [EUROSAT.get(re.sub(r"[\W_]", "", label).lower()) for label in labels]
    if task == "sun397":
        labels = [re.sub(r"^[a-z]_", "", label) for label in labels]
    return [label.replace("_", " ") for label in labels]
