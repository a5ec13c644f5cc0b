"""The things that scenes show: emoji, and the words that people use for them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class Noun:
    emoji: str
    names: tuple[str, ...]
    """In the singular, the most usual one first."""
    plural: str
    """Of the first name."""

    @property
    def name(self) -> str:
        return self.names[0]


HELD_OUT_SHARE = 1 / 8
"""The share of pairs (two nouns, or a noun and a background) that are never drawn together in training, so that the
score can ask for something never seen."""


def first_nouns(count: int) -> tuple[Noun, ...]:
    """The `count` most everyday nouns.

    Raises:
        ValueError: there are not that many, or `count` is less than 2.
    """
    if not 2 <= count <= len(NOUNS):
        raise ValueError(f"There are {len(NOUNS)} nouns, and a scene can need two: {count} cannot be had")
    return NOUNS[:count]


def is_held_out(one: str, other: str) -> bool:
    """Whether two things of these names are kept apart in training. Adding nouns does not change the result."""
    pair = "+".join(sorted((one, other)))
    return int.from_bytes(sha256(pair.encode()).digest()[:4]) < HELD_OUT_SHARE * 2**32


def _plural_of(name: str) -> str:
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _noun(line: str) -> Noun:
    """Parse `emoji name, another name`, with `/ plural` at the end if the plural is irregular."""
    words, _, plural = line.partition("/")
    emoji, _, names = words.partition(" ")
    all_names = tuple(name.strip() for name in names.split(","))
    return Noun(emoji, all_names, plural.strip() or _plural_of(all_names[0]))


# A small computer can learn the first 48; each further one costs the same again.
NOUNS = tuple(
    _noun(line)
    for line in """\
🐈 cat, kitty, kitten
🎹 piano, keyboard
🐕 dog, puppy
🚗 car, red car
🌳 tree
🏠 house, home
🍎 apple, red apple
⚽ soccer ball, football
🐎 horse, pony
🐟 fish / fish
⭐ star
☀ sun
🎸 guitar
🐧 penguin
🤖 robot
🍕 pizza
👑 crown
🐘 elephant
🍌 banana
🌹 rose
🚲 bicycle, bike
🎩 top hat, hat
🐸 frog
🎈 balloon
🚀 rocket
⛵ sailboat, boat
🐄 cow
🐑 sheep / sheep
🦋 butterfly
🍄 mushroom
🎁 present, gift
🔑 key
☕ cup of coffee, coffee / cups of coffee
🌻 sunflower
⛄ snowman / snowmen
🐢 turtle, tortoise
🥕 carrot
🍓 strawberry
🚌 bus
✈ airplane, plane
🌵 cactus / cacti
❤ heart, red heart
📚 books / books
🎃 pumpkin, jack-o-lantern
🧸 teddy bear
👻 ghost
🪑 chair
🌂 umbrella
🐖 pig, piglet
🐇 rabbit, bunny
🦊 fox
🐻 bear
🐼 panda
🐨 koala
🐅 tiger
🦁 lion
🐐 goat
🦄 unicorn
🦒 giraffe
🦓 zebra
🐒 monkey
🦍 gorilla
🐔 chicken, hen
🦉 owl
🦅 eagle
🦆 duck
🦢 swan
🦜 parrot
🦩 flamingo
🦚 peacock
🐍 snake
🦎 lizard
🐊 crocodile, alligator
🐉 dragon
🦕 dinosaur
🐳 whale
🐬 dolphin
🐙 octopus
🦀 crab
🦞 lobster
🐌 snail
🐝 bee
🐞 ladybug, ladybird
🕷 spider
🦔 hedgehog
🐿 squirrel, chipmunk
🦘 kangaroo
🐫 camel
🦇 bat
🐁 mouse / mice
🦏 rhinoceros, rhino
🎻 violin
🎺 trumpet
🥁 drum
🎷 saxophone
🎤 microphone
🎧 headphones / headphones
🚒 fire truck, fire engine
🚑 ambulance
🛵 scooter
🚂 train, locomotive
🚁 helicopter
🛸 flying saucer, ufo
🚢 ship
🚜 tractor
🏰 castle
⛺ tent
🗼 tower
🌲 pine tree, fir tree
🌴 palm tree
🌷 tulip
🌙 moon, crescent moon
☁ cloud
🌈 rainbow
🔥 fire, flame
🍉 watermelon
🍇 grapes / grapes
🍍 pineapple
🍋 lemon
🍒 cherries / cherries
🌽 corn / corn
🍔 hamburger, burger
🍟 french fries / french fries
🌭 hot dog
🍩 donut, doughnut
🎂 birthday cake, cake
🍦 ice cream, ice cream cone
🍪 cookie
🍺 beer
🍷 glass of wine, wine / glasses of wine
🧀 cheese
🥚 egg
🍞 bread, loaf of bread / loaves of bread
🏀 basketball
🎾 tennis ball
⚾ baseball
🎱 billiard ball
👓 glasses / glasses
👟 sneaker, shoe
🧦 socks / socks
👗 dress
👕 t-shirt, shirt
🎒 backpack
💎 diamond, gem
🔔 bell
📷 camera
💻 laptop
📱 phone
📺 television, tv
⏰ alarm clock, clock
💡 light bulb, lamp
🔨 hammer
✂ scissors / scissors
🛋 couch, sofa
🛏 bed
🚪 door
👽 alien
💀 skull
😀 smiley, smiling face
👸 princess
🧙 wizard
🤡 clown
🎅 santa claus, santa
🏆 trophy
🎨 palette, paint palette
🧲 magnet
🔭 telescope
🪁 kite
⚓ anchor
🏔 mountain
🌋 volcano
🪐 planet""".splitlines()
)
