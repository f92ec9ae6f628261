"""The small world's words: closed lists, and makers of names, places, codes and words that are new each time.

Whatever a conversation is about (a name, a value, a tool, a key) belongs to one split for ever, by a checksum of its
letters: what evaluation asks about never occurs in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from enum import Enum

HELD_OUT_OF = 8
"""One word of this many is held out."""


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held out"


def split_of(word: str) -> Split:
    """The split that a word belongs to, whatever its case and the separators in it."""
    letters = "".join(c for c in word.lower() if c.isalnum())
    return Split.HELD_OUT if zlib.crc32(letters.encode()) % HELD_OUT_OF == 0 else Split.TRAIN


def listed(text: str, mark: str | None = None) -> list[str]:
    """The parts of a text between marks (white space)."""
    return text.split(mark)


FIRST_NAMES = listed(
    "Ada Adam Alba Alice Alma Amir Amy Ana Anders Anna Anton Aria Arun Asha Astrid Basil Bea Ben Bianca Boris Bruno "
    "Carl Carla Carmen Cleo Clara Cora Dana Daniel Dario David Dora Edith Elena Elias Ella Emil Emma Enzo Erik Esther "
    "Eva Felix Fiona Flora Frank Freya George Gina Grace Greta Hana Hans Hassan Hector Helen Henry Hugo Ida Igor Ines "
    "Ingrid Irene Iris Isaac Ivan Ivy Jack Jan Jana Jane Jasper Joan Jonas Jorge Julia Julian Kai Karen Karim Karl "
    "Kim Lara Lars Laura Lea Lena Leo Lila Lina Linus Lola Louis Lucas Lucy Luna Magda Marco Maria Mark Marta Max Maya "
    "Mila Milo Mina Mira Mona Nadia Nils Nina Noah Nora Olga Olive Omar Oscar Otto Pablo Paul Paula Peter Petra Pia "
    "Priya Quinn Ravi Rita Robin Rosa Ruben Ruth Sam Sara Selma Simon Sofia Stella Sven Tara Theo Tina Tom Uma Vera "
    "Victor Viola Wanda Will Yara Yusuf Zara Zoe"
)
TOWNS = listed(
    "Athens Berlin Bern Boston Cairo Chicago Cork Delhi Denver Dublin Florence Geneva Ghent Graz Hamburg Hanoi "
    "Helsinki Jena Kyoto Leeds Leipzig Lima Lisbon London Lyon Madrid Malta Milan Munich Nairobi Naples Oslo Oxford "
    "Paris Perth Porto Prague Quito Riga Rome Seoul Seville Sofia Tokyo Toronto Tunis Turin Utrecht Vienna Vilnius "
    "Warsaw York Zurich"
)
COLOURS = listed("red blue green yellow black white grey brown orange purple pink silver golden violet")
THINGS = listed(
    "bag ball basket bell bicycle boat book bottle bowl box brush bucket cable camera candle chair clock coat cup desk "
    "door drum engine flag flute gate glass guitar hammer hat jacket jar key kettle kite ladder lamp lock map mirror "
    "needle oven painting paper parcel pen piano pillow plate radio ring rope rug ruler saddle safe scarf shelf ship "
    "shovel sofa spoon stove suitcase table telephone tent ticket torch toy train tray trunk umbrella van vase violin "
    "wagon wallet watch wheel whistle window"
)
FOODS = listed(
    "apple banana bean bread butter cake carrot cheese cherry coffee corn cream egg fig garlic grape honey jam lemon "
    "lime mango melon milk mint mushroom noodle nut olive onion orange pasta peach pear pepper plum potato pumpkin "
    "rice salad salt soup spinach sugar tea tomato water"
)
ANIMALS = listed(
    "ant badger bear bee bird camel cat cow crab crow deer dog donkey duck eagle fish fox frog goat goose hare hawk "
    "hedgehog hen horse lion lizard mole monkey mouse otter owl parrot pig pony rabbit rat raven seal sheep snail "
    "snake spider squirrel swan tiger toad turtle whale wolf worm"
)
JOBS = listed(
    "artist baker barber builder butcher carpenter chemist clerk cook dancer dentist doctor driver editor engineer "
    "farmer fisher gardener guard guide judge lawyer librarian mason mechanic miller miner musician nurse painter "
    "pilot plumber poet porter printer sailor singer smith tailor teacher trader waiter weaver writer"
)
ROOMS = listed(
    "attic barn basement cabin cellar church corner courtyard garage garden hall kitchen library market museum office "
    "pantry park school shed stable station studio theatre tower warehouse workshop yard"
)
ATTRIBUTES = listed(
    "door code|badge number|phone number|locker number|room number|access code|password|ticket number|desk number|"
    "account number|favourite colour|favourite food|favourite animal|home town|birth place|middle name|best friend|"
    "neighbour|teacher|hobby|team|project|secret word|nickname|pet|boat|company|street|manager|instrument|lucky number|"
    "order number|plate number|gate code|pin|postal code|seat number|call sign",
    "|",
)
TOPICS = listed(
    "weather|temperature|population|local time|humidity|wind speed|traffic|average rent|tide|sunrise|sunset|air "
    "quality|rainfall|elevation|postal code|mayor|currency|time zone|water level|snow depth|bus schedule|train "
    "schedule|ferry schedule|parking|noise level|pollen count|tax rate|crime rate|visibility|forecast|address|phone "
    "number|birthday|salary|schedule|email|department|shift|manager|job title|office|balance|credit score|membership|"
    "appointment|vacation|blood type|shoe size|nationality|price|stock|weight|size|rating|colour|delivery date|"
    "barcode|warranty|discount|supplier|shelf|calories|expiry date|brand|model number|return policy|voltage|material|"
    "order status|invoice total|ticket state|flight gate|departure time|arrival time|tracking status|build status|"
    "queue length|memory usage|error count|battery level|signal strength|fuel level|speed limit|distance|altitude|"
    "pressure|opening hours|dose|definition|synonym|score|ranking|release date|author|publisher|owner|deadline|"
    "priority|status|capacity|"
    "latitude|mileage|premium|quota|interest rate|exchange rate|carbon footprint|audit result|lease|harvest|catch size",
    "|",
)
KEYS = listed(
    "name|age|city|job|colour|size|price|code|title|author|year|count|email|street|country|animal|food|team|level|"
    "score|status|kind|owner|room|day|month|start|end|speed|weight|height|width|length|number|total|reason|source|"
    "target|language|currency|amount|brand|model|material|shape|taste|phone|unit|group|rank|place|label|topic|message|"
    "user|host|"
    "port|path|version|region|zone|budget|limit|first_name|last_name|zip_code|order_id|item_count|due_date|is_open",
    "|",
)
ADJECTIVES = listed(
    "big broken bright calm clean cold cool dark deep dry dull empty fast fine fresh full gentle good great happy "
    "heavy high hot kind large late light little long loud low narrow new nice old open plain poor proud quick quiet "
    "rich rough round sad sharp short slow small smooth soft sour steep strange strong sweet tall thick thin tired "
    "tiny warm wet wide wild wise young"
)
VERBS_PAST = listed(
    "admired bought broke brought built carried cleaned copied counted dropped fixed followed forgot found gave got "
    "held hid kept left liked lost loved made moved needed opened ordered painted passed pulled pushed read repaired "
    "saw sent showed sold stole touched took used wanted washed watched wrapped wrote"
)
FINDINGS = listed(
    "sunny cloudy rainy windy snowy foggy open closed good bad high low ready full empty late early free busy calm "
    "strong none weak shipped lost paid unpaid active inactive online offline fast slow dry humid stable rising "
    "falling"
)
WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_REAL = [
    word.lower()
    for known in (FIRST_NAMES, TOWNS, COLOURS, THINGS, FOODS, ANIMALS, JOBS, ROOMS, ADJECTIVES, TOPICS, KEYS)
    for word in known
    if word.isalpha()
]
_PARTS = sorted({part for topic in TOPICS for part in topic.split()})
_ATTRIBUTE_PARTS = sorted({part for attribute in ATTRIBUTES for part in attribute.split()})
_ONSETS = listed(
    "b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sm sn sp st str t th tr v w x y z"
)
_VOWELS = listed("a a a e e e i i o o u ai au ea ee ia io oa oo ou y")
_CODAS = ["", "", "", "", *listed("b ck d f g l ld ll m n nd ng nk nt p r rd rk rn rt s sh ss st t th v x z")]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


class Words:
    """Draws words of one split; the same words for the same random state."""

    def __init__(self, rng: random.Random, split: Split, pieces: Sequence[str] = ()) -> None:
        """`pieces`: tokens of small letters. Words made of them have the model write each of its tokens."""
        self.rng = rng
        self.split = split
        self._pieces = pieces
        self._ours: dict[int, list[str]] = {}
        """The part of each closed list, by its identity, that belongs to the split."""
        self._few: dict[int, list[str]] = {}
        """The part of each, as small as what is held out, that one conversation of the training split prefers."""

    def begin(self) -> None:
        """Another conversation. Each has few known words of a kind, so that one word is in many of its facts."""
        self._few.clear()

    def fresh(self, make: Callable[[], str]) -> str:
        """The first word of `make` that belongs to this split."""
        while True:
            word = make()
            if split_of(word) is self.split:
                return word

    def one_of(self, known: Sequence[str], unknown: float) -> str:
        """A word of a closed list, or with this probability one that exists nowhere else."""
        ours = self._ours.get(id(known))
        if ours is None:
            ours = self._ours[id(known)] = [word for word in known if split_of(word) is self.split]
        return self.word() if not ours or self.rng.random() < unknown else self.rng.choice(self._preferred(ours))

    def any_of(self, known: Sequence[str]) -> str:
        """A word of a closed list that nobody asks about: any in evaluation, in training none that is held out."""
        return self.one_of(known, 0) if self.split is Split.TRAIN else self.rng.choice(known)

    def word(self) -> str:
        """A lower-case word that means nothing."""
        return self.fresh(self._spelled)

    def name(self) -> str:
        """A person's."""
        return self._called(FIRST_NAMES)

    def place(self) -> str:
        """A town's."""
        return self._called(TOWNS)

    def number(self, digits: int) -> str:
        """Without a leading zero. Short numbers are too few to hold any out."""
        low = 10 ** (digits - 1)
        if digits < 3:
            return str(self.rng.randrange(low, low * 10))
        return self.fresh(lambda: str(self.rng.randrange(low, low * 10)))

    def code(self) -> str:
        """Letters and digits, often in groups: `K7QX`, `48-TR-9`, `A1B2-C3D4`."""
        return self.fresh(self._code)

    def topic(self) -> str:
        """Something that a tool can tell, of one or two words."""
        if self.rng.random() < 0.2:
            return self.fresh(lambda: " ".join(self.rng.sample(_PARTS, 2)))
        topic = self.one_of(TOPICS, 0.5)
        return f"{self.rng.choice(ADJECTIVES)} {topic}" if self.rng.random() < 0.15 else topic

    def key(self) -> str:
        """Of a JSON object: one word, or several with underscores."""
        draw = self.rng.random()
        if draw < 0.1:
            return self.fresh(lambda: f"{self._spelled()}_{self.any_of(KEYS)}")
        if draw < 0.2:
            return self.fresh(lambda: f"{self._spelled()}_{self._spelled()}")
        return self.one_of(KEYS, 0.55)

    def attribute(self) -> str:
        """What a person can have a value of."""
        if self.split is Split.TRAIN and self.rng.random() < 0.3:
            # of two words that were never seen together: known pairs alone teach to say the second without looking
            return self.fresh(lambda: f"{self._attribute_part()} {self._attribute_part()}")
        return self.one_of(ATTRIBUTES, 0.45)

    def _attribute_part(self) -> str:
        draw = self.rng.random()
        if draw < 0.5:
            return self.word()
        return self.rng.choice(_ATTRIBUTE_PARTS if draw < 0.8 else ADJECTIVES)

    def thing(self) -> str:
        return self.one_of(THINGS, 0.5)

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def distinct(self, count: int, make: Callable[[], str]) -> list[str]:
        """`count` different words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[make()] = None
        return list(found)

    def _called(self, known: Sequence[str]) -> str:
        known = self._preferred(known)
        return self.fresh(lambda: self.rng.choice(known) if self.rng.random() < 0.3 else self._spelled().capitalize())

    def _preferred(self, known: Sequence[str]) -> Sequence[str]:
        """All, or in training often only those that the conversation prefers."""
        if self.split is not Split.TRAIN or self.rng.random() < 0.4:
            return known
        if id(known) not in self._few:
            self._few[id(known)] = self.rng.sample(known, -(-len(known) // HELD_OUT_OF))
        return self._few[id(known)]

    def _spelled(self) -> str:
        rng = self.rng
        draw = rng.random()
        if draw < 0.25 and self._pieces:
            return "".join(rng.choice(self._pieces) for _ in range(rng.randint(1, 3)))
        if draw > 0.92:
            return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 8)))
        if draw < 0.5:
            return self._mended()
        syllables = rng.choices((1, 2, 3), (0.1, 0.6, 0.3))[0]
        return "".join(self._syllable() for _ in range(syllables))

    def _syllable(self) -> str:
        rng = self.rng
        return rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if rng.random() < 0.6 else "")

    def _mended(self) -> str:
        """A part of a real word with another end or beginning: what has begun like a known word need not be one."""
        rng = self.rng
        real = rng.choice(_REAL)
        if rng.random() < 0.7:
            return real[: rng.randint(2, max(2, len(real) - 1))] + self._syllable()
        return self._syllable() + real[rng.randint(1, len(real) - 1) :]

    def _code(self) -> str:
        rng = self.rng
        groups = []
        for _ in range(rng.choices((1, 2, 3), (0.45, 0.4, 0.15))[0]):
            alphabet = rng.choice((_CODE_LETTERS, "0123456789", _CODE_LETTERS + "0123456789"))
            groups.append("".join(rng.choice(alphabet) for _ in range(rng.randint(2, 5))))
        code = "-".join(groups)
        return code if len(code) >= 4 else code + rng.choice(_CODE_LETTERS) + str(rng.randrange(10, 100))
